"""The record of a rollout: branches of its graph, its reward, its versions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, Turn, VersionRun
from hone.schema.tasks import Task
from hone.schema.traces import Failure, FailureClass, Node, Reward, StopReason, Trace

TASK = Task(prompt=(Message("user", "hello"),))


def node(text: str, parent: int | None = None) -> Node:
    return Node(Message("user", text), parent)


def trace(*nodes: Node) -> Trace:
    return Trace(environment="test", task=TASK, attempt=0, nodes=list(nodes))


def texts(branches: list[list[Node]]) -> list[str]:
    return ["".join(node.message.content for node in branch) for branch in branches]


def turn(*versions: VersionRun) -> Turn:
    count = sum(run.count for run in versions)
    return Turn(
        Message("assistant", "x"),
        FinishReason.STOP,
        token_ids=[1] * count,
        logprobs=[0.0] * count,
        versions=list(versions),
        num_completion_tokens=count,
    )


def test_a_linear_trace_has_one_branch() -> None:
    assert texts(trace(node("a"), node("b", 0), node("c", 1)).branches()) == ["abc"]


def test_branches_share_what_they_have_in_common() -> None:
    assert texts(trace(node("a"), node("b", 0), node("c", 0), node("d", 1)).branches()) == ["ac", "abd"]


def test_a_trace_may_have_several_roots() -> None:
    assert texts(trace(node("a"), node("b"), node("c", 0)).branches()) == ["b", "ac"]


def test_an_empty_trace_has_no_branches() -> None:
    assert trace().branches() == []


@given(st.data())
def test_every_node_lies_on_a_branch_and_every_leaf_ends_one(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    parents = [data.draw(st.none() | st.integers(0, index - 1)) if index else None for index in range(count)]
    tree = trace(*(node(chr(97 + index), parent) for index, parent in enumerate(parents)))
    branches = tree.branches()
    leaves = [index for index in range(count) if index not in parents]
    assert [branch[-1].message.content for branch in branches] == [chr(97 + leaf) for leaf in leaves]
    assert {item.message.content for branch in branches for item in branch} == {chr(97 + i) for i in range(count)}
    assert all(branch[0].parent is None for branch in branches)


@pytest.mark.parametrize("parent", [0, 1, -1])
def test_a_parent_that_does_not_come_before_its_child_is_refused(parent: int) -> None:
    with pytest.raises(ValueError, match=f"node 0 has parent {parent}"):
        trace(node("a", parent))


def test_the_reward_is_the_weighted_sum() -> None:
    scored = Trace(
        "test", TASK, 0, rewards={"exact": Reward(1.0, 2.0), "format": Reward(0.5, 0.5), "watched": Reward(9.0, 0.0)}
    )
    assert scored.reward == 2.25


def test_a_failed_trace_has_no_reward() -> None:
    failed = Trace(
        "test", TASK, 0, rewards={"exact": Reward(1.0)}, failure=Failure(FailureClass.SANDBOX, "run tests", "node lost")
    )
    with pytest.raises(ValueError, match=r"failed trace has no reward .*sandbox: node lost"):
        _ = failed.reward


def test_the_version_of_a_trace_is_the_lowest_of_its_tokens() -> None:
    nodes = [
        node("a"),
        Node(Message("assistant", "x"), 0, turn(VersionRun(5, 2), VersionRun(6, 1))),
        Node(Message("assistant", "y"), 1, turn(VersionRun(7, 1))),
    ]
    assert trace(*nodes).min_version == 5
    assert trace(*nodes).num_completion_tokens == 4
    assert trace(node("a")).min_version is None


def test_truncation_is_an_outcome_and_no_failure() -> None:
    ended = {reason: Trace("test", TASK, 0, stop_reason=reason).is_truncated for reason in StopReason}
    assert ended == {
        StopReason.COMPLETED: False,
        StopReason.MAX_TURNS: True,
        StopReason.MAX_TOOL_CALLS: True,
        StopReason.MAX_TOKENS: True,
        StopReason.TIMEOUT: True,
    }
