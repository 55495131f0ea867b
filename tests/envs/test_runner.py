import asyncio

from fakes import ScriptedSampler
from hone.envs import (
    FailureClass,
    MultiTurn,
    Rubric,
    SingleTurn,
    Task,
    group_reward,
    reward,
    run_group,
    run_rollout,
    user,
)
from hone.envs.runner import RolloutRunner
from hone.schema.rollouts import RolloutRequest
from hone.schema.sampling import SamplingParameters

TASK = Task(prompt=(user("say yes"),), reference="yes")


@reward
def exact(answer, reference):
    return answer == reference


ENVIRONMENT = SingleTurn(name="single", rubric=Rubric([exact]), train=[TASK])


def request(group="g", attempts=(0, 1, 2), environment="single"):
    return RolloutRequest(group, environment, TASK, list(attempts), SamplingParameters(), 0)


async def test_every_attempt_is_delivered_once_as_soon_as_it_is_there():
    results = []
    async with RolloutRunner({"single": ENVIRONMENT}, ScriptedSampler(["yes"]), results.append) as runner:
        runner.start(request())
        assert runner.num_running == 3
        await runner.wait_idle()
    assert sorted((result.group, result.attempt) for result in results) == [("g", 0), ("g", 1), ("g", 2)]
    assert all(result.trace.group == "g" and result.trace.reward == 1 for result in results)
    assert runner.num_running == 0


async def test_a_repeated_request_starts_only_what_does_not_run():
    results = []
    async with RolloutRunner({"single": ENVIRONMENT}, ScriptedSampler(["yes"]), results.append) as runner:
        runner.start(request(attempts=[0, 1]))
        runner.start(request(attempts=[1, 2]))
        await runner.wait_idle()
    assert sorted(result.attempt for result in results) == [0, 1, 2]


async def test_a_cancelled_group_delivers_nothing_and_frees_its_rollouts():
    results = []
    sampler = ScriptedSampler(["yes"], seconds=60)
    async with RolloutRunner({"single": ENVIRONMENT}, sampler, results.append) as runner:
        runner.start(request("early"))
        runner.cancel("early")  # before any of it has begun
        runner.start(request("late"))
        await asyncio.sleep(0.01)
        assert sampler.num_waiting == 3
        runner.cancel("late")
        runner.cancel("unknown")
        await asyncio.wait_for(runner.wait_idle(), 5)
    assert (results, runner.num_running, sampler.num_waiting) == ([], 0, 0)


async def test_a_cancelled_group_can_be_started_again_at_once():
    results = []
    async with RolloutRunner({"single": ENVIRONMENT}, ScriptedSampler(["yes"]), results.append) as runner:
        runner.start(request())
        runner.cancel("g")
        runner.start(request())
        await runner.wait_idle()
    assert sorted(result.attempt for result in results) == [0, 1, 2]


async def test_a_rollout_that_ignores_its_cancellation_is_not_delivered():
    class Stubborn(MultiTurn):
        async def reply(self, rollout):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return

    environment = Stubborn(name="single", rubric=Rubric([exact]), train=[TASK])
    results = []
    async with RolloutRunner({"single": environment}, ScriptedSampler(["yes"]), results.append) as runner:
        runner.start(request())
        await asyncio.sleep(0.01)
        runner.cancel("g")
        await asyncio.wait_for(runner.wait_idle(), 5)
    assert results == []


async def test_an_unknown_environment_is_a_failure_that_lists_the_known_ones():
    results = []
    async with RolloutRunner({"single": ENVIRONMENT}, ScriptedSampler(["yes"]), results.append) as runner:
        runner.start(request(environment="other"))
        await runner.wait_idle()
    assert {result.trace.failure.kind for result in results} == {FailureClass.ENVIRONMENT}
    assert "which has single" in results[0].trace.failure.message


async def test_leaving_the_context_cancels_what_runs():
    sampler = ScriptedSampler(["yes"], seconds=60)
    async with RolloutRunner({"single": ENVIRONMENT}, sampler, lambda result: None) as runner:
        runner.start(request())
        await asyncio.sleep(0.01)
    assert sampler.num_waiting == 0


@group_reward
async def longest(answers):
    await asyncio.sleep(0)
    return [len(answer) == max(map(len, answers)) for answer in answers]


GROUPED = SingleTurn(name="grouped", rubric=Rubric([exact, longest]), train=[TASK])


async def test_a_group_that_is_scored_together_is_held_back_until_it_is_complete():
    results = []
    release = asyncio.Event()

    class Waits(SingleTurn):
        async def setup(self, rollout):
            if rollout.attempt == 2:
                await release.wait()

    environment = Waits(name="grouped", rubric=Rubric([exact, longest]), train=[TASK])
    async with RolloutRunner(
        {"grouped": environment}, ScriptedSampler(["yes", "no", "perhaps"]), results.append
    ) as runner:
        runner.start(request(environment="grouped"))
        runner.start(request(environment="grouped"))  # said twice, done once
        await asyncio.sleep(0.02)
        assert (results, runner.num_running) == ([], 3)
        release.set()
        await runner.wait_idle()
    assert [result.attempt for result in results] == [0, 1, 2]
    assert [result.trace.reward for result in results] == [1, 0, 1]
    assert runner.num_running == 0


async def test_failed_rollouts_of_a_group_are_delivered_and_not_seen_by_its_rewards():
    results = []
    sampler = ScriptedSampler(["yes", ConnectionError("gone"), "perhaps"])
    async with RolloutRunner({"grouped": GROUPED}, sampler, results.append) as runner:
        runner.start(request(environment="grouped"))
        await runner.wait_idle()
    assert results[1].trace.failure.kind is FailureClass.MODEL
    assert [results[i].trace.rewards["longest"].value for i in (0, 2)] == [0, 1]


async def test_a_cancelled_group_is_given_up_also_while_it_is_scored():
    scoring = asyncio.Event()

    @group_reward
    async def slow(answers):
        scoring.set()
        await asyncio.sleep(60)

    environment = SingleTurn(name="grouped", rubric=Rubric([slow]), train=[TASK])
    results = []
    async with RolloutRunner({"grouped": environment}, ScriptedSampler(["yes"]), results.append) as runner:
        runner.start(request(environment="grouped"))
        await scoring.wait()
        assert runner.num_running == 3
        runner.cancel("g")
        await asyncio.wait_for(runner.wait_idle(), 5)
        runner.start(request("other"))
        await runner.wait_idle()
    assert [result.group for result in results] == ["other"] * 3


async def test_run_group_scores_the_group_and_a_lone_rollout_is_a_group_of_one():
    sampling = SamplingParameters()
    traces = await run_group(GROUPED, TASK, [0, 1], ScriptedSampler(["yes", "certainly"]), sampling, 0)
    assert [trace.rewards["longest"].value for trace in traces] == [0, 1]
    alone = await run_rollout(GROUPED, TASK, 0, ScriptedSampler(["yes"]), sampling, 0)
    assert alone.reward == 2
