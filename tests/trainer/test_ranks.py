"""One rank and two, started by torchrun: the same curves, and checkpoints that move between them."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hone.config.load import load_recipe, save_recipe
from hone.model.checkpoint import load_model
from hone.observability.metrics import read_metrics
from hone.trainer import sft
from hone.trainer.checkpoint import complete_checkpoints
from hone.trainer.start import run_process
from hone.transport.folders import RunFolder

pytestmark = pytest.mark.slow

RunFolders = Callable[..., RunFolder]


def fine_tune(folder: RunFolder, num_ranks: int) -> None:
    recipe = load_recipe(folder.config)
    trainer = recipe.trainer.model_copy(update={"num_ranks": num_ranks})
    save_recipe(recipe.model_copy(update={"trainer": trainer}), folder.config)
    if num_ranks == 1:
        assert run_process(sft.fine_tune, [str(folder.path)]) == 0
    else:
        under_torchrun("hone.trainer.sft", folder, num_ranks)


def under_torchrun(module: str, folder: RunFolder, num_ranks: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    rendezvous = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command = [*launcher, *rendezvous, "-m", module, str(folder.path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def curve(folder: RunFolder, metric: str = "sft/loss") -> list[float]:
    return [float(line[metric]) for line in read_metrics(folder.metrics) if metric in line]


def assert_equal_exports(one: Path, other: Path) -> None:
    expected = load_model(other).state_dict()
    for name, tensor in load_model(one).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_two_ranks_give_the_loss_curve_of_one(run_folder: RunFolders, kind: str) -> None:
    # The micro-batch budget cuts a step into several micro-batches, so that ranks also get unequal numbers of samples.
    sections = {"sft": {"max_steps": 5, "optimizer": {"kind": kind, "lr": 2e-3}}, "trainer": {"micro_batch_tokens": 64}}
    one, two = run_folder("one", **sections), run_folder("two", **sections)
    fine_tune(one, 1)
    fine_tune(two, 2)
    assert curve(two) == pytest.approx(curve(one), rel=1e-5)
    assert curve(two, "sft/grad_norm") == pytest.approx(curve(one, "sft/grad_norm"), rel=1e-4)
    assert_equal_exports(two.sft_export, one.sft_export)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_is_resumed_at_another_number_of_ranks(run_folder: RunFolders, before: int, after: int) -> None:
    sections = {"sft": {"max_steps": 6, "optimizer": {"lr": 2e-3}}}
    whole, moved = run_folder("whole", **sections), run_folder("moved", **sections, trainer={"checkpoint_every": 3})
    fine_tune(whole, 1)
    fine_tune(moved, before)
    forget_the_second_half(moved)
    fine_tune(moved, after)
    assert curve(moved)[6:] == pytest.approx(curve(whole)[3:], rel=1e-5)
    assert_equal_exports(moved.sft_export, whole.sft_export)


def forget_the_second_half(folder: RunFolder) -> None:
    import shutil

    shutil.rmtree(folder.sft_export)
    half, end = complete_checkpoints(folder.sft_checkpoints)
    assert (half.name, end.name) == ("step_000003", "step_000006")
    shutil.rmtree(end)


def test_bfloat16_computes_with_float32_weights(run_folder: RunFolders) -> None:
    sections = {"sft": {"epochs": 3.0, "optimizer": {"lr": 5e-3}}}
    exact = run_folder("exact", **sections)
    rounded = run_folder("rounded", **sections, trainer={"autocast": "bfloat16"})
    fine_tune(exact, 1)
    fine_tune(rounded, 1)
    assert curve(rounded) != curve(exact)
    assert curve(rounded)[-1] == pytest.approx(curve(exact)[-1], rel=0.1)
    assert load_model(rounded.sft_export).embedding.dtype == torch.float32
