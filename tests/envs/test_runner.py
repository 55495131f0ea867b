import asyncio

from fakes import ScriptedSampler
from hone.envs import FailureClass, MultiTurn, Rubric, SingleTurn, Task, reward, user
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
