"""Whether a stage has work left, and whether an evaluation has been made."""

from pathlib import Path

import msgspec
import pytest

from hone.config.load import recipe_from
from hone.config.recipe import Recipe
from hone.evals.evaluate import Cell, Plan
from hone.evals.results import Outcome, summarise
from hone.launch import stages as stages_module
from hone.launch.console import StageConsole
from hone.launch.evaluations import finished, plans_of, set_other_settings_aside
from hone.launch.plan import ProcessPlan
from hone.launch.stages import Stages, note_finished_steps
from hone.launch.supervise import Supervisor
from hone.transport.folders import RunFolder


def recipe(folder: Path, evaluation: dict[str, object] | None = None, **rl: object) -> Recipe:
    return recipe_from(
        {
            "run": {"folder": str(folder.parent), "name": folder.name},
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"vocab_size": 64, "chat_template": "chatml"},
            "environments": [{"name": "reverse_text"}],
            "evaluation": {"num_tasks": 4} | (evaluation or {}),
            "rl": rl,
        },
        "test",
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of what the supervisor was asked to run."""
    found: list[list[str]] = []

    async def run(self: Supervisor, plans: list[ProcessPlan]) -> None:
        found.append([plan.name for plan in plans])

    monkeypatch.setattr(stages_module.Supervisor, "run", run)
    return found


def trained(folder: Path, num_steps: int) -> RunFolder:
    """A run that has ended, with its evaluation."""
    run = RunFolder(folder)
    for path in (run.model, run.export, run.checkpoint_of(num_steps), run.evals / "rl"):
        path.mkdir(parents=True)
    (run.model / "config.json").write_text("{}")
    return run


async def rl(folder: Path, **section: object) -> None:
    await Stages(recipe(folder, **section), folder, StageConsole()).rl()


async def test_a_finished_run_is_not_trained_again(tmp_path: Path, started: list[list[str]]) -> None:
    trained(tmp_path, 150)
    await rl(tmp_path, num_steps=150)
    assert started == []


async def test_a_finished_run_goes_on_when_more_steps_are_asked(tmp_path: Path, started: list[list[str]]) -> None:
    run = trained(tmp_path, 150)
    await rl(tmp_path, num_steps=200)
    assert len(started) == 1
    assert not run.export.exists()
    assert (tmp_path / "export-step_000150").is_dir()
    assert (run.evals / "rl-step_000150").is_dir()


async def test_a_run_that_reached_its_goal_early_is_over(tmp_path: Path, started: list[list[str]]) -> None:
    run = trained(tmp_path, 80)
    note_finished_steps(run, 150)
    await rl(tmp_path, num_steps=150)
    assert started == []
    await rl(tmp_path, num_steps=151)
    assert len(started) == 1


def asked(folder: Path, evaluation: dict[str, object] | None = None, source: str = "weights") -> dict[str, Plan]:
    return plans_of(recipe(folder, evaluation), RunFolder(folder), "rl", model="rl", source=source)


def evaluated(folder: Path) -> RunFolder:
    """A run with a result that was made as `asked` asks."""
    run = RunFolder(folder)
    for plan in asked(folder).values():
        with Cell(plan) as cell:
            outcomes = [Outcome(task.key, attempt) for task, attempt in cell.pending()]
        result = summarise(outcomes, environment="reverse_text", attempts=plan.attempts)
        (run.evals / "rl" / "reverse_text" / "result.json").write_bytes(msgspec.json.encode(result))
    return run


def test_an_evaluation_that_was_made_as_asked_is_read(tmp_path: Path) -> None:
    evaluated(tmp_path)
    assert finished(asked(tmp_path)).keys() == {"reverse_text"}


@pytest.mark.parametrize(
    "changed",
    [{"num_tasks": 2, "num_attempts": 2}, {"num_tasks": 3}, {"sampling": {"temperature": 0.5}}],
    ids=["attempts", "tasks", "sampling"],
)
def test_an_evaluation_that_was_made_otherwise_is_made_again(tmp_path: Path, changed: dict[str, object]) -> None:
    evaluated(tmp_path)
    assert finished(asked(tmp_path, changed)) == {}


def test_an_evaluation_of_other_weights_is_made_again(tmp_path: Path) -> None:
    evaluated(tmp_path)
    assert finished(asked(tmp_path, source="other weights")) == {}


def test_results_of_other_settings_are_kept_under_another_name(tmp_path: Path) -> None:
    run = evaluated(tmp_path)
    set_other_settings_aside(asked(tmp_path, {"num_tasks": 2}), run.evals / "rl")
    assert (run.evals / "rl").is_dir()
    set_other_settings_aside(asked(tmp_path, {"sampling": {"temperature": 0.5}}), run.evals / "rl")
    assert not (run.evals / "rl").exists()
    assert (run.evals / "rl-1" / "reverse_text" / "result.json").is_file()
