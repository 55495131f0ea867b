import asyncio
import contextlib
import json

import msgspec
import pytest
from rich.console import Console

from fakes import ScriptedSampler
from hone.envs import (
    Environment,
    Limits,
    Rubric,
    SingleTurn,
    Task,
    Tasks,
    assistant,
    group_reward,
    metric,
    reward,
    user,
)
from hone.evals.evaluate import MIN_OUTAGE, Cell, Pending, Plan, complete, evaluate
from hone.evals.report import UNFINISHED, comparison_table, result_table
from hone.evals.results import Prices
from hone.evals.storage import Settings, read_outcomes, read_result, read_traces
from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, SamplingParameters, Turn

SAMPLING = SamplingParameters(max_tokens=8)


@reward
def exact(answer, reference):
    if answer == "crash":
        raise ValueError("crash")
    return answer == reference


@metric
def size(answer):
    return len(answer)


def make_task(number):
    return Task(prompt=(user(f"say {number}"),), reference=str(number))


def environment_of(count=10, version="1"):
    return SingleTurn(
        name="say",
        version=version,
        rubric=Rubric([exact, size]),
        train=[],
        held_out=Tasks(make_task, count),
        gold=lambda task: [assistant(task.reference)],
    )


def answer_even_ones(branch):
    """Right for even numbers, wrong for odd ones."""
    number = branch[-1].message.content.removeprefix("say ")
    return number if int(number) % 2 == 0 else "no"


async def run(sampler, environment=None, **arguments):
    settings = {"num_tasks": 10, "attempts": 2, "sampling": SAMPLING, "seed": 5} | arguments
    return await evaluate(environment or environment_of(), sampler, **settings)


async def test_scores_come_by_name_with_intervals():
    result = await run(ScriptedSampler(answer_even_ones), model="tiny")
    assert (result.environment, result.environment_version, result.model) == ("say", "1", "tiny")
    assert result.num_rollouts == 20
    assert result.reward.mean == result.score("exact").mean == 0.5
    assert result.reward.low < 0.5 < result.reward.high
    assert result.score("size").mean == 1.5
    assert {k: estimate.mean for k, estimate in result.pass_at.items()} == {1: 0.5, 2: 0.5}
    assert result.truncated.mean == 0
    assert result.completion_tokens.mean == 1.5
    assert result.failures == {}


async def test_failures_are_counted_by_class_and_leave_the_averages():
    sampler = ScriptedSampler(["crash", ConnectionError("gone"), "0"])
    result = await run(sampler, num_tasks=1, attempts=4, max_concurrent=1)
    assert result.failures == {"environment": 1, "model": 1}
    assert result.num_rollouts == 4
    assert result.reward.mean == 1
    assert set(result.pass_at) == {1, 2}


async def test_an_evaluation_that_fails_throughout_has_no_scores():
    result = await run(ScriptedSampler([ConnectionError("gone")]))
    assert (result.reward, result.pass_at, result.truncated) == (None, {}, None)
    assert result.failures == {"model": 20}


async def test_truncated_rollouts_are_scored_and_told():
    result = await run(ScriptedSampler(["123456789"]), num_tasks=4)
    assert result.truncated.mean == 1
    assert result.reward.mean == 0


async def test_no_more_than_max_concurrent_rollouts_run_at_once():
    sampler = ScriptedSampler(answer_even_ones, seconds=0.001)
    await run(sampler, max_concurrent=3)
    assert sampler.max_waiting == 3


async def test_the_first_different_held_out_tasks_are_taken():
    repeating = SingleTurn(
        name="say", rubric=Rubric([exact]), train=[], held_out=Tasks(lambda index: make_task(index // 3))
    )
    result = await run(ScriptedSampler(answer_even_ones), repeating, num_tasks=5)
    assert result.reward.num_tasks == 5
    few = await run(ScriptedSampler(answer_even_ones), environment_of(3), num_tasks=10)
    assert few.reward.num_tasks == 3


async def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path):
    whole = await run(ScriptedSampler(answer_even_ones))
    stopped = asyncio.create_task(
        run(ScriptedSampler(answer_even_ones, seconds=0.005), folder=tmp_path, max_concurrent=4)
    )
    while not (tmp_path / "traces.jsonl").exists() or len((tmp_path / "traces.jsonl").read_bytes().splitlines()) < 8:
        await asyncio.sleep(0.001)
    stopped.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopped
    num_kept = len(list(read_traces(tmp_path / "traces.jsonl")))
    sampler = ScriptedSampler(answer_even_ones)
    result = await run(sampler, folder=tmp_path)
    assert len(sampler.calls) == 20 - num_kept
    assert msgspec.structs.replace(result, seconds=0) == msgspec.structs.replace(whole, seconds=0)
    assert read_result(tmp_path) == result


async def test_a_finished_evaluation_is_not_run_again_but_may_grow(tmp_path):
    first = await run(ScriptedSampler(answer_even_ones), folder=tmp_path)
    sampler = ScriptedSampler(answer_even_ones)
    again = await run(sampler, folder=tmp_path)
    assert sampler.calls == []
    assert again.reward == first.reward
    grown = await run(sampler, folder=tmp_path, attempts=3)
    assert len(sampler.calls) == 10
    assert grown.num_rollouts == 30


async def test_failed_rollouts_run_again(tmp_path):
    failed = await run(ScriptedSampler([ConnectionError("gone")]), folder=tmp_path)
    assert failed.failures == {"model": 20}
    result = await run(ScriptedSampler(answer_even_ones), folder=tmp_path)
    assert result.failures == {}
    assert result.reward.mean == 0.5


@pytest.mark.parametrize("tear", [1, 40, -1])
async def test_a_torn_last_line_is_cut_off_and_its_rollout_runs_again(tmp_path, tear):
    await run(ScriptedSampler(answer_even_ones), folder=tmp_path)
    path = tmp_path / "traces.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:tear])
    sampler = ScriptedSampler(answer_even_ones)
    result = await run(sampler, folder=tmp_path)
    assert len(sampler.calls) == 1
    assert result.num_rollouts == 20
    assert len([json.loads(line) for line in path.read_bytes().splitlines()]) == 20


async def test_a_file_that_is_one_torn_line_is_emptied(tmp_path):
    (tmp_path / "traces.jsonl").write_bytes(b"x" * 200_000)
    result = await run(ScriptedSampler(answer_even_ones), folder=tmp_path)
    assert result.num_rollouts == 20
    assert len(list(read_traces(tmp_path / "traces.jsonl"))) == 20


async def test_unreadable_lines_are_passed_over_and_told(tmp_path, caplog):
    await run(ScriptedSampler(answer_even_ones), folder=tmp_path)
    path = tmp_path / "traces.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([b"{}\n", *lines[1:]]))
    sampler = ScriptedSampler(answer_even_ones)
    await run(sampler, folder=tmp_path)
    assert len(sampler.calls) == 1
    assert "1 unreadable line" in caplog.text


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 6}, "seed"),
        ({"model": "other"}, "model"),
        ({"sampling": SamplingParameters(max_tokens=9)}, "sampling"),
        ({"environment": environment_of(version="2")}, "environment_version"),
        ({"limits": Limits(max_tokens=5)}, "budgets"),
    ],
)
async def test_a_folder_of_another_evaluation_is_refused(tmp_path, change, name):
    await run(ScriptedSampler(answer_even_ones), folder=tmp_path)
    with pytest.raises(ValueError, match=f"{name} = .* use another folder"):
        await run(ScriptedSampler(answer_even_ones), folder=tmp_path, **change)


async def test_another_deadline_goes_on_with_what_is_there(tmp_path):
    await run(ScriptedSampler(answer_even_ones), folder=tmp_path)
    sampler = ScriptedSampler(answer_even_ones)
    await run(sampler, folder=tmp_path, limits=Limits(deadline_seconds=5))
    assert sampler.calls == []


def test_the_fingerprint_of_settings_tells_all_of_them_apart():
    base = Settings("e", "1", "m", SAMPLING, 0)
    changes = [
        {"environment": "f"}, {"environment_version": "2"}, {"model": "n"}, {"sampling": SamplingParameters()}, {"seed": 1},
        {"arguments": {"a": 1}}, {"budgets": {"max_turns": 2}}, {"source": "s"},
    ]  # fmt: skip
    assert len({s.fingerprint for s in [base, *(msgspec.structs.replace(base, **change) for change in changes)]}) == 9
    assert base.fingerprint == Settings("e", "1", "m", SAMPLING, 0).fingerprint


async def test_progress_is_told_after_each_rollout(tmp_path):
    seen = []
    await run(
        ScriptedSampler(answer_even_ones),
        folder=tmp_path,
        progress=lambda p: seen.append((p.num_done, p.num_total, p.num_failed)),
    )
    assert seen == [(number, 20, 0) for number in range(1, 21)]
    resumed = []
    await run(
        ScriptedSampler(answer_even_ones),
        folder=tmp_path,
        attempts=3,
        progress=lambda p: resumed.append((p.num_done, round(p.mean_reward, 6))),
    )
    assert resumed[0][0] == 21
    assert resumed[-1] == (30, 0.5)


async def test_equal_settings_give_equal_seeds_and_other_attempts_others():
    one, other = ScriptedSampler(answer_even_ones), ScriptedSampler(answer_even_ones)
    await run(one)
    await run(other, max_concurrent=1)
    assert {s.seed for _, s in one.calls} == {s.seed for _, s in other.calls}
    assert len({s.seed for _, s in one.calls}) == 20


async def test_a_hanging_environment_costs_its_rollouts_only():
    class Hangs(Environment):
        async def run(self, rollout):
            await rollout.turn()
            if rollout.task.reference == "3":
                await asyncio.sleep(60)

    environment = Hangs(name="hangs", rubric=Rubric([exact]), train=[], held_out=Tasks(make_task, 10))
    result = await run(ScriptedSampler(answer_even_ones), environment, limits=Limits(deadline_seconds=0.05))
    assert result.failures == {"timeout": 2}
    assert result.reward.num_tasks == 9


async def test_only_failures_or_only_what_is_missing_may_be_run(tmp_path):
    sampler = ScriptedSampler(lambda branch: ConnectionError("gone") if "3" in branch[-1].message.content else "no")
    await run(sampler, folder=tmp_path, num_tasks=6)
    answering = ScriptedSampler(answer_even_ones)
    missing = await run(answering, folder=tmp_path, num_tasks=8, pending=Pending.MISSING)
    assert len(answering.calls) == 4
    assert missing.failures == {"model": 2}
    failed = await run(answering, folder=tmp_path, num_tasks=10, pending=Pending.FAILED)
    assert len(answering.calls) == 6
    assert (failed.failures, failed.num_rollouts, failed.num_wanted) == ({}, 16, 20)
    assert failed.shortcoming == "4 of 20 rollouts are missing"


async def test_a_failure_never_replaces_a_valid_result(tmp_path):
    good = await run(ScriptedSampler(["0"]), folder=tmp_path, num_tasks=1, attempts=1)
    line = (tmp_path / "traces.jsonl").read_bytes()
    await run(ScriptedSampler([ConnectionError("gone")]), folder=tmp_path / "other", num_tasks=1, attempts=1)
    (tmp_path / "traces.jsonl").write_bytes(line + (tmp_path / "other" / "traces.jsonl").read_bytes())
    again = await run(ScriptedSampler(["no"]), folder=tmp_path, num_tasks=1, attempts=1)
    assert again.reward == good.reward
    (tmp_path / "outcomes.jsonl").unlink()
    assert [outcome.is_solved for outcome in read_outcomes(tmp_path)] == [True]


async def test_traces_of_other_settings_are_passed_over_wherever_they_come_from(tmp_path, caplog):
    await run(ScriptedSampler(["no"]), folder=tmp_path / "other", seed=6)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "traces.jsonl").write_bytes((tmp_path / "other" / "traces.jsonl").read_bytes())
    sampler = ScriptedSampler(answer_even_ones)
    result = await run(sampler, folder=tmp_path / "own")
    assert len(sampler.calls) == 20
    assert result.reward.mean == 0.5
    assert "passed over 20 traces that were made with other settings" in caplog.text


async def test_an_evaluation_under_way_has_no_result(tmp_path):
    await run(ScriptedSampler(answer_even_ones), folder=tmp_path, attempts=1)
    seen = []
    await run(
        ScriptedSampler(answer_even_ones),
        folder=tmp_path,
        attempts=2,
        progress=lambda _: seen.append((tmp_path / "result.json").exists()),
    )
    assert seen == [False] * 10
    assert read_result(tmp_path).num_rollouts == 20
    assert len(read_outcomes(tmp_path)) == 20


async def test_two_processes_do_not_evaluate_into_one_folder(tmp_path):
    plan = Plan(environment_of(), 2, folder=tmp_path)
    with Cell(plan), pytest.raises(ValueError, match="another process evaluates in"), Cell(plan):
        pass


async def test_outcomes_are_kept_when_an_evaluation_is_interrupted(tmp_path):
    plan = Plan(environment_of(), 2, folder=tmp_path)
    sampler = ScriptedSampler(["0"])
    with contextlib.suppress(KeyboardInterrupt), Cell(plan) as cell:
        await cell.attempt(*cell.pending()[0], sampler)
        raise KeyboardInterrupt
    assert not (tmp_path / "result.json").exists()
    assert [outcome.is_solved for outcome in read_outcomes(tmp_path)] == [True]


async def test_tokens_are_counted_and_paid_for_failed_rollouts_too(tmp_path):
    turns = [
        Turn(
            Message("assistant", said),
            FinishReason.STOP,
            num_prompt_tokens=100,
            num_completion_tokens=10,
            num_cached_tokens=40,
        )
        for said in ("crash", "0")
    ]
    plan = Plan(environment_of(), 1, 2, folder=tmp_path, prices=Prices(prompt=3, completion=15, cached=1))
    with Cell(plan) as cell:
        await complete([cell], ScriptedSampler(turns), max_concurrent=1)
        assert cell.cost == pytest.approx((120 * 3 + 80 * 1 + 20 * 15) / 1e6)
        [message] = cell.failure_messages()
        assert message.startswith("environment: reward exact: ValueError: crash")
    with Cell(plan) as cell:
        await complete([cell], ScriptedSampler(turns[1:]), max_concurrent=1)
        result = cell.conclude()
    assert (result.usage.prompt, result.usage.cached, result.usage.completion) == (300, 120, 30)
    assert result.failures == {}
    assert result.cost == cell.cost


async def test_too_many_failures_are_a_shortcoming():
    def answer(branch):
        return ConnectionError("gone") if branch[-1].message.content == "say 3" else "no"

    result = await run(ScriptedSampler(answer), attempts=1)
    assert result.shortcoming == "1 of 10 rollouts failed, more than 5%"
    assert UNFINISHED in printed(result_table(result))
    assert UNFINISHED in printed(comparison_table({"it": result}))
    assert msgspec.structs.replace(result, max_failed_share=0.1).shortcoming is None


async def test_the_cells_of_a_model_share_its_places():
    one, other = (Cell(Plan(environment_of(6), 6)) for _ in range(2))
    sampler = ScriptedSampler(answer_even_ones, seconds=0.001)
    seen = []
    await complete([one, other], sampler, max_concurrent=4, progress=lambda cell: seen.append(cell is one))
    assert sampler.max_waiting == 4
    assert (one.progress.num_done, other.progress.num_done) == (6, 6)
    assert seen[:2] == [True, True]


async def test_nothing_more_begins_during_an_outage_of_the_model(tmp_path):
    gone = ScriptedSampler([ConnectionError("gone")])
    result = await run(gone, environment_of(100), num_tasks=100, attempts=1, max_concurrent=4, folder=tmp_path)
    assert MIN_OUTAGE <= len(gone.calls) < MIN_OUTAGE + 4
    assert result.shortcoming == f"{100 - len(gone.calls)} of 100 rollouts are missing"
    again = await run(
        ScriptedSampler(answer_even_ones), environment_of(100), num_tasks=100, attempts=1, folder=tmp_path
    )
    assert (again.shortcoming, again.reward.mean) == (None, 0.5)


async def test_failures_among_answers_are_no_outage():
    def answer(branch):
        return "no" if branch[-1].message.content.endswith("0") else ConnectionError("gone")

    result = await run(ScriptedSampler(answer), environment_of(100), num_tasks=100, attempts=1, max_concurrent=4)
    assert (result.num_rollouts, result.num_failed) == (100, 90)


async def test_an_environment_that_cannot_tell_what_is_solved_costs_the_rollout_only():
    class Unsure(SingleTurn):
        def is_solved(self, trace):
            raise KeyError("reference")

    environment = Unsure(name="unsure", rubric=Rubric([exact]), train=[], held_out=Tasks(make_task, 2))
    assert (await run(ScriptedSampler(["1"]), environment)).failures == {"environment": 4}


async def test_an_environment_that_gives_no_task_is_told():
    def make(index):
        if index == 1:
            raise OSError("no such file")
        return make_task(index)

    environment = SingleTurn(name="broken", rubric=Rubric([exact]), train=[], held_out=Tasks(make, 3))
    with pytest.raises(ValueError, match="gives no held-out task 1: OSError"):
        await run(ScriptedSampler(["1"]), environment)


@pytest.mark.parametrize("wrong", [{"num_tasks": 0}, {"attempts": 0}, {"max_concurrent": 0}])
async def test_counts_must_be_positive(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        await run(ScriptedSampler(["1"]), **wrong)


async def test_an_environment_without_held_out_tasks_is_refused():
    with pytest.raises(ValueError, match="no held-out tasks"):
        await run(ScriptedSampler(["1"]), environment_of(0))


def printed(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


async def test_the_tables_show_scores_intervals_and_failures(tmp_path):
    good = await run(ScriptedSampler(answer_even_ones), model="tiny")
    bad = await run(ScriptedSampler([ConnectionError("gone")]), model="tiny")
    shown = printed(result_table(good))
    assert "say 1 · tiny" in shown
    assert "avg@2" in shown
    assert "0.500" in shown
    assert "pass@2" in shown
    assert "failed: model" in printed(result_table(bad))
    both = printed(comparison_table({"base": bad, "after RL": good}))
    assert "after RL" in both
    assert "20 of 20" in both


@group_reward
def first_of_all(traces):
    """1 for the lowest attempt of those that did not fail, and how many these are besides."""
    return [float(trace.attempt == min(t.attempt for t in traces)) + 10 * len(traces) for trace in traces]


TOGETHER = SingleTurn(
    name="together",
    rubric=Rubric([first_of_all]),
    train=[],
    held_out=Tasks(lambda index: Task(prompt=(user(str(index)),)), count=2),
)


async def test_attempts_that_are_scored_together_run_together(tmp_path):
    result = await evaluate(TOGETHER, ScriptedSampler(["yes"]), num_tasks=2, attempts=3, folder=tmp_path)
    assert result.reward.mean == pytest.approx(30 + 1 / 3)
    sampler = ScriptedSampler(["yes"])
    grown = await evaluate(TOGETHER, sampler, num_tasks=2, attempts=4, folder=tmp_path)
    assert len(sampler.calls) == 8
    assert grown.reward.mean == pytest.approx(40 + 1 / 4)


async def test_a_group_with_failures_runs_again_whole_and_the_fuller_one_counts(tmp_path):
    broken = ScriptedSampler(["yes", ConnectionError("gone"), "yes", "yes"])
    result = await evaluate(TOGETHER, broken, num_tasks=1, attempts=3, folder=tmp_path)
    assert (result.num_failed, result.reward.mean) == (1, pytest.approx(20 + 1 / 2))
    worse = ScriptedSampler(["yes", ConnectionError("gone")])
    result = await evaluate(TOGETHER, worse, num_tasks=1, attempts=3, folder=tmp_path)
    assert len(worse.calls) == 3
    assert (result.num_failed, result.reward.mean) == (1, pytest.approx(20 + 1 / 2))
    result = await evaluate(TOGETHER, ScriptedSampler(["yes"]), num_tasks=1, attempts=3, folder=tmp_path)
    assert (result.num_failed, result.reward.mean) == (0, pytest.approx(30 + 1 / 3))


async def test_a_group_whose_end_is_missing_runs_again_whole(tmp_path):
    await evaluate(TOGETHER, ScriptedSampler(["yes"]), num_tasks=2, attempts=3, folder=tmp_path)
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    sampler = ScriptedSampler(["yes"])
    result = await evaluate(TOGETHER, sampler, num_tasks=2, attempts=3, folder=tmp_path)
    assert len(sampler.calls) == 3
    assert result.reward.mean == pytest.approx(30 + 1 / 3)
