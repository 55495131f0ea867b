"""A batch is a function of its traces."""

import pytest

from hone.config.recipe import RlSection
from hone.orchestrator.advantages import advantages
from hone.orchestrator.batching import Tally, make_batch
from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, Turn, VersionRun
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, Node, Reward, StopReason, Timing, Trace
from hone.transport.batches import samples_of


def trace(reward, version=3, stop=StopReason.COMPLETED, started_at=0.0):
    turn = Turn(
        Message("assistant"),
        FinishReason.STOP,
        context_token_ids=[1],
        token_ids=[2, 3],
        logprobs=[-0.5, -0.5],
        versions=[VersionRun(version, 2)],
        num_completion_tokens=2,
    )
    return Trace(
        environment="e",
        task=Task(prompt=(Message("user"),)),
        attempt=0,
        nodes=[Node(Message("user")), Node(turn.message, 0, turn)],
        rewards={"r": Reward(reward)},
        metrics={"m": 2.0},
        stop_reason=stop,
        timing=Timing(started_at, 2.0, 0.0, 1.0, 0.0, 0.5),
    )


GROUPS = [[trace(0.0), trace(1.0, version=4)], [trace(1.0), trace(1.0), trace(0.0, stop=StopReason.MAX_TOKENS)]]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "max_rl"])
def test_advantages_are_those_of_each_group(estimator):
    made = make_batch(6, GROUPS, RlSection(advantage=estimator))
    found = [sample.advantages for sample in samples_of(made.batch)]
    expected = advantages(estimator, [0.0, 1.0]) + advantages(estimator, [1.0, 1.0, 0.0])
    assert found == [pytest.approx([0.0, value, value], rel=1e-6) for value in expected]


def test_batch_normalisation_gives_the_step_unit_deviation():
    made = make_batch(6, GROUPS, RlSection(batch_normalisation=True))
    assert made.metrics["batch/advantage_std"] == pytest.approx(1, rel=1e-4)


def test_the_metrics_describe_the_batch():
    metrics = make_batch(6, GROUPS, RlSection()).metrics
    assert metrics["batch/reward_mean"] == pytest.approx(0.6)
    assert (metrics["batch/staleness_max"], metrics["batch/staleness_mean"]) == (2, pytest.approx(1.8))
    assert (metrics["batch/groups_count"], metrics["batch/samples_count"]) == (2, 5)
    assert (metrics["batch/tokens_count"], metrics["batch/trained_tokens_count"]) == (15, 10)
    assert metrics["batch/truncated_share"] == pytest.approx(0.2)


def test_the_tally_counts_what_was_not_trained_too():
    tally = Tally()
    tally.add("e", trace(1.0, started_at=10.0), 1.0)
    tally.add("e", trace(0.0, started_at=11.0), 0.0)
    tally.num_filtered += 1
    tally.failures[FailureClass.TOOL] += 2
    metrics = tally.metrics()
    assert (metrics["rollout/reward_mean"], metrics["rollout/e/reward_r_mean"]) == (0.5, 0.5)
    assert metrics["rollout/e/metric_m_mean"] == 2
    assert (metrics["rollout/filtered_groups_count"], metrics["rollout/failed_tool_count"]) == (1, 2)
    assert tally.timing() == Timing(10.0, 3.0, 0.0, 2.0, 0.0, 1.0)


def test_an_empty_tally_has_no_means():
    assert "rollout/reward_mean" not in Tally().metrics()
    assert Tally().timing().total_seconds == 0


def test_what_an_environment_measures_goes_under_the_name_of_the_recipe():
    tally = Tally()
    tally.add("e-hard", trace(1.0), 1.0)
    assert tally.metrics()["rollout/e-hard/reward_r_mean"] == 1.0
