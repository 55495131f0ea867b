import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hone.model import checkpoint

SCRIPT = Path(__file__).with_name("two_ranks.py")


def load_script():
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world_size, folder, out):
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(world_size), port, folder, out],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(outputs)
    return torch.load(out)


@pytest.fixture
def model(glm4_moe, random_model):
    return random_model(glm4_moe)


def test_two_ranks_give_the_losses_gradients_and_state_of_one(model, tmp_path):
    checkpoint.save_model(model, model.config, tmp_path / "model")
    script = load_script()

    sharded = run_ranks(2, tmp_path / "model", tmp_path / "out.pt")

    loss = script.loss_of(model, 0) + script.loss_of(model, 1)
    loss.backward()
    expected = (loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()})
    assert sharded["counts"] == {1: 28, 2: 28}
    torch.testing.assert_close(sharded["scored"], loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sharded["step"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sharded["recomputed"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sharded["in_bfloat16"], loss.detach(), rtol=0.02, atol=0)
    torch.testing.assert_close(sharded["state"], script.snapshot(model), rtol=0, atol=0)
    torch.testing.assert_close(sharded["reloaded"], script.snapshot(model), rtol=0, atol=0)
    torch.testing.assert_close(sharded["drawn"], script.snapshot(model.initialize(seed=5)), rtol=0, atol=0)
