import asyncio
import os
import time
from collections import Counter

import msgspec
import pytest
from msgspec.structs import replace

from hone.envs import RolloutFailure, Rubric, Task, group_metric, group_reward, metric, reward, user
from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, Turn
from hone.schema.traces import Failure, FailureClass, Node, Reward, StopReason, Trace

TASK = Task(prompt=(user("say yes"),), reference="yes", info={"level": 3})


def trace_of(answer="yes"):
    message = Message("assistant", answer)
    nodes = [Node(TASK.prompt[0]), Node(message, 0, Turn(message, FinishReason.STOP)), Node(user("thanks"), 1)]
    return Trace(environment="test", task=TASK, attempt=0, nodes=nodes)


def apart(answer, reference, trace):
    assert trace.task.reference == reference
    return {"yes": 1.0, "no": float("nan")}.get(answer, answer)


def apart_with_state(state):
    return 1.0


def dies(answer):
    os._exit(7)


def sleeps(answer):
    time.sleep(1_000)


async def test_rewards_and_metrics_are_kept_by_name_and_weight():
    @reward
    def exact(answer, reference):
        return answer == reference

    @reward(weight=0.5)
    async def later(answer):
        await asyncio.sleep(0)
        return len(answer)

    @metric(name="size")
    def anything(completion):
        return len(completion)

    scores = await Rubric([exact, later, anything]).score(trace_of())
    assert {name: (r.value, r.weight) for name, r in scores.rewards.items()} == {"exact": (1, 1), "later": (3, 0.5)}
    assert scores.metrics == {"size": 2}


async def test_functions_get_what_they_name():
    seen = []

    @reward
    def look(task, trace, prompt, completion, answer, reference, info, state, *, scale=2.0):
        seen.append((task, trace, prompt, completion, answer, reference, info, state, scale))
        return scale

    trace = trace_of()
    await Rubric([look]).score(trace, "mine")
    completion = [Message("assistant", "yes"), user("thanks")]
    assert seen == [(TASK, trace, TASK.prompt, completion, "yes", "yes", {"level": 3}, "mine", 2.0)]


def test_a_declared_function_can_still_be_called():
    @reward
    def exact(answer, reference):
        return answer == reference

    assert exact("a", "a") is True


@pytest.mark.parametrize(
    ("declare", "complaint"),
    [
        (lambda: Rubric([]), "without a reward"),
        (lambda: Rubric([metric(lambda answer: 1)]), "without a reward"),
        (lambda: Rubric([reward(lambda answer: 1), reward(lambda answer: 2)]), "given twice"),
        (lambda: reward(lambda answr: 1), "'answr', which is unknown"),
        (lambda: reward(lambda *answers: 1), "name the arguments"),
        (lambda: reward(lambda **arguments: 1), "name the arguments"),
        (lambda: reward(weight=float("nan")), "not a finite number"),
        (lambda: reward(deadline_seconds=3)(lambda answer: 1), "add blocking=True"),
        (lambda: reward(blocking=True, deadline_seconds=0)(lambda answer: 1), "not positive"),
        (lambda: reward(blocking=True)(asyncio.sleep), "for synchronous functions"),
        (lambda: reward(isolated=True)(asyncio.sleep), "for synchronous functions"),
        (lambda: reward(isolated=True, blocking=True)(apart), "choose one"),
        (lambda: reward(isolated=True)(lambda answer: 1), "at the top of a module"),
        (lambda: reward(isolated=True)(apart_with_state), "wants the state"),
        (lambda: group_reward(lambda answer: [1]), "'answer', which is unknown; there are task, prompt"),
        (lambda: reward(lambda answers: 1), "'answers', which is unknown"),
        (lambda: Rubric([group_metric(lambda answers: [1])]), "without a reward"),
        (lambda: Rubric([reward(name="a")(lambda: 1), group_reward(name="a")(lambda: [1])]), "given twice"),
    ],
)
def test_mistakes_are_found_when_the_rubric_is_built(declare, complaint):
    with pytest.raises(ValueError, match=complaint):
        declare()


def test_a_plain_function_is_refused():
    with pytest.raises(TypeError, match="declared with @reward or @metric"):
        Rubric([lambda answer: 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, "1", [1.0], 1j, 10**400])
async def test_what_is_no_finite_number_is_a_failure_and_never_a_zero(value):
    rubric = Rubric([reward(name="odd")(lambda answer: value)])
    with pytest.raises(RolloutFailure) as caught:
        await rubric.score(trace_of())
    assert caught.value.failure.kind is FailureClass.ENVIRONMENT
    assert caught.value.failure.where == "reward odd"


@pytest.mark.parametrize(("value", "expected"), [(True, 1.0), (False, 0.0), (3, 3.0), (-0.25, -0.25)])
async def test_numbers_and_claims_are_rewards(value, expected):
    scores = await Rubric([reward(name="fine")(lambda answer: value)]).score(trace_of())
    assert scores.rewards["fine"].value == expected
    assert type(scores.rewards["fine"].value) is float


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(1), StopIteration(), asyncio.CancelledError()])
@pytest.mark.parametrize("blocking", [False, True])
async def test_a_reward_that_raises_is_a_failure_that_says_where(error, blocking):
    @reward(blocking=blocking)
    def broken(answer):
        raise error

    with pytest.raises(RolloutFailure) as caught:
        await Rubric([broken]).score(trace_of())
    assert caught.value.failure.kind is FailureClass.ENVIRONMENT
    assert caught.value.failure.where == "reward broken"


async def test_the_message_names_error_file_and_function():
    @reward
    def broken(answer):
        return {}[answer]

    with pytest.raises(RolloutFailure, match=r"KeyError: 'yes' \(test_rubric.py:\d+ in broken\)"):
        await Rubric([broken]).score(trace_of())


async def test_a_hanging_async_reward_ends_at_its_deadline():
    @reward(deadline_seconds=0.02)
    async def hangs(answer):
        await asyncio.sleep(60)

    with pytest.raises(RolloutFailure, match=r"took longer than 0.02 s") as caught:
        await Rubric([hangs]).score(trace_of())
    assert caught.value.failure.kind is FailureClass.TIMEOUT


async def test_a_hanging_blocking_reward_ends_at_its_deadline_and_keeps_the_loop_free():
    @reward(blocking=True)
    def hangs(answer):
        time.sleep(0.4)
        return 1.0

    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    with pytest.raises(RolloutFailure, match=r"took longer than 0.1 s") as caught:
        await Rubric([hangs], deadline_seconds=0.1).score(trace_of())
    ticking.cancel()
    assert caught.value.failure.kind is FailureClass.TIMEOUT
    assert ticks > 3


async def test_hanging_threads_do_not_take_the_places_of_others():
    @reward(blocking=True, deadline_seconds=0.02)
    def hangs(answer):
        time.sleep(0.5)

    @reward(blocking=True)
    def fine(answer):
        return 1.0

    hanging = Rubric([hangs])
    for _ in range(3):
        await asyncio.gather(*(hanging.score(trace_of()) for _ in range(8)), return_exceptions=True)
    assert (await Rubric([fine]).score(trace_of())).rewards["fine"].value == 1


async def test_a_failing_metric_costs_no_reward_and_is_told():
    @metric
    def broken(answer):
        raise ValueError("no such thing")

    scores = await Rubric([reward(name="fine")(lambda answer: 1), broken]).score(trace_of())
    assert scores.rewards["fine"].value == 1
    assert scores.metrics == {}
    assert "no such thing" in scores.failed_metrics["broken"]


async def test_an_async_result_of_a_sync_function_is_a_failure():
    async def later():
        return 1.0

    with pytest.raises(RolloutFailure, match="returned coroutine, not a number"):
        await Rubric([reward(name="odd")(lambda answer: later())]).score(trace_of())


async def test_an_isolated_reward_runs_in_a_process_of_its_own():
    rubric = Rubric([reward(isolated=True)(apart)])
    assert (await rubric.score(trace_of())).rewards["apart"].value == 1
    with pytest.raises(RolloutFailure, match="returned nan"):
        await rubric.score(trace_of("no"))
    with pytest.raises(RolloutFailure, match="returned str"):
        await rubric.score(trace_of("else"))


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [(dies, FailureClass.ENVIRONMENT, "exit code 7"), (sleeps, FailureClass.TIMEOUT, "took longer than 0.2 s")],
)
async def test_what_goes_wrong_in_an_isolated_reward_is_a_failure(function, kind, message):
    with pytest.raises(RolloutFailure, match=message) as caught:
        await Rubric([reward(isolated=True, deadline_seconds=0.2)(function)]).score(trace_of())
    assert caught.value.failure.kind is kind
    assert caught.value.failure.where == f"reward {function.__name__}"


def scored(answer, own=0.5):
    return replace(trace_of(answer), rewards={"own": Reward(own)}, stop_reason=StopReason.COMPLETED)


FAILED = replace(trace_of("no"), failure=Failure(FailureClass.MODEL, "sample", "gone"))


@group_reward(weight=2)
def agrees(answers):
    [(most_common, _)] = Counter(answers).most_common(1)
    return [answer == most_common for answer in answers]


async def test_group_rewards_and_metrics_are_added_to_the_rollouts_that_have_not_failed():
    @group_metric
    async def num_others(traces, completions, *, scale=1):
        return [scale * (len(completions) - 1) for _ in traces]

    traces = [scored("a"), FAILED, scored("b"), scored("a")]
    done = await Rubric([agrees, num_others]).score_group(traces)
    assert [trace.task for trace in done] == [TASK] * 4
    assert done[1] is FAILED
    assert [done[i].rewards["agrees"] for i in (0, 2, 3)] == [Reward(1.0, 2.0), Reward(0.0, 2.0), Reward(1.0, 2.0)]
    assert [done[i].reward for i in (0, 2, 3)] == [2.5, 0.5, 2.5]
    assert all(done[i].metrics == {"num_others": 2} for i in (0, 2, 3))
    assert all("agrees" not in trace.rewards for trace in traces)


async def test_group_functions_get_what_they_name():
    seen = []

    @group_reward
    def look(task, prompt, reference, info, traces, completions, answers):
        seen.append((task, prompt, reference, info, traces, completions, answers))
        return [0.0] * len(traces)

    traces = [scored("a"), FAILED, scored("b")]
    await Rubric([look]).score_group(traces)
    completions = [[Message("assistant", answer), user("thanks")] for answer in "ab"]
    valid = [traces[0], traces[2]]
    assert seen == [(TASK, TASK.prompt, "yes", {"level": 3}, valid, completions, ["a", "b"])]


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [1.0, 2.0, 3.0],
        [1.0, float("nan")],
        [1.0, None],
        1.0,
        None,
        "ab",
        {0: 1.0, 1: 2.0},
        {1.0, 2.0},
        [],
        iter([1, 2]),
    ],
)
async def test_what_is_not_one_number_for_each_rollout_fails_all_of_them(values):
    rubric = Rubric([group_reward(name="odd")(lambda answers: values)])
    done = await rubric.score_group([scored("a"), FAILED, scored("b")])
    assert [(trace.failure.kind, trace.failure.where) for trace in (done[0], done[2])] == [
        (FailureClass.ENVIRONMENT, "group reward odd")
    ] * 2
    assert all((trace.rewards, trace.metrics, trace.stop_reason) == ({}, {}, None) for trace in (done[0], done[2]))
    assert done[1] is FAILED


@pytest.mark.parametrize("options", [{}, {"blocking": True}])
async def test_a_group_reward_that_raises_fails_all_rollouts(options):
    @group_reward(**options)
    def broken(answers):
        raise ValueError("broken")

    done = await Rubric([broken]).score_group([scored("a"), scored("b")])
    assert [trace.failure.where for trace in done] == ["group reward broken"] * 2
    assert "ValueError: broken" in done[0].failure.message


async def test_a_late_group_reward_is_a_failure_of_class_timeout():
    @group_reward(deadline_seconds=0.02)
    async def hangs(answers):
        await asyncio.sleep(60)

    rubric = Rubric([hangs, agrees])
    assert rubric.group_seconds == 0.02
    done = await rubric.score_group([scored("a")])
    assert done[0].failure.kind is FailureClass.TIMEOUT


async def test_a_failing_group_metric_costs_no_reward_and_is_told():
    @group_metric
    def broken(answers):
        raise ValueError("no such thing")

    before = replace(scored("a"), info={"failed_metrics": {"other": "too"}, "kept": 1})
    [done] = await Rubric([agrees, broken]).score_group([before])
    assert done.rewards["agrees"].value == 1
    assert done.info["failed_metrics"].keys() == {"other", "broken"}
    assert (done.info["kept"], before.info["failed_metrics"]) == (1, {"other": "too"})


async def test_a_rubric_without_group_functions_leaves_groups_as_they_are():
    traces = [scored("a"), FAILED]
    rubric = Rubric([reward(name="own")(lambda answer: 1)])
    assert not rubric.scores_groups
    assert await rubric.score_group(traces) == traces
    assert await Rubric([agrees]).score_group([FAILED]) == [FAILED]


async def test_a_failure_that_names_what_no_encoding_carries_can_still_be_sent():
    @reward
    def reads(answer):
        raise FileNotFoundError("there is no \udcff.txt")

    with pytest.raises(RolloutFailure) as raised:
        await Rubric([reads]).score(trace_of())
    assert "there is no \\udcff.txt" in raised.value.failure.message
    msgspec.msgpack.encode(raised.value.failure)
