"""Checkpoints: whole or not there, the newest that is whole, pruned, with the optimizer's state."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hone.config.recipe import OptimizerSection
from hone.model.transformer import Transformer
from hone.trainer import checkpoint
from hone.trainer.checkpoint import Checkpoints, Progress, complete_checkpoints
from hone.trainer.losses import supervised_loss
from hone.trainer.optim import build_optimizers
from hone.trainer.ranks import Ranks
from hone.trainer.samples import Samples
from hone.trainer.step import Trainer, train_step

CPU = torch.device("cpu")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, ranks=Ranks.alone(CPU))


def fresh_trainer(model: Transformer, kind: str = "adamw") -> Trainer:
    again = Transformer(model.config).initialize(seed=9)
    section = OptimizerSection.model_validate({"kind": kind, "lr": 1e-2})
    return Trainer(again, build_optimizers(again, section), Ranks.alone(CPU), 64, 1.0)


def take_step(trainer: Trainer, samples: Samples) -> float:
    denominators = samples.denominators()
    return train_step(trainer, samples, lambda logprobs_T, _: supervised_loss(logprobs_T, denominators)).loss


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_trainer_takes_the_steps_that_the_saved_one_takes(
    model: Transformer, checkpoints: Checkpoints, random_samples: Callable[..., Samples], kind: str
) -> None:
    samples = random_samples(9, 20, 5)
    saved = fresh_trainer(model, kind)
    for _ in range(3):
        take_step(saved, samples)
    progress = Progress(3, 1, {"conversations": "abc", "batch_tokens": 5})
    checkpoints.save(saved, progress)
    expected = [take_step(saved, samples) for _ in range(3)]
    resumed = fresh_trainer(model, kind)
    take_step(resumed, samples)
    assert checkpoints.resume(resumed) == progress
    assert [take_step(resumed, samples) for _ in range(3)] == expected


def test_there_is_nothing_to_resume_at_first(checkpoints: Checkpoints, trainer: Trainer) -> None:
    assert checkpoints.resume(trainer) is None


def test_only_the_newest_are_kept(checkpoints: Checkpoints, trainer: Trainer) -> None:
    for step in (1, 2, 3):
        checkpoints.save(trainer, Progress(step))
    assert [path.name for path in sorted(checkpoints.folder.iterdir())] == ["step_000002", "step_000003"]


def truncate(path: Path) -> None:
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    data = next(path.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def remove_data(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def remove_commit(path: Path) -> None:
    (path / checkpoint.COMMIT).unlink()


def garble_commit(path: Path) -> None:
    (path / checkpoint.COMMIT).write_text("{")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove_data, remove_commit, garble_commit])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    checkpoints: Checkpoints, trainer: Trainer, damage: Callable[[Path], None]
) -> None:
    checkpoints.save(trainer, Progress(1))
    damage(checkpoints.save(trainer, Progress(2)))
    assert checkpoints.resume(trainer) == Progress(1)


def test_a_crash_while_saving_leaves_the_checkpoint_before(
    checkpoints: Checkpoints, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(trainer, Progress(1))

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_commit", dies)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(trainer, Progress(2))
    assert [path.name for path in complete_checkpoints(checkpoints.folder)] == ["step_000001"]
    assert checkpoints.resume(trainer) == Progress(1)
    checkpoints.save(trainer, Progress(2))
    assert checkpoints.resume(trainer) == Progress(2)


def test_saving_a_step_again_replaces_it(checkpoints: Checkpoints, trainer: Trainer) -> None:
    checkpoints.save(trainer, Progress(1, num_bad_steps=0))
    checkpoints.save(trainer, Progress(1, num_bad_steps=4))
    assert checkpoints.resume(trainer) == Progress(1, num_bad_steps=4)


def test_nothing_is_covered_until_as_many_are_kept_as_wanted(checkpoints: Checkpoints, trainer: Trainer) -> None:
    covered = []
    for step in (3, 6, 9):
        checkpoints.save(trainer, Progress(step))
        covered.append(checkpoints.covered())
    assert covered == [0, 3, 6]


def test_a_checkpoint_is_on_the_disk_before_it_appears(
    checkpoints: Checkpoints, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    target = checkpoints.folder / "step_000004"

    def fsync(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, target.exists()))

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    checkpoints.save(trainer, Progress(4))
    before = {name for name, is_there in flushed if not is_there}
    assert {path.name for path in target.iterdir()} | {"step_000004.tmp"} <= before
    assert flushed[-1] == ("checkpoints", True)
