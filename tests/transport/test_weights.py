"""Weight broadcasts: what is published is what is read, whole, pruned, in a layout others read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hone.transport import weights

CONFIG = {"model_type": "llama", "hidden_size": 4}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(3, 4, 5, generator=generator)
    return {
        "norm": torch.randn(7, generator=generator),
        "scalar": torch.tensor(3.5),
        "expert.0": stack[0],
        "expert.1": stack[1],
        "transposed": stack[2].T,
        "half": torch.randn(3, 3, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 4),
        "counts": torch.arange(5),
    }


def test_what_is_published_is_read_bit_for_bit(tmp_path: Path) -> None:
    policy = weights.publish(tensors().items(), CONFIG, tmp_path, 3)
    found = load_file(Path(policy.folder) / weights.FILE)
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    policy = weights.publish(tensors().items(), CONFIG, tmp_path, 3)
    with safe_open(Path(policy.folder) / weights.FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors())
    assert json.loads((Path(policy.folder) / "config.json").read_text()) == CONFIG


def test_old_versions_are_dropped(tmp_path: Path) -> None:
    for version in range(6):
        weights.publish(tensors().items(), CONFIG, tmp_path, version, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000004", "v000005"]


def test_a_version_published_again_is_replaced(tmp_path: Path) -> None:
    weights.publish(tensors(0).items(), CONFIG, tmp_path, 1)
    policy = weights.publish(tensors(1).items(), CONFIG, tmp_path, 1)
    assert torch.equal(load_file(Path(policy.folder) / weights.FILE)["norm"], tensors(1)["norm"])
    assert [path.name for path in tmp_path.iterdir()] == ["v000001"]


def test_a_trainer_that_resumed_far_behind_keeps_what_it_has_just_published(tmp_path: Path) -> None:
    for version in range(10, 16):
        weights.publish(tensors().items(), CONFIG, tmp_path, version)
    for version in (5, 6):
        policy = weights.publish(tensors().items(), CONFIG, tmp_path, version)
        assert Path(policy.folder).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000006", "v000012", "v000013", "v000014", "v000015"]


def test_a_publication_that_dies_half_way_is_not_seen(tmp_path: Path) -> None:
    def dies():
        yield "norm", torch.zeros(3)
        raise KeyboardInterrupt

    weights.publish(tensors().items(), CONFIG, tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        weights.publish(dies(), CONFIG, tmp_path, 2)
    assert [path.name for path in tmp_path.glob("v*") if path.suffix != ".tmp"] == ["v000001"]
    weights.publish(tensors().items(), CONFIG, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000001", "v000002"]
