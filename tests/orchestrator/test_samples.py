"""Samples carry exactly the tokens of the trace, each sampled token trained once."""

import pytest

from hone.orchestrator.samples import UntrainableTraceError, check_trainable, training_samples
from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, Turn, VersionRun
from hone.schema.tasks import Task
from hone.schema.traces import Node, Reward, StopReason, Trace


def turn(context, sampled, version=0, versions=None, logprobs=None):
    return Turn(
        Message("assistant"),
        FinishReason.STOP,
        context_token_ids=context,
        token_ids=sampled,
        logprobs=[-0.1 * token for token in sampled] if logprobs is None else logprobs,
        versions=[VersionRun(version, len(sampled))] if versions is None else versions,
    )


def user(parent=None):
    return Node(Message("user"), parent)


def policy(parent, *arguments, **keywords):
    return Node(Message("assistant"), parent, turn(*arguments, **keywords))


def trace(*nodes, reward=0.5):
    return Trace(
        environment="e",
        task=Task(prompt=(Message("user"),)),
        attempt=3,
        group="7",
        nodes=list(nodes),
        rewards={"r": Reward(reward)},
        stop_reason=StopReason.COMPLETED,
    )


def test_a_single_turn_is_prompt_without_loss_then_completion_with_loss():
    [sample] = training_samples(
        trace(user(), policy(0, [1, 2], [3, 4], version=5)), 0.5, advantage=0.25, temperature=0.7
    )
    assert sample.token_ids == [1, 2, 3, 4]
    assert sample.loss_mask == [0, 0, 1, 1]
    assert sample.logprobs == pytest.approx([0, 0, -0.3, -0.4])
    assert sample.advantages == [0, 0, 0.25, 0.25]
    assert (sample.version, sample.temperature, sample.reward, sample.group, sample.attempt) == (5, 0.7, 0.5, "7", 3)


def test_turns_of_one_branch_make_one_sample():
    nodes = [user(), policy(0, [1], [2]), user(1), policy(2, [3, 4], [5]), user(3)]
    [sample] = training_samples(trace(*nodes), 0.5, 1.0, 1.0)
    assert sample.token_ids == [1, 2, 3, 4, 5]
    assert sample.loss_mask == [0, 1, 0, 0, 1]


def test_the_version_is_the_lowest_that_sampled_a_token():
    versions = [VersionRun(9, 1), VersionRun(4, 1), VersionRun(6, 1)]
    [sample] = training_samples(trace(user(), policy(0, [1], [2, 3, 4], versions=versions)), 0.5, 1.0, 1.0)
    assert sample.version == 4


def test_a_node_that_branches_share_trains_once():
    nodes = [
        user(),
        policy(0, [1], [2], version=3),
        user(1),
        policy(2, [3], [4]),
        user(1),
        policy(4, [5], [6], version=7),
    ]
    first, second = training_samples(trace(*nodes), 0.5, 1.0, 1.0)
    assert (first.token_ids, first.loss_mask) == ([1, 2, 3, 4], [0, 1, 0, 1])
    assert (second.token_ids, second.loss_mask) == ([1, 2, 5, 6], [0, 0, 0, 1])
    assert second.logprobs == pytest.approx([0, 0, 0, -0.6])
    assert second.advantages == [0, 0, 0, 1]
    assert second.version == 7


def test_a_branch_with_nothing_of_its_own_to_train_is_no_sample():
    nodes = [user(), policy(0, [1], [2]), user(1), user(1)]
    assert len(training_samples(trace(*nodes), 0.5, 1.0, 1.0)) == 1


def test_equal_nodes_of_two_branches_are_two_nodes():
    nodes = [user(), policy(0, [1], [2]), policy(0, [1], [2])]
    assert [sample.loss_mask for sample in training_samples(trace(*nodes), 0.5, 1.0, 1.0)] == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("nodes", "complaint"),
    [
        ([user()], "without a sampled token"),
        ([user(), policy(0, [1], [])], "without a sampled token"),
        ([user(), policy(0, [1], [2, 3], logprobs=[-0.1])], "2 sampled tokens, but 1 logprobs"),
        ([user(), policy(0, [1], [2, 3], versions=[VersionRun(0, 1)])], "2 sampled tokens, but versions of 1"),
        ([user(), policy(0, [1], [2, 3], versions=[])], "2 sampled tokens, but versions of 0"),
    ],
)
def test_a_trace_that_cannot_train_is_a_typed_error(nodes, complaint):
    with pytest.raises(UntrainableTraceError, match=complaint):
        check_trainable(trace(*nodes))


def test_a_trace_that_can_train_passes_the_check():
    check_trainable(trace(user(), policy(0, [1], [2])))
