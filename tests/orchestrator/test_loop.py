"""The orchestrator end to end: real sockets, ledger and files; engine, env worker and trainer are fakes."""

import asyncio
import errno
import json
import random
import runpy
import socket
import sqlite3
import sys
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from hone.config.load import ConfigError
from hone.envs import Rubric, SingleTurn, Task, Tasks, group_reward, reward, user
from hone.observability.metrics import read_metrics
from hone.orchestrator.audit import audit
from hone.orchestrator.engine import WeightsRefusedError
from hone.orchestrator.errors import HopelessError
from hone.orchestrator.ledger import Ledger, LedgerError
from hone.orchestrator.loop import main
from hone.schema.rollouts import Farewell, RolloutResult
from hone.schema.sampling import Answers, FinishReason, Generated, GenerateMany, VersionRun
from hone.schema.traces import Failure, FailureClass, Trace
from hone.schema.wire import PROTOCOL, Envelope, Wire
from hone.text.training import train_tokenizer
from hone.transport.addresses import PortInUseError
from hone.transport.traces import read_traces

SECONDS = 30
PROCESS = Path(__file__).parent / "orchestrator_process.py"


def failed(request, attempt, kind=FailureClass.SANDBOX):
    return Trace(request.environment, request.task, attempt, group=request.group, failure=Failure(kind, "here", "no"))


async def finish(run):
    async with asyncio.timeout(SECONDS):
        await run.orchestrate()


def make_together(make_run, rl=None, **sections):
    """A run whose groups are scored together."""

    @group_reward
    def best(answers):
        return [1.0] * len(answers)

    run = make_run(rl, **sections)
    run.environments = {"digits": runpy.run_path(str(PROCESS))["digits"](best)}
    return run


def sizes(worker):
    return {(request.group.partition("-")[0] == "eval", tuple(request.attempts)) for request in worker.requests}


def finished_of_batched_groups(run):
    """How many attempts of each batched group have a reward."""
    with sqlite3.connect(run.folder.ledger) as database:
        return [
            count
            for (count,) in database.execute(
                "SELECT SUM(a.state = 'finished') FROM attempts a JOIN groups g ON g.number = a.number"
                " WHERE g.state = 'batched' GROUP BY g.number"
            )
        ]


def batch_lines(run):
    return [line for line in read_metrics(run.folder.metrics) if "batch/reward_mean" in line]


async def test_a_run_trains_every_step_and_ends(make_run):
    run = make_run()
    async with run.world() as (engine, worker, trainer):
        await finish(run)
        assert sorted(trainer.batches) == [1, 2, 3, 4]
        assert max(staleness for staleness, _ in trainer.batches.values()) <= 1
        assert engine.version == 4
        async with asyncio.timeout(SECONDS):
            while not worker.is_over:
                await asyncio.sleep(0.01)
    result = audit(run.folder.path)
    assert result.is_clean
    assert result.num_trained >= 4 * 8
    assert [line["step"] for line in batch_lines(run)] == [1, 2, 3, 4]
    assert list(run.folder.batches.iterdir()) == []


async def test_without_staleness_generation_and_training_alternate(make_run):
    run = make_run({"max_staleness": 0, "num_steps": 5})
    async with run.world() as (_, worker, trainer):
        worker.seconds = lambda dice: dice.random() * 0.01
        await finish(run)
        assert {staleness for staleness, _ in trainer.batches.values()} == {0}


async def test_the_bound_holds_with_stragglers_and_a_slow_engine(make_run):
    run = make_run({"max_staleness": 2, "num_steps": 12})
    async with run.world() as (engine, worker, trainer):
        engine.load_seconds = 0.02
        worker.seconds = lambda dice: 0.3 if dice.random() < 0.05 else 0.001
        await finish(run)
        assert max(staleness for staleness, _ in trainer.batches.values()) <= 2
    assert audit(run.folder.path).is_clean


async def test_updates_wait_for_rollouts_when_they_may_not_be_in_flight(make_run):
    run = make_run({"in_flight_updates": False, "max_staleness": 3, "num_steps": 6})
    async with run.world() as (_, worker, trainer):
        worker.seconds = lambda dice: dice.random() * 0.02
        await finish(run)
        for _, content in trainer.batches.values():
            assert content
    frames = audit(run.folder.path)
    assert frames.is_clean


async def test_failures_are_tried_again_and_never_rewards(make_run):
    run = make_run({"num_steps": 3})
    async with run.world() as (_, worker, trainer):
        worker.outcome = lambda request, attempt: failed(request, attempt) if worker.dice.random() < 0.2 else None
        await finish(run)
        rewards = [reward for _, content in trainer.batches.values() for _, reward, _ in content]
        assert set(rewards) <= {0.0, 1.0}
    assert sum(
        line["rollout/failed_sandbox_count"] for line in batch_lines(run) if "rollout/failed_sandbox_count" in line
    )
    assert audit(run.folder.path).is_clean


async def test_a_rollout_without_tokens_is_a_failure(make_run):
    run = make_run({"num_steps": 1}, retries={"environment": 1})
    async with run.world() as (_, worker, trainer):

        def empty(request, attempt):
            if attempt:
                return None
            return Trace(request.environment, request.task, attempt, group=request.group, rewards={})

        worker.outcome = empty
        await finish(run)
        assert all(len(content) <= 2 * 3 for _, content in trainer.batches.values())
    [line] = batch_lines(run)
    assert line["rollout/failed_environment_count"] >= 2
    assert line["rollout/again_count"] >= 1
    assert line["rollout/given_up_environment_count"] >= 1


async def test_an_environment_that_always_raises_ends_the_run_with_what_it_said(make_run, monkeypatch):
    monkeypatch.setattr("hone.orchestrator.requests.RETRY_SECONDS", 0.001)
    run = make_run({"num_steps": 1})
    async with run.world() as (_, worker, _):
        worker.outcome = lambda request, attempt: failed(request, attempt, FailureClass.ENVIRONMENT)
        with pytest.raises(ValueError, match="environment at here: no"):
            await finish(run)


async def test_evaluations_are_interleaved_and_the_last_version_is_evaluated(make_run):
    run = make_run({"num_steps": 5}, evaluation={"every": 2, "num_tasks": 3, "num_attempts": 2, "max_concurrent": 2})
    async with run.world(seconds=0.05) as (_, worker, _):
        await finish(run)
        groups = {request.group for request in worker.requests if request.group.startswith("eval-000005")}
        assert len(groups) == 3
    names = sorted(path.name for path in run.folder.evals.iterdir())
    assert names[-1] == "v000005.json"
    report = json.loads((run.folder.evals / "v000005.json").read_text())
    assert (report["min_version"], report["max_version"]) == (5, 5)
    assert report["environments"]["digits"]["num_rollouts"] == 6
    lines = [line for line in read_metrics(run.folder.metrics) if "eval/digits/reward_mean" in line]
    assert {"eval/digits/reward_exact_mean", "eval/digits/metric_length_mean", "eval/digits/solved_mean"} <= {
        *lines[-1]
    }


async def test_a_good_enough_evaluation_ends_training_early(make_run):
    run = make_run({"num_steps": 1000, "stop_at_reward": 0.0}, evaluation={"every": 2, "num_tasks": 2})
    async with run.world(seconds=0.01) as (_, _, trainer):
        await finish(run)
        assert trainer.last_step < 1000
    assert audit(run.folder.path).is_clean


async def test_a_worker_that_dies_costs_nothing_but_time(make_run):
    run = make_run({"num_steps": 6})
    async with run.world() as (_, worker, trainer):
        worker.seconds = lambda dice: 0.02
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(run))
            await asyncio.sleep(0.5)
            await worker.__aexit__()
            worker.pid += 1
            await worker.__aenter__()
        assert sorted(trainer.batches) == [1, 2, 3, 4, 5, 6]
    assert audit(run.folder.path).is_clean


WHOLE = {(False, (0, 1, 2, 3)), (True, (0, 1, 2))}


async def test_groups_that_are_scored_together_go_to_one_worker_whole_also_after_a_death(make_run):
    run = make_together(make_run, {"num_steps": 6}, evaluation={"every": 3, "num_tasks": 2, "num_attempts": 3})
    async with run.world() as (engine, worker, trainer):
        worker.seconds = lambda dice: dice.random() * 0.03  # the answers of a group come apart
        async with type(worker)(run.addresses.workers, engine, name="worker-1") as other, asyncio.TaskGroup() as group:
            other.seconds = worker.seconds
            group.create_task(finish(run))
            for _ in range(3):
                await asyncio.sleep(0.3)
                await worker.__aexit__()
                worker.pid += 1
                await worker.__aenter__()
        assert sorted(trainer.batches) == [1, 2, 3, 4, 5, 6]
        assert sizes(worker) | sizes(other) == WHOLE
        assert other.requests
    result = audit(run.folder.path)
    assert result.is_clean, result
    assert set(finished_of_batched_groups(run)) == {4}


async def test_a_group_scored_without_its_failed_rollouts_does_not_try_them_again(make_run):
    run = make_together(make_run, evaluation={"every": 2, "num_tasks": 2, "num_attempts": 3})
    async with run.world() as (_, worker, trainer):
        worker.outcome = lambda request, attempt: failed(request, attempt) if attempt == 1 else None
        await finish(run)
        assert sorted(trainer.batches) == [1, 2, 3, 4]
        assert sizes(worker) == WHOLE
        groups = [request.group for request in worker.requests]
        assert len(groups) == len(set(groups))
    assert audit(run.folder.path).is_clean
    assert set(finished_of_batched_groups(run)) == {3}
    report = json.loads(run.folder.eval_of(4).read_text())["environments"]["digits"]
    assert (report["num_rollouts"], report["failures"]) == (6, {"sandbox": 2})


async def test_a_group_with_too_few_valid_rollouts_runs_again_whole(make_run):
    run = make_together(make_run, evaluation={"every": 2, "num_tasks": 2, "num_attempts": 3})
    async with run.world() as (_, worker, trainer):

        def at_first_all_but_one(request, attempt):
            is_first = sum(other.group == request.group for other in worker.requests) == 1
            is_failed = is_first and (attempt != 1 or request.group.startswith("eval"))
            return failed(request, attempt) if is_failed else None

        worker.outcome = at_first_all_but_one
        await finish(run)
        assert sorted(trainer.batches) == [1, 2, 3, 4]
        assert sizes(worker) == WHOLE
    assert audit(run.folder.path).is_clean
    assert set(finished_of_batched_groups(run)) == {4}


async def test_a_silent_worker_is_taken_for_dead(make_run):
    run = make_run({"num_steps": 3})
    async with run.world() as (engine, worker, trainer):
        worker.seconds = lambda dice: 1e9
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(run))
            await asyncio.sleep(0.3)
            worker.jobs[2].cancel()  # no more heartbeats
            async with type(worker)(run.addresses.workers, engine, name="worker-1"):
                while not trainer.last_step:
                    await asyncio.sleep(0.02)
    assert audit(run.folder.path).is_clean


async def test_the_only_worker_that_stood_still_for_long_is_used_again(make_run):
    run = make_run({"num_steps": 3})
    async with run.world() as (_, worker, trainer):
        worker.seconds = lambda dice: 1e9
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(run))
            await asyncio.sleep(0.3)
            worker.is_stalled = True
            await asyncio.sleep(2)
            worker.seconds = lambda dice: 0.0
            worker.is_stalled = False
            while not trainer.last_step:
                await asyncio.sleep(0.02)
        assert worker.num_hellos == 1
        assert worker.cancelled
    assert audit(run.folder.path).is_clean


async def test_heartbeats_and_repeated_questions_are_not_taken_for_progress(make_run, monkeypatch, caplog):
    monkeypatch.setattr("hone.orchestrator.loop.REMIND_SECONDS", 0.5)
    run = make_run({"num_steps": 1})
    async with run.world() as (_, worker, _):
        worker.seconds = lambda dice: 1.5
        await finish(run)
    assert "nothing happens; waiting for" in caplog.text


async def test_the_engine_may_restart(make_run):
    run = make_run({"num_steps": 8})
    async with run.world(seconds=0.02) as (engine, worker, trainer):
        worker.seconds = lambda dice: dice.random() * 0.02
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(run))
            for _ in range(3):
                await asyncio.sleep(0.1)
                await engine.restart()
        assert max(staleness for staleness, _ in trainer.batches.values()) <= 1


async def test_the_trainer_may_go_back_to_its_checkpoint(make_run):
    run = make_run({"num_steps": 10})
    async with run.world(seconds=0.02, checkpoint_every=4) as (_, _, trainer):
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(run))
            while len(trainer.steps_done) < 6:
                await asyncio.sleep(0.01)
            await trainer.restart()
        assert sorted(trainer.batches) == list(range(1, 11))
        assert trainer.steps_done.count(6) == 2
    assert audit(run.folder.path).is_clean


@pytest.mark.parametrize("num_kills", [3, pytest.param(12, marks=pytest.mark.slow)])
async def test_killed_again_and_again_the_orchestrator_loses_and_repeats_nothing(make_run, num_kills):
    dice = random.Random(num_kills)
    num_steps = 6 * num_kills
    run = make_run({"num_steps": num_steps, "max_staleness": 2}, evaluation={"every": 5, "num_tasks": 2})
    async with run.world(seconds=0.03, checkpoint_every=7) as (_, worker, trainer):
        worker.seconds = lambda dice: dice.random() * 0.03
        async with asyncio.timeout(4 * SECONDS):
            for _ in range(num_kills):
                process = await asyncio.create_subprocess_exec(sys.executable, PROCESS, run.folder.path)
                goal = len(trainer.steps_done) + dice.randint(1, 5)
                while len(trainer.steps_done) < goal:
                    await asyncio.sleep(0.005)
                await asyncio.sleep(dice.random() * 0.05)
                process.kill()
                await process.wait()
            process = await asyncio.create_subprocess_exec(sys.executable, PROCESS, run.folder.path)
            assert await process.wait() == 0
        assert sorted(trainer.batches) == list(range(1, num_steps + 1))
        assert max(staleness for staleness, _ in trainer.batches.values()) <= 2
    result = audit(run.folder.path)
    assert result.is_clean, result


async def test_a_trainer_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(make_run):
    run = make_run({"num_steps": 8})
    async with run.world(seconds=0.02, checkpoint_every=2, keep=2) as (_, _, trainer):
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(run))
            while len(trainer.steps_done) < 6 or run.folder.saved_steps()[-1] < 6:
                await asyncio.sleep(0.005)
            run.folder.checkpoint_of(run.folder.saved_steps()[-1]).rmdir()
            await trainer.restart()
        assert sorted(trainer.batches) == list(range(1, 9))
        assert trainer.steps_done.count(6) == 2
    assert audit(run.folder.path).is_clean


async def test_a_trainer_that_asks_again_is_told_what_its_batch_waits_for(make_run):
    run = make_run({"num_steps": 1})
    async with run.world() as (_, worker, trainer):
        worker.seconds = lambda dice: 1.0
        await finish(run)
        assert {(pending.step, "rollouts" in pending.waiting_for) for pending in trainer.pending} == {(1, True)}


async def test_a_finished_run_is_made_longer_and_survives_a_restart_on_the_way(make_run):
    run = make_run({"num_steps": 1000, "stop_at_reward": 0.0}, evaluation={"every": 2, "num_tasks": 2})
    async with run.world(seconds=0.01) as (_, _, trainer):
        await finish(run)
        first = trainer.last_step
    run.folder.export.rename(run.folder.path / "export.before")
    longer = make_run({"num_steps": 1001, "max_concurrent": 16}, evaluation={"every": 2, "num_tasks": 2})
    async with longer.world(seconds=0.01) as (_, _, trainer):
        for goal in (3, 6):
            task = asyncio.create_task(finish(longer))
            async with asyncio.timeout(SECONDS):
                while len(trainer.steps_done) < goal:
                    assert not task.done()
                    await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert trainer.steps_done[:3] == [first + 1, first + 2, first + 3]
    assert audit(run.folder.path).is_clean


async def test_a_ledger_of_another_recipe_is_refused(make_run):
    run = make_run({"num_steps": 1})
    async with run.world():
        await finish(run)
    other = make_run({"num_steps": 1, "max_staleness": 3})
    with pytest.raises(LedgerError, match="max_staleness was 1 and is now 3"):
        await finish(other)


async def test_a_port_in_use_is_one_readable_error(make_run, monkeypatch):
    monkeypatch.setattr("hone.orchestrator.sockets.BIND_SECONDS", 0.1)
    run = make_run()
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", int(run.addresses.workers.rsplit(":", 1)[1]))
    async with server:
        with pytest.raises(PortInUseError, match="another orchestrator"):
            await finish(run)


async def test_a_port_that_the_orchestrator_before_still_holds_is_waited_for(make_run):
    run = make_run({"num_steps": 1})
    holder = socket.socket()
    holder.bind(("127.0.0.1", int(run.addresses.workers.rsplit(":", 1)[1])))
    asyncio.get_running_loop().call_later(0.3, holder.close)
    async with run.world():
        await finish(run)


async def test_tasks_that_an_environment_does_not_give_cost_their_groups_and_not_the_run(make_run):
    run = make_run({"num_steps": 2})
    digits = run.environments["digits"]
    give = digits.train_task

    def flaky(index):
        if index % 2:
            raise KeyError(f"no row {index}")
        return give(index)

    object.__setattr__(digits, "train_task", flaky)
    async with run.world() as (_, _, trainer):
        await finish(run)
        assert sorted(trainer.batches) == [1, 2]
    assert audit(run.folder.path).is_clean
    assert sum(line.get("rollout/failed_environment_count", 0) for line in batch_lines(run)) > 0


async def test_an_environment_that_gives_no_task_at_all_ends_the_run_with_what_it_said(make_run):
    run = make_run({"num_steps": 1})

    def broken(index):
        raise KeyError("no such file")

    object.__setattr__(run.environments["digits"], "train_task", broken)
    async with run.world():
        with pytest.raises(HopelessError, match="no such file"):
            await finish(run)


async def test_weights_that_the_engine_refuses_again_and_again_end_the_process(make_run):
    run = make_run({"num_steps": 3})
    async with run.world() as (engine, _, _):
        engine.refusal = "no tensor lm_head.weight"
        with pytest.raises(WeightsRefusedError, match=r"5 times.*no tensor lm_head.weight"):
            await finish(run)


async def test_weights_that_the_engine_refuses_once_are_offered_again(make_run):
    run = make_run({"num_steps": 2, "max_staleness": 0})
    async with run.world() as (engine, _, _):
        engine.refusal = "busy"
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(run))
            while not engine.num_refused:
                await asyncio.sleep(0.01)
            engine.refusal = None
        assert engine.loaded[0] == 1


def run_main(run, monkeypatch, error):
    async def fails(*_):
        raise error

    monkeypatch.setattr("hone.orchestrator.loop.environment_of", lambda section: None)
    monkeypatch.setattr("hone.orchestrator.loop.orchestrate", fails)
    return main([str(run.folder.path)])


FULL = sqlite3.OperationalError("database or disk is full")
FULL.sqlite_errorcode = sqlite3.SQLITE_FULL
LOCKED = sqlite3.OperationalError("database is locked")
LOCKED.sqlite_errorcode = sqlite3.SQLITE_BUSY


@pytest.mark.parametrize("error", [HopelessError("no"), LedgerError("other"), OSError(errno.ENOSPC, "full"), FULL])
def test_what_a_restart_does_not_change_ends_with_code_2(make_run, monkeypatch, error):
    assert run_main(make_run(), monkeypatch, error) == 2


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EMFILE, "too many files"), LOCKED])
def test_everything_else_crashes(make_run, monkeypatch, error):
    with pytest.raises(type(error)):
        run_main(make_run(), monkeypatch, error)


async def test_an_ended_run_ends_again_at_once(make_run):
    run = make_run({"num_steps": 2})
    async with run.world() as (_, worker, _):
        await finish(run)
        before = len(worker.requests)
        await finish(run)
        assert len(worker.requests) == before


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it happens."""


@pytest.mark.parametrize("is_together", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 13])
async def test_a_kill_between_files_and_ledger_loses_and_repeats_nothing(make_run, monkeypatch, number, is_together):
    run = make_together(make_run) if is_together else make_run()
    commits = 0

    def commit(ledger):
        nonlocal commits
        commits += bool(ledger._pending or ledger._issued)
        if commits == number:
            commits += 1
            raise Killed
        original(ledger)

    original = Ledger.commit
    async with run.world() as (_, worker, trainer):
        worker.seconds = lambda dice: dice.random() * 0.02
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "commit", commit)
            with pytest.raises(Killed):
                await finish(run)
        await finish(run)
        assert sorted(trainer.batches) == [1, 2, 3, 4]
        assert not is_together or sizes(worker) == {(False, (0, 1, 2, 3))}
    result = audit(run.folder.path)
    assert result.is_clean, result
    results = [(found.group, found.attempt) for _, found in read_traces(run.folder.traces)]
    assert len(results) == len(set(results)) >= 4 * 8


def finite(run, count, difficulty=None):
    """The digits from 0 to `count`, of which task n is solved by n mod 5 of 4 rollouts."""

    @reward
    def exact(answer: str) -> float:
        return float(bool(answer))

    def task(index):
        return Task(prompt=(user(str(index)),))

    run.environments["digits"] = SingleTurn(
        name="digits", rubric=Rubric([exact]), train=Tasks(task, count), difficulty=difficulty
    )


def solved_by_number(request, attempt):
    return float(attempt < int(request.task.prompt[0].content) % 5)


def drawn_tasks(run):
    with sqlite3.connect(run.folder.ledger) as database:
        return [index for (index,) in database.execute("SELECT task_index FROM groups ORDER BY number")]


POOLS = {"easy_share": 0.3, "hard_share": 0.2, "retire_after": 1}
LEVELS = {"start_share": 0.4, "step_share": 0.3, "advance_at": 0.3, "window": 6}


@pytest.mark.parametrize("sections", [{"pools": POOLS}, {"curriculum": LEVELS}, {"pools": POOLS, "curriculum": LEVELS}])
async def test_a_run_that_is_killed_again_and_again_draws_what_it_would_have(
    make_run, monkeypatch, tmp_path_factory, sections
):
    """One group at a time, so that nothing but the curriculum can change the order."""
    tasks = []
    for kills in ([], [2, 3, 4, 6]):
        run = make_run(
            {"num_steps": 12, "max_staleness": 30, "max_concurrent": 4},
            environments=[{"name": "digits", **sections}],
            run={"folder": str(tmp_path_factory.mktemp("runs")), "name": "run"},
        )
        finite(run, 20, difficulty=lambda task: float(task.prompt[0].content))
        async with run.world() as (_, worker, trainer):
            worker.reward = solved_by_number
            for number in kills:
                with monkeypatch.context() as patch:
                    patch.setattr(Ledger, "commit", killing(number))
                    with pytest.raises(Killed):
                        await finish(run)
            await finish(run)
            assert sorted(trainer.batches) == list(range(1, 13))
        assert audit(run.folder.path).is_clean
        tasks.append(drawn_tasks(run))
    whole, interrupted = tasks
    length = min(len(whole), len(interrupted))
    assert length >= 24
    assert whole[:length] == interrupted[:length]


def killing(number):
    """A commit that is the last thing its process does, after `number` others."""
    commits = 0

    def commit(ledger):
        nonlocal commits
        commits += bool(ledger._pending or ledger._issued)
        if commits >= number:
            raise Killed
        COMMIT(ledger)

    return commit


COMMIT = Ledger.commit


async def test_tasks_that_are_always_solved_are_retired_and_the_pools_are_measured(make_run):
    run = make_run(
        {"num_steps": 8, "max_staleness": 8}, environments=[{"name": "digits", "pools": {"retire_after": 1}}]
    )
    finite(run, 10)
    async with run.world() as (_, worker, _):
        worker.reward = lambda request, attempt: 1.0 if request.task.prompt[0].content == "7" else attempt % 2
        await finish(run)
    lines = batch_lines(run)
    assert lines[-1]["rollout/digits/pool_retired_count"] == 1
    assert lines[-1]["rollout/digits/pool_unseen_count"] == 0
    assert sum(lines[-1][f"rollout/digits/pool_{pool}_count"] for pool in ("easy", "normal", "hard")) == 9
    assert drawn_tasks(run).count(7) < drawn_tasks(run).count(3) + 2


@pytest.mark.parametrize("sections", [{"pools": {}}, {"curriculum": {}}])
async def test_pools_of_endless_tasks_are_refused_at_the_start(make_run, sections):
    run = make_run(environments=[{"name": "digits", **sections}])
    with pytest.raises(ConfigError, match="its train tasks are endless"):
        await finish(run)


async def serve_tokens(address):
    """The token channel of an engine that says two tokens to everything."""
    out, back = Wire(GenerateMany), Wire(Answers)
    dice = random.Random(0)
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        while True:
            identity, data = await socket.recv_multipart()
            answers = []
            for request in out.decode(data).requests:
                token_ids = [dice.choice([5, 6])]
                versions = [VersionRun(0, 1)]
                answers.append(Generated(request.request_id, token_ids, [-0.5], versions, FinishReason.STOP))
            await socket.send_multipart([identity, back.encode(Answers(answers))])


async def test_a_run_without_worker_processes_takes_the_same_way(make_run):
    run = make_run({"num_steps": 2, "max_staleness": 9, "filter_without_signal": False}, workers={"num_workers": 0})
    train_tokenizer(["digits 0123456789"], vocab_size=300, chat_template="chatml").save(run.folder.model)
    async with run.world() as (_, worker, trainer):
        await worker.__aexit__()
        server = asyncio.create_task(serve_tokens(run.addresses.tokens))
        await finish(run)
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        assert sorted(trainer.batches) == [1, 2]
        await worker.__aenter__()
    assert audit(run.folder.path).is_clean


def test_what_will_never_work_ends_with_code_2_and_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no recipe at" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


async def test_a_worker_with_another_version_of_hone_ends_the_run_with_what_to_do(make_run):
    run = make_run({"num_steps": 1})
    async with run.world() as (_, worker, _):
        envelope = Envelope(PROTOCOL + 1, "WorkerHello", msgspec.Raw(msgspec.msgpack.encode({})))
        await worker.socket.send(msgspec.msgpack.encode(envelope))
        with pytest.raises(HopelessError, match="run the same version of hone everywhere"):
            await finish(run)


async def test_a_worker_that_ends_itself_costs_the_guilty_rollout_and_no_other(make_run):
    run = make_run({"num_steps": 2, "max_concurrent": 8})
    async with run.world() as (engine, worker, trainer):
        worker.seconds = lambda dice: 1e9
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(run))
            while not worker.tasks:
                await asyncio.sleep(0.01)
            [first, *_] = worker.requests
            guilty = failed(first, 0, FailureClass.TIMEOUT)
            await worker.send(RolloutResult(first.group, 0, guilty), Farewell(worker.name, "stuck in f (e.py:1)"))
            async with type(worker)(run.addresses.workers, engine, name="worker-1") as other:
                while not trainer.last_step:
                    await asyncio.sleep(0.02)
                asked = [(request.group, attempt) for request in other.requests for attempt in request.attempts]
    assert (first.group, 0) not in asked
    assert (first.group, 1) in asked
    with sqlite3.connect(run.folder.ledger) as ledger:
        failures = ledger.execute("SELECT DISTINCT failure, num_failures FROM attempts").fetchall()
    ledger.close()
    assert sorted(failures, key=str) == [("timeout", 0), (None, 0)]
