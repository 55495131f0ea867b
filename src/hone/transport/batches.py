"""Training batches between orchestrator and trainer: samples to flat arrays and back, durable files in between."""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hone.schema.batches import TrainingBatch, TrainingSample
from hone.schema.wire import WireError, decode, encode


def batch_from(step: int, num_groups: int, samples: Sequence[TrainingSample]) -> TrainingBatch:
    """Concatenate the samples of one optimizer step."""
    return TrainingBatch(
        step=step,
        num_groups=num_groups,
        lengths=_integers([[len(sample.token_ids) for sample in samples]]),
        versions=_integers([[sample.version for sample in samples]]),
        temperatures=_floats([[sample.temperature for sample in samples]]),
        rewards=_floats([[sample.reward for sample in samples]]),
        token_ids=_integers(sample.token_ids for sample in samples),
        loss_mask=_flags(sample.loss_mask for sample in samples),
        logprobs=_floats(sample.logprobs for sample in samples),
        advantages=_floats(sample.advantages for sample in samples),
    )


def samples_of(batch: TrainingBatch) -> Iterator[TrainingSample]:
    """The samples of a batch; group and attempt are not on the wire and come back empty."""
    lengths, versions = _read_integers(batch.lengths), _read_integers(batch.versions)
    temperatures, rewards = _read_floats(batch.temperatures), _read_floats(batch.rewards)
    token_ids, loss_mask = _read_integers(batch.token_ids), list(batch.loss_mask)
    logprobs, advantages = _read_floats(batch.logprobs), _read_floats(batch.advantages)
    start = 0
    for index, length in enumerate(lengths):
        part = slice(start, start + length)
        yield TrainingSample(
            token_ids=token_ids[part],
            loss_mask=loss_mask[part],
            logprobs=logprobs[part],
            advantages=advantages[part],
            temperature=temperatures[index],
            version=versions[index],
            reward=rewards[index],
        )
        start += length


def write_batch(path: Path, batch: TrainingBatch) -> None:
    """Write a batch so that it is whole or not there, whatever happens to this process. Writing it again is harmless.

    There is no fsync (it would take a tenth of the time at a dozen steps a second): after a power cut `read_batch`
    refuses a damaged file, and the orchestrator makes it again from the traces.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(encode(batch))
    temporary.replace(path)


def read_batch(path: Path) -> TrainingBatch:
    """The inverse of `write_batch`; `WireError` for a file that is no batch or whose arrays disagree."""
    batch = decode(path.read_bytes(), TrainingBatch)
    num_samples, num_tokens = batch.num_samples, batch.num_tokens
    sizes = [
        ("lengths", len(batch.lengths), 4 * num_samples),
        ("versions", len(batch.versions), 4 * num_samples),
        ("temperatures", len(batch.temperatures), 4 * num_samples),
        ("rewards", len(batch.rewards), 4 * num_samples),
        ("token_ids", len(batch.token_ids), 4 * num_tokens),
        ("loss_mask", len(batch.loss_mask), num_tokens),
        ("logprobs", len(batch.logprobs), 4 * num_tokens),
        ("advantages", len(batch.advantages), 4 * num_tokens),
    ]
    for name, found, wanted in sizes:
        if found != wanted:
            raise WireError(f"{path}: {name} has {found} bytes, expected {wanted}")
    if sum(_read_integers(batch.lengths)) != num_tokens:
        raise WireError(f"{path}: the lengths do not add up to {num_tokens} tokens")
    return batch


def _integers(parts: Iterable[list[int]]) -> bytes:
    values = array("i")
    for part in parts:
        values.fromlist(part)
    return _little_endian(values)


def _flags(parts: Iterable[list[int]]) -> bytes:
    return b"".join(map(bytes, parts))


def _floats(parts: Iterable[list[float]]) -> bytes:
    values = array("f")
    for part in parts:
        values.fromlist(part)
    return _little_endian(values)


def _little_endian(values: "array[int] | array[float]") -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _read_integers(data: bytes) -> list[int]:
    values: array[int] = array("i", data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def _read_floats(data: bytes) -> list[float]:
    values: array[float] = array("f", data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
