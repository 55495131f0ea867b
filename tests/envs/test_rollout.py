import asyncio

import pytest

from fakes import ScriptedSampler
from hone.envs import (
    Environment,
    FailureClass,
    Limits,
    MultiTurn,
    RolloutFailure,
    Rubric,
    SingleTurn,
    StopReason,
    Task,
    Trace,
    assistant,
    failures_as,
    reward,
    run_group,
    run_rollout,
    user,
)
from hone.schema.sampling import FinishReason, SamplingParameters, Turn
from hone.schema.seeds import derive_seed
from hone.schema.wire import decode, encode

TASK = Task(prompt=(user("say yes"),), reference="yes")
SAMPLING = SamplingParameters(temperature=0.7, max_tokens=16)


@reward
def exact(answer, reference):
    return answer == reference


def single_turn(**settings):
    return SingleTurn(name="single", rubric=Rubric([exact]), train=[TASK], **settings)


class Countdown(MultiTurn):
    """Replies with how many turns are left, until none is."""

    def __init__(self, turns, **settings):
        super().__init__(name="countdown", rubric=Rubric([exact]), train=[TASK], **settings)
        self.turns = turns

    async def setup(self, rollout):
        rollout.state = {"left": self.turns, "closed": 0}

    async def reply(self, rollout):
        rollout.state["left"] -= 1
        return [user(f"{rollout.state['left']} left")] if rollout.state["left"] else None

    async def teardown(self, rollout):
        rollout.info["left"] = rollout.state["left"]


async def run(environment, sampler, **arguments):
    return await run_rollout(environment, TASK, 0, sampler, SAMPLING, 7, **arguments)


async def test_a_single_turn_is_asked_scored_and_recorded():
    environment = single_turn(version="1.2")
    trace = await run_rollout(environment, TASK, 3, ScriptedSampler(["yes"]), SAMPLING, 7, group="g")
    assert (trace.environment, trace.environment_version, trace.group, trace.attempt) == ("single", "1.2", "g", 3)
    assert trace.task is TASK
    assert [message.content for message in trace.messages] == ["say yes", "yes"]
    assert [node.parent for node in trace.nodes] == [None, 0]
    assert trace.reward == 1
    assert trace.stop_reason is StopReason.COMPLETED
    assert trace.failure is None
    assert trace.timing.started_at > 0
    assert trace.timing.total_seconds >= trace.timing.generate_seconds


async def test_turns_and_replies_alternate_until_the_environment_ends_it():
    sampler = ScriptedSampler(["one", "two", "yes"])
    trace = await run(Countdown(3), sampler)
    assert [m.content for m in trace.messages] == ["say yes", "one", "2 left", "two", "1 left", "yes"]
    assert [node.parent for node in trace.nodes] == [None, 0, 1, 2, 3, 4]
    assert len(trace.turns) == 3
    assert trace.reward == 1
    assert trace.info == {"left": 0}
    assert len(trace.branches()) == 1


async def test_each_turn_has_a_seed_of_its_task_attempt_and_turn():
    sampler = ScriptedSampler(["a"])
    await run_group(Countdown(2), TASK, [4, 5], sampler, SAMPLING, 7)
    seeds = {sampling.seed for _, sampling in sampler.calls}
    assert seeds == {derive_seed(7, "sampling", TASK.key, attempt, turn) for attempt in (4, 5) for turn in (0, 1)}
    assert {sampling.temperature for _, sampling in sampler.calls} == {0.7}


async def test_the_budget_of_turns_truncates_and_the_lower_one_holds():
    for environment, limits, expected in [
        (Countdown(9, max_turns=2), Limits(), 2),
        (Countdown(9, max_turns=2), Limits(max_turns=3), 2),
        (Countdown(9, max_turns=4), Limits(max_turns=3), 3),
        (Countdown(9), Limits(max_turns=1), 1),
    ]:
        trace = await run(environment, ScriptedSampler(["yes"]), limits=limits)
        assert len(trace.turns) == expected
        assert trace.stop_reason is StopReason.MAX_TURNS
        assert trace.is_truncated
        assert trace.reward == 1


async def test_a_rollout_that_ends_on_its_last_turn_is_complete():
    trace = await run(Countdown(2, max_turns=2), ScriptedSampler(["yes"]))
    assert trace.stop_reason is StopReason.COMPLETED


async def test_the_budget_of_tokens_holds_over_all_turns():
    sampler = ScriptedSampler(["12345"])
    trace = await run(Countdown(9), sampler, limits=Limits(max_tokens=12))
    assert [sampling.max_tokens for _, sampling in sampler.calls] == [12, 7, 2]
    assert trace.num_completion_tokens == 12
    assert trace.stop_reason is StopReason.MAX_TOKENS


async def test_a_cut_turn_truncates_the_rollout_and_is_scored():
    environment = single_turn()
    trace = await run_rollout(environment, TASK, 0, ScriptedSampler(["yes!"]), SamplingParameters(max_tokens=3), 0)
    assert trace.stop_reason is StopReason.MAX_TOKENS
    assert trace.reward == 1


async def test_a_full_context_truncates():
    full = Turn(assistant(""), FinishReason.LENGTH)
    trace = await run(Countdown(9), ScriptedSampler(["yes", full]))
    assert trace.stop_reason is StopReason.MAX_TOKENS
    assert trace.failure is None


async def test_the_budget_of_time_ends_before_the_next_turn():
    trace = await run(Countdown(9), ScriptedSampler(["yes"], seconds=0.03), limits=Limits(budget_seconds=0.02))
    assert len(trace.turns) == 1
    assert trace.stop_reason is StopReason.TIMEOUT
    assert trace.reward == 1


async def test_a_sampler_that_raises_is_a_failure_of_the_model():
    trace = await run(single_turn(), ScriptedSampler([ConnectionError("engine gone")]))
    assert trace.failure.kind is FailureClass.MODEL
    assert "engine gone" in trace.failure.message
    assert trace.stop_reason is None
    assert trace.rewards == {}


async def test_a_request_that_the_engine_cancels_is_a_failure_of_class_cancelled():
    given_up = Turn(assistant(""), FinishReason.CANCELLED)
    assert (await run(single_turn(), ScriptedSampler([given_up]))).failure.kind is FailureClass.CANCELLED


@pytest.mark.parametrize("hook", ["setup", "run", "reply"])
@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3), asyncio.CancelledError()])
async def test_whatever_an_environment_raises_costs_that_rollout_only(hook, error):
    class Broken(Countdown):
        pass

    async def broken(self, rollout):
        if rollout.attempt == 1:
            raise error
        return await getattr(Countdown, hook)(self, rollout)

    setattr(Broken, hook, broken)
    traces = await run_group(Broken(2), TASK, [0, 1, 2], ScriptedSampler(["yes"]), SAMPLING, 0)
    assert [trace.failure is None for trace in traces] == [True, False, True]
    assert traces[1].failure.kind is FailureClass.ENVIRONMENT
    assert traces[1].failure.where == hook


@pytest.mark.parametrize("reply", [[], ["text"], "text", 3])
async def test_a_reply_that_is_no_messages_is_a_failure(reply):
    class Odd(Countdown):
        async def reply(self, rollout):
            return reply

    trace = await run(Odd(2), ScriptedSampler(["yes"]))
    assert trace.failure.kind is FailureClass.ENVIRONMENT


async def test_a_failing_reward_costs_that_rollout_only():
    @reward
    def sometimes(trace):
        return float("nan") if trace.attempt == 1 else 1.0

    environment = SingleTurn(name="odd", rubric=Rubric([sometimes]), train=[TASK])
    traces = await run_group(environment, TASK, [0, 1, 2], ScriptedSampler(["yes"]), SAMPLING, 0)
    assert [trace.failure is None for trace in traces] == [True, False, True]
    assert traces[1].failure.where == "reward sometimes"


@pytest.mark.parametrize("phase", ["setup", "run", "score"])
async def test_a_hanging_environment_ends_at_the_deadline(phase):
    class Hangs(Countdown):
        async def setup(self, rollout):
            await super().setup(rollout)
            if phase == "setup":
                await asyncio.sleep(60)

        async def reply(self, rollout):
            if phase == "run":
                await asyncio.sleep(60)
            return await super().reply(rollout)

    @reward
    async def slow(answer):
        await asyncio.sleep(60 if phase == "score" else 0)
        return 1.0

    environment = Hangs(2)
    environment.rubric = Rubric([slow])
    trace = await run(environment, ScriptedSampler(["yes"]), limits=Limits(deadline_seconds=0.03))
    assert trace.failure.kind is FailureClass.TIMEOUT
    assert trace.failure.where == phase
    assert "0.03 s" in trace.failure.message
    assert "left" in trace.info


async def test_an_engine_that_never_answers_ends_at_the_deadline():
    trace = await run(single_turn(), ScriptedSampler(["yes"], seconds=60), limits=Limits(deadline_seconds=0.02))
    assert trace.failure.kind is FailureClass.TIMEOUT


async def test_environment_code_that_swallows_errors_hides_no_failure():
    class Stubborn(Countdown):
        async def run(self, rollout):
            for _ in range(3):
                try:
                    await rollout.turn()
                except Exception:
                    continue

    failed = await run(Stubborn(1), ScriptedSampler([ConnectionError("gone"), "yes"]))
    assert failed.failure.kind is FailureClass.MODEL
    truncated = await run(Stubborn(1), ScriptedSampler(["yes"]), limits=Limits(max_turns=1))
    assert truncated.stop_reason is StopReason.MAX_TURNS
    assert len(truncated.turns) == 1


async def test_environment_code_names_the_class_of_its_failures():
    class Judged(Countdown):
        async def reply(self, rollout):
            with failures_as(FailureClass.JUDGE, "ask the judge"):
                raise OSError("no route")

    trace = await run(Judged(2), ScriptedSampler(["yes"]))
    assert trace.failure.kind is FailureClass.JUDGE
    assert trace.failure.where == "ask the judge"


async def test_a_deadline_of_the_environments_own_is_a_timeout():
    class Late(Countdown):
        async def reply(self, rollout):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)

    assert (await run(Late(2), ScriptedSampler(["yes"]))).failure.kind is FailureClass.TIMEOUT


async def test_teardown_runs_after_a_failed_setup_and_its_own_trouble_is_remembered():
    class Fragile(Countdown):
        async def setup(self, rollout):
            if rollout.attempt:
                raise RolloutFailure(FailureClass.SANDBOX, "start", "no sandbox left")
            await super().setup(rollout)

        async def teardown(self, rollout):
            raise OSError("cannot close")

    fine, failed = await run_group(Fragile(1), TASK, [0, 1], ScriptedSampler(["yes"]), SAMPLING, 0)
    assert fine.reward == 1
    assert "cannot close" in fine.info["teardown_failure"]
    assert failed.failure.kind is FailureClass.SANDBOX
    assert "cannot close" in failed.info["teardown_failure"]


@pytest.mark.parametrize("thing", [object(), {"a": {1: object()}}, "\ud800"])
async def test_info_that_cannot_be_written_down_is_a_failure(thing):
    class Remembers(Countdown):
        async def teardown(self, rollout):
            rollout.info["thing"] = thing

    trace = await run(Remembers(1), ScriptedSampler(["yes"]))
    assert (trace.failure.kind, trace.failure.where) == (FailureClass.ENVIRONMENT, "info")
    assert decode(encode(trace), Trace) == trace


async def test_a_reply_that_cannot_be_written_down_is_a_failure():
    class Garbled(Countdown):
        async def reply(self, rollout):
            return [user("\ud800")]

    trace = await run(Garbled(2), ScriptedSampler(["yes"]))
    assert trace.failure.kind is FailureClass.ENVIRONMENT
    assert decode(encode(trace), Trace) == trace


async def test_a_hanging_teardown_is_given_up():
    class Clings(Countdown):
        async def teardown(self, rollout):
            await asyncio.sleep(60)

    trace = await run(Clings(1), ScriptedSampler(["yes"]), limits=Limits(teardown_seconds=0.02))
    assert trace.reward == 1
    assert "0.02 s" in trace.info["teardown_failure"]


async def test_a_cancelled_rollout_is_torn_down_and_leaves_no_trace():
    closed = []

    class Watched(Countdown):
        async def teardown(self, rollout):
            await asyncio.sleep(0)
            closed.append(rollout.attempt)

    rollout = asyncio.create_task(run(Watched(2), ScriptedSampler(["yes"], seconds=60)))
    await asyncio.sleep(0.01)
    rollout.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rollout
    assert closed == [0]


async def test_rollouts_of_one_environment_do_not_share_state():
    traces = await run_group(Countdown(3), TASK, range(20), ScriptedSampler(["yes"], seconds=0.001), SAMPLING, 0)
    assert all(len(trace.turns) == 3 for trace in traces)
    assert [trace.attempt for trace in traces] == list(range(20))


async def test_an_environment_may_drive_the_rollout_itself():
    class Twice(Environment):
        async def run(self, rollout):
            first = await rollout.turn()
            rollout.append(user(f"you said {first.message.content}; seed {rollout.derive_seed('dice') % 6}"))
            await rollout.turn()

    environment = Twice(name="twice", rubric=Rubric([exact]), train=[TASK])
    first, second = [await run(environment, ScriptedSampler(["no", "yes"])) for _ in range(2)]
    assert first.reward == 1
    assert first.messages == second.messages


def test_tasks_come_from_lists_or_are_made_on_demand():
    environment = single_turn(held_out=[])
    assert (environment.num_train_tasks, environment.num_held_out_tasks) == (1, 0)
    assert environment.train_task(0) is TASK
    with pytest.raises(IndexError):
        environment.held_out_task(0)
    with pytest.raises(IndexError):
        environment.train_task(-1)


def test_an_environment_without_turns_is_refused():
    with pytest.raises(ValueError, match="max_turns 0"):
        single_turn(max_turns=0)
