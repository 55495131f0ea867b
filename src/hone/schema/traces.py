"""The record of a rollout: who wrote which tokens under which weights, what it earned, why it ended."""

from enum import StrEnum
from typing import Any

import msgspec

from hone.schema.messages import Message
from hone.schema.sampling import Turn
from hone.schema.tasks import Task


class StopReason(StrEnum):
    """Why a rollout that has a valid reward ended."""

    COMPLETED = "completed"
    """The environment said that it is over."""
    MAX_TURNS = "max_turns"
    """Truncated: the budget of turns is used up."""
    MAX_TOOL_CALLS = "max_tool_calls"
    """Truncated: the policy wants more tool calls than its budget has left."""
    MAX_TOKENS = "max_tokens"
    """Truncated: the budget of tokens or the context is used up."""
    TIMEOUT = "timeout"
    """Truncated: the budget of time is used up (a budget the policy can learn to keep)."""


TRUNCATED = frozenset(set(StopReason) - {StopReason.COMPLETED})


class FailureClass(StrEnum):
    """Whose trouble kept a rollout from a valid reward. Failures are excluded from group statistics and the loss."""

    MODEL = "model"
    """The engine or endpoint did not answer."""
    TOOL = "tool"
    """A tool or its server broke, or raised what its policy on errors lets fail."""
    SANDBOX = "sandbox"
    """A sandbox could not be made, died, or outlived its lease."""
    JUDGE = "judge"
    """A judge did not answer in time, or gave no verdict that can be read."""
    HARNESS = "harness"
    """The agent program could not be started, crashed, or took no turn."""
    ENVIRONMENT = "environment"
    """The environment's own code raised, or returned what is no reward (NaN, a wrong type)."""
    TIMEOUT = "timeout"
    """The environment's code or an infrastructure wait passed its deadline."""
    WORKER = "worker"
    """The process that ran the rollout died."""
    CANCELLED = "cancelled"
    """Nobody wants the rollout any more, or the engine gave up its request."""


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a rollout has no valid reward: class, where it happened, what was said."""

    kind: FailureClass
    where: str
    message: str


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a trace's graph.

    parent: index of the message before it, None for a root. turn: for what a model wrote, the tokens it saw and wrote;
    messages of others carry none, because the tokens between two turns belong to the later turn's context. agent: in a
    rollout with several agents, whose turn it is.
    """

    message: Message
    parent: int | None = None
    turn: Turn | None = None
    agent: str = ""


class Reward(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A named reward and the weight it has in the total."""

    value: float
    weight: float = 1.0


class AgentRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One of several agents of a rollout: whether its turns train, and what it earned besides the common rewards."""

    trains: bool = True
    rewards: dict[str, Reward] = {}

    @property
    def reward(self) -> float:
        """The weighted sum of its own rewards."""
        return _total(self.rewards)


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the time of a rollout went, in seconds; started_at is Unix time.

    sandbox_seconds: in calls of sandboxes of a node, their creation included, whichever phase they were in; calls that
    ran beside one another add up.
    """

    started_at: float = 0.0
    total_seconds: float = 0.0
    setup_seconds: float = 0.0
    generate_seconds: float = 0.0
    environment_seconds: float = 0.0
    score_seconds: float = 0.0
    sandbox_seconds: float = 0.0


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The record of one rollout of one task. Either `failure` is set, or rewards and stop reason are valid.

    environment, environment_version: what was attempted. group: the id of the rollouts that are compared with one
    another; attempt: the number among them. nodes: the messages, the task's prompt first. rewards, metrics: by the names
    of their functions. info: what environment and harness remember. agents: those of a rollout with several, by name;
    `rewards` are common to all of them then.
    """

    environment: str
    task: Task
    attempt: int
    environment_version: str = ""
    group: str = ""
    nodes: list[Node] = []
    rewards: dict[str, Reward] = {}
    metrics: dict[str, float] = {}
    stop_reason: StopReason | None = None
    failure: Failure | None = None
    timing: Timing = Timing()
    info: dict[str, Any] = {}
    agents: dict[str, AgentRecord] = {}

    def __post_init__(self) -> None:
        for index, node in enumerate(self.nodes):
            if node.parent is not None and not 0 <= node.parent < index:
                raise ValueError(f"node {index} has parent {node.parent}; a parent comes before its children")

    @property
    def reward(self) -> float:
        """The weighted sum of the named rewards; meaningless, hence an error, on a failed trace.

        With several agents, the mean of what those earned that train.
        """
        if self.failure is not None:
            raise ValueError(f"a failed trace has no reward ({self.failure.kind}: {self.failure.message})")
        if not self.agents:
            return _total(self.rewards)
        own = [agent.reward for agent in self.agents.values() if agent.trains]
        return _total(self.rewards) + sum(own) / max(1, len(own))

    @property
    def agent_rewards(self) -> dict[str, float]:
        """What each agent that trains earned, the common rewards included; without agents, the one policy's, under ""."""
        if not self.agents:
            return {"": self.reward}
        common = _total(self.rewards)
        return {name: common + agent.reward for name, agent in self.agents.items() if agent.trains}

    @property
    def is_truncated(self) -> bool:
        """Whether a budget ended the rollout."""
        return self.stop_reason in TRUNCATED

    @property
    def turns(self) -> list[Turn]:
        """What models wrote, in the order in which it was finished."""
        return [node.turn for node in self.nodes if node.turn is not None]

    @property
    def messages(self) -> list[Message]:
        """All messages, prompt included; a conversation, where there is one branch only."""
        return [node.message for node in self.nodes]

    @property
    def num_completion_tokens(self) -> int:
        """Tokens that were sampled, over all turns."""
        return sum(turn.num_completion_tokens for turn in self.turns)

    @property
    def min_version(self) -> int | None:
        """The lowest policy version among the sampled tokens; None when the endpoint does not tell versions."""
        return min((run.version for turn in self.turns for run in turn.versions), default=None)

    def branches(self) -> list[list[Node]]:
        """Paths from a root to a leaf, in the order of the leaves."""
        inner = {node.parent for node in self.nodes}
        return [self._path(index) for index in range(len(self.nodes)) if index not in inner]

    def _path(self, index: int | None) -> list[Node]:
        path: list[Node] = []
        while index is not None:
            path.append(self.nodes[index])
            index = self.nodes[index].parent
        return path[::-1]


def _total(rewards: dict[str, Reward]) -> float:
    return sum(reward.value * reward.weight for reward in rewards.values())
