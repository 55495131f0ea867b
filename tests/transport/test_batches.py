"""Batches survive the disk bit for bit, whole or not at all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.schema.batches import TrainingSample
from hone.schema.wire import WireError, encode
from hone.transport.batches import batch_from, read_batch, samples_of, write_batch

FLOATS = st.floats(-1e6, 1e6, width=32)


@st.composite
def samples(draw):
    length = draw(st.integers(1, 8))
    return TrainingSample(
        token_ids=draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)),
        loss_mask=draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)),
        logprobs=draw(st.lists(FLOATS, min_size=length, max_size=length)),
        advantages=draw(st.lists(FLOATS, min_size=length, max_size=length)),
        temperature=draw(FLOATS),
        version=draw(st.integers(0, 1000)),
        reward=draw(FLOATS),
    )


@given(st.lists(samples(), max_size=5))
def test_samples_come_back_from_a_batch(given_samples):
    batch = batch_from(3, 2, given_samples)
    assert list(samples_of(batch)) == given_samples
    assert batch.num_samples == len(given_samples)


def test_the_arrays_are_little_endian_and_of_the_documented_types():
    sample = TrainingSample([7, 300], [0, 1], [0.0, -0.5], [0.0, 1.5], temperature=0.7, version=4, reward=0.25)
    batch = batch_from(1, 1, [sample, sample])
    assert np.frombuffer(batch.token_ids, "<i4").tolist() == [7, 300, 7, 300]
    assert np.frombuffer(batch.loss_mask, "<u1").tolist() == [0, 1, 0, 1]
    assert np.frombuffer(batch.logprobs, "<f4").tolist() == [0.0, -0.5, 0.0, -0.5]
    assert np.frombuffer(batch.advantages, "<f4").tolist() == [0.0, 1.5, 0.0, 1.5]
    assert np.frombuffer(batch.lengths, "<i4").tolist() == [2, 2]
    assert np.frombuffer(batch.versions, "<i4").tolist() == [4, 4]
    assert np.frombuffer(batch.temperatures, "<f4").tolist() == [np.float32(0.7)] * 2


def test_a_batch_file_comes_back_and_may_be_written_again(tmp_path):
    batch = batch_from(5, 1, [TrainingSample([1], [1], [-0.5], [1.0], temperature=1.0, version=0)])
    for _ in range(2):
        write_batch(tmp_path / "batches" / "step.batch", batch)
    assert read_batch(tmp_path / "batches" / "step.batch") == batch
    assert [path.name for path in (tmp_path / "batches").iterdir()] == ["step.batch"]


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"", lambda data: data + b"x"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "step.batch"
    write_batch(path, batch_from(5, 1, [TrainingSample([1], [1], [-0.5], [1.0], temperature=1.0, version=0)]))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WireError):
        read_batch(path)


def test_arrays_that_disagree_are_refused(tmp_path):
    path = tmp_path / "step.batch"
    batch = batch_from(5, 1, [TrainingSample([1], [1], [-0.5], [1.0], temperature=1.0, version=0)])
    path.write_bytes(encode({**{name: getattr(batch, name) for name in batch.__struct_fields__}, "logprobs": b""}))
    with pytest.raises(WireError, match="logprobs"):
        read_batch(path)
