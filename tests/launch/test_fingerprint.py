"""Weights are told apart by their content, and by nothing else."""

from pathlib import Path

import pytest

from hone.launch.fingerprint import WHOLE_BYTES, fingerprint


def model(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_copy_has_the_same_fingerprint(tmp_path: Path) -> None:
    assert fingerprint(model(tmp_path / "a", b"1234")) == fingerprint(model(tmp_path / "b", b"1234"))


def test_other_weights_and_another_configuration_have_others(tmp_path: Path) -> None:
    first = model(tmp_path / "a", b"1234")
    before = fingerprint(first)
    assert fingerprint(model(tmp_path / "b", b"1235")) != before
    (first / "config.json").write_text('{"a": 1}')
    assert fingerprint(first) != before


@pytest.mark.parametrize("place", [0, -1])
def test_of_large_files_the_beginning_and_the_end_count(tmp_path: Path, place: int) -> None:
    weights = bytearray(WHOLE_BYTES + 1)
    before = fingerprint(model(tmp_path / "a", weights))
    weights[place] = 1
    assert fingerprint(model(tmp_path / "b", weights)) != before
