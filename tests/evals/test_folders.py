"""Results found on disk: which compare, and what an unfinished one is taken for."""

import pytest

from fakes import ScriptedSampler
from hone.envs import Rubric, SingleTurn, Task, reward, user
from hone.evals.evaluate import Cell, Plan, complete
from hone.evals.folders import find_cells, is_comparable, shared_environments, two_models


@reward
def correct(answer, reference):
    return float(answer == reference)


def environment_of(name="say", version="1"):
    tasks = [Task((user(f"say {n}"),), str(n)) for n in range(4)]
    return SingleTurn(name=name, version=version, rubric=Rubric([correct]), train=[], held_out=tasks)


async def evaluated(folder, environment=None, answers=("0",), **plan):
    with Cell(Plan(environment or environment_of(), 4, 2, folder=folder, model=folder.parent.name, **plan)) as cell:
        await complete([cell], ScriptedSampler(list(answers)), max_concurrent=1)
        cell.conclude()


async def test_cells_are_found_at_any_depth_and_named_by_their_folders(tmp_path):
    for model in ("a", "b"):
        await evaluated(tmp_path / "evals" / model / "say")
    for folder, count in ((tmp_path, 2), (tmp_path / "evals" / "a", 1), (tmp_path / "evals" / "a" / "say", 1)):
        cells = find_cells(folder)
        assert len(cells) == count
        assert (cells[0].model, cells[0].environment, cells[0].shortcoming) == ("a", "say", None)
    assert two_models(tmp_path) == (tmp_path / "evals" / "a", tmp_path / "evals" / "b")
    with pytest.raises(ValueError, match="holds 1 models"):
        two_models(tmp_path / "evals" / "a")


async def test_prompts_and_failures_are_read_from_the_traces(tmp_path):
    await evaluated(tmp_path / "m" / "say", answers=[ConnectionError("gone"), "0"])
    [cell] = find_cells(tmp_path)
    assert sorted(cell.prompts().values()) == ["say 0", "say 1", "say 2", "say 3"]
    [message] = cell.failure_messages()["model"]
    assert "gone" in message


async def test_an_unfinished_cell_tells_what_is_there(tmp_path):
    plan = Plan(environment_of(), 4, 2, folder=tmp_path / "m" / "say")
    with Cell(plan) as cell:
        for task, attempt in cell.pending()[:3]:
            await cell.attempt(task, attempt, ScriptedSampler(["0"]))
    [found] = find_cells(tmp_path)
    assert found.shortcoming == "it was interrupted, or still runs"
    assert found.result.num_rollouts == 3
    assert sum(outcome.is_solved for outcome in found.outcomes) == 2


async def test_environments_that_both_have_are_paired(tmp_path):
    for model, names in (("a", ("one", "two")), ("b", ("two", "three"))):
        for name in names:
            await evaluated(tmp_path / model / name, environment_of(name))
    pairs = shared_environments(find_cells(tmp_path / "a"), find_cells(tmp_path / "b"))
    assert list(pairs) == ["two"]
    await evaluated(tmp_path / "c" / "four", environment_of("four"))
    with pytest.raises(ValueError, match="nothing to compare: one has one, two, the other four"):
        shared_environments(find_cells(tmp_path / "a"), find_cells(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"holds several models \(a, b, c\)"):
        shared_environments(find_cells(tmp_path), find_cells(tmp_path / "a"))


async def test_two_folders_of_one_environment_each_compare_whatever_they_are_called(tmp_path):
    await evaluated(tmp_path / "before" / "say")
    await evaluated(tmp_path / "after" / "say again", answers=["1"])
    pairs = shared_environments(find_cells(tmp_path / "before"), find_cells(tmp_path / "after"))
    assert list(pairs) == ["say"]


@pytest.mark.parametrize("change", [{"environment": environment_of(version="2")}, {"arguments": {"a": 1}}])
async def test_other_questions_do_not_compare(tmp_path, change):
    await evaluated(tmp_path / "a" / "say")
    await evaluated(tmp_path / "b" / "say", **change)
    [one], [other] = find_cells(tmp_path / "a"), find_cells(tmp_path / "b")
    assert not is_comparable(one, other)
    with pytest.raises(ValueError, match="their scores do not compare"):
        shared_environments([one], [other])


def test_a_folder_without_results_is_told(tmp_path):
    with pytest.raises(ValueError, match="no evaluation in"):
        find_cells(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        find_cells(tmp_path / "absent")
