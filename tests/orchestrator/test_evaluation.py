"""An evaluation: bounded, retried, added up per environment."""

import msgspec
import pytest

from fakes import ScriptedSampler
from hone.config.recipe import EvaluationSection
from hone.envs import Rubric, SingleTurn, run_rollout, user
from hone.envs import reward as reward_of
from hone.envs.retries import Retries
from hone.evals.asked import sampling_parameters
from hone.evals.evaluate import evaluate
from hone.evals.results import EvalResult
from hone.orchestrator.evaluation import Evaluation
from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, Turn, VersionRun
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, Node, Reward, StopReason, Trace

RETRIES = Retries({FailureClass.TOOL: 1})


class Environment:
    num_held_out_tasks = 3
    version = "1"
    scores_groups = False

    def held_out_task(self, index):
        return Task(prompt=(Message("user", str(index)),))

    def is_solved(self, trace):
        return trace.reward >= 1


class Together(Environment):
    scores_groups = True


def evaluation(environment=Environment, **section):
    chosen = EvaluationSection(**{"num_tasks": 2, **section})
    return Evaluation(7, {"e": environment()}, chosen, run_seed=0, retries=RETRIES)


def trace(request, reward, version=7):
    turn = Turn(
        Message("assistant"), FinishReason.STOP, token_ids=[1], logprobs=[-1.0], versions=[VersionRun(version, 1)]
    )
    return Trace(
        "e",
        request.task,
        request.attempts[0],
        nodes=[Node(turn.message, None, turn)],
        rewards={"exact": Reward(reward)},
        metrics={"length": 4.0},
        stop_reason=StopReason.COMPLETED,
    )


def key(request):
    return request.group, request.attempts[0]


def test_no_more_rollouts_run_than_allowed():
    plan = evaluation(num_attempts=2, max_concurrent=3)
    first = plan.start()
    assert len(first) == 3
    assert plan.start() == []
    plan.finish(key(first[0]), trace(first[0], 1.0))
    assert len(plan.start()) == 1


def test_tasks_beyond_the_held_out_split_are_not_asked_for():
    assert len(evaluation(num_tasks=10).start()) == 3


def test_every_version_is_evaluated_with_the_same_seeds():
    later = Evaluation(8, {"e": Environment()}, EvaluationSection(num_tasks=2), run_seed=0, retries=RETRIES)
    assert [r.seed for r in evaluation().start()] == [r.seed for r in later.start()]
    assert not {r.group for r in evaluation().start()} & {r.group for r in later.start()}


def test_the_report_has_the_mean_of_everything_that_is_named():
    plan = evaluation()
    for request, reward, version in zip(plan.start(), (1.0, 0.0), (7, 9), strict=True):
        plan.finish(key(request), trace(request, reward, version))
    assert plan.is_complete
    assert plan.reward == 0.5
    report = plan.report()
    assert (report["version"], report["min_version"], report["max_version"]) == (7, 7, 9)
    own = msgspec.convert(report["environments"]["e"], EvalResult, strict=False)
    assert (own.num_rollouts, own.num_wanted, own.model) == (2, 2, "v000007")
    assert (own.score("exact").mean, own.score("length").mean, own.pass_at[1].mean) == (0.5, 4, 0.5)
    assert {name: plan.metrics()[f"eval/e/{name}_mean"] for name in ("reward", "solved", "metric_length")} == {
        "reward": 0.5,
        "solved": 0.5,
        "metric_length": 4,
    }


async def test_it_scores_what_an_evaluation_outside_of_training_scores():
    @reward_of
    def exact(answer, reference):
        return float(answer == reference)

    tasks = [Task((user(f"say {n % 4}"),), str(n % 4)) for n in range(8)]
    environment = SingleTurn(name="e", version="1", rubric=Rubric([exact]), train=[], held_out=tasks)
    section = EvaluationSection(num_tasks=6, num_attempts=4, max_concurrent=3)
    sampler = ScriptedSampler(lambda branch: str(len(sampler.calls) % 3))
    plan = Evaluation(0, {"e": environment}, section, run_seed=0, retries=Retries({}))
    traces = []
    while started := plan.start():
        for request in started:
            [attempt] = request.attempts
            found = await run_rollout(environment, request.task, attempt, sampler, request.sampling, request.seed)
            traces.append(found)
            plan.finish(key(request), found)
    assert len(traces) == 16  # four different tasks
    replayed = iter([trace.turns[-1] for trace in traces])
    offline = await evaluate(
        environment,
        ScriptedSampler(lambda branch: next(replayed)),
        num_tasks=6,
        attempts=4,
        sampling=sampling_parameters(section.sampling),
        max_concurrent=1,
        model="v000000",
    )
    assert msgspec.structs.replace(offline, seconds=0) == plan.results()["e"]


def test_failures_are_tried_again_and_then_counted_but_never_rewards():
    plan = evaluation()
    first, second = plan.start()
    assert plan.fail(key(first), FailureClass.CANCELLED) == first
    assert plan.fail(key(first), FailureClass.TOOL) == first
    assert plan.fail(key(first), FailureClass.TOOL) is None
    plan.finish(key(second), trace(second, 1.0))
    assert plan.is_complete
    assert plan.reward == 1.0
    assert plan.report()["environments"]["e"]["failures"] == {"tool": 1}


def test_an_evaluation_in_which_everything_failed_reaches_no_goal():
    plan = evaluation(num_tasks=1)
    [request] = plan.start()
    plan.fail(key(request), FailureClass.TOOL)
    plan.fail(key(request), FailureClass.TOOL)
    assert plan.reward == float("-inf")
    assert plan.report()["reward_mean"] is None
    assert "eval/e/reward_mean" not in plan.metrics()


@pytest.mark.parametrize("attempts", [1, 3])
def test_each_task_is_attempted_so_often(attempts):
    assert len({key(request) for request in evaluation(num_attempts=attempts).start()}) == 2 * attempts


class Broken(Environment):
    def held_out_task(self, index):
        if index == 1:
            raise KeyError("no such row")
        return super().held_out_task(index)

    def is_solved(self, trace):
        raise TypeError("no answer")


def test_code_of_an_environment_that_raises_costs_its_rollouts_and_not_the_evaluation():
    plan = Evaluation(7, {"e": Broken()}, EvaluationSection(num_tasks=2, num_attempts=2), run_seed=0, retries=RETRIES)
    started = plan.start()
    assert len(started) == 2
    for request in started:
        plan.finish(key(request), trace(request, 1.0))
    assert plan.is_complete
    assert plan.metrics() == {"eval/e/failed_count": 4}


def test_rollouts_are_counted_under_the_name_of_the_recipe():
    plan = Evaluation(7, {"hub/e": Environment()}, EvaluationSection(num_tasks=1), run_seed=0, retries=RETRIES)
    [request] = plan.start()
    plan.finish(key(request), trace(request, 1.0))
    assert plan.metrics()["eval/hub/e/reward_mean"] == 1.0


def test_attempts_that_are_scored_together_are_one_request():
    under_way = evaluation(Together, num_attempts=3, max_concurrent=5)
    [first] = under_way.start()
    assert first.attempts == [0, 1, 2]
    assert under_way.environment_of((first.group, 2)) == "e"
    under_way.finish((first.group, 0), trace(first, 1.0))
    assert under_way.fail((first.group, 1), FailureClass.TOOL, is_final=True) is None
    assert [request.attempts for request in under_way.start()] == [[0, 1, 2]]
    again = under_way.fail((first.group, 2), FailureClass.TOOL)
    assert again.attempts == [2]
    assert under_way.waits_for((first.group, 2))


def test_a_group_larger_than_what_may_run_at_once_runs_alone():
    under_way = evaluation(Together, num_attempts=3, max_concurrent=2)
    assert [request.attempts for request in under_way.start()] == [[0, 1, 2]]
    assert under_way.start() == []
