"""A scored trace to training samples: the tokens of each branch exactly as they were sampled."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hone.orchestrator.advantages import Estimator, advantages
from hone.schema.batches import TrainingSample
from hone.schema.sampling import Turn
from hone.schema.traces import FailureClass, Node, Trace


class UntrainableTraceError(ValueError):
    """A trace without sampled tokens, or whose tokens, logprobs and versions do not fit together; `kind`: by whom."""

    def __init__(self, kind: FailureClass, complaint: str) -> None:
        super().__init__(complaint)
        self.kind = kind


class Trainable(NamedTuple):
    """What a trace brings to its group: the total reward, the lowest version among the tokens that may train, and with
    several agents what each of those earned that train."""

    reward: float
    min_version: int
    agent_rewards: tuple[float, ...] = ()


class Credit(NamedTuple):
    """What an agent of a trace earned, and how that compares with the same agent in the other traces of the group."""

    reward: float
    advantage: float


def check_trainable(trace: Trace) -> Trainable:
    """Raise `UntrainableTraceError` unless `training_samples` can make samples of the trace."""
    versions: list[int] = []
    for node in trace.nodes:
        turn = node.turn
        if turn is None or not learns(trace, node):
            continue
        num_tokens, num_versioned = len(turn.token_ids), 0
        for run in turn.versions:
            num_versioned += run.count
            if run.count:
                versions.append(run.version)
        if len(turn.logprobs) != num_tokens:
            complaint = f"{num_tokens} sampled tokens, but {len(turn.logprobs)} logprobs"
            raise UntrainableTraceError(FailureClass.MODEL, complaint)
        if num_versioned != num_tokens:
            complaint = f"{num_tokens} sampled tokens, but versions of {num_versioned}"
            raise UntrainableTraceError(FailureClass.MODEL, complaint)
    if not versions:
        raise UntrainableTraceError(
            FailureClass.ENVIRONMENT, "the rollout ended without a sampled token; there is nothing to train"
        )
    reward = trace.reward
    if not math.isfinite(reward):
        raise UntrainableTraceError(FailureClass.ENVIRONMENT, f"the reward is {reward}")
    return Trainable(reward, min(versions), agent_rewards(trace))


def learns(trace: Trace, node: Node) -> bool:
    """Whether a turn is one of those that train."""
    agent = trace.agents.get(node.agent)
    return agent is None or agent.trains


def agent_rewards(trace: Trace) -> tuple[float, ...]:
    """What each agent earned that trains, in the order of their names; empty for a trace of one policy."""
    return tuple(reward for _, reward in sorted(trace.agent_rewards.items())) if trace.agents else ()


def credits_of(traces: Sequence[Trace], estimator: Estimator) -> list[dict[str, Credit]]:
    """For each trace of a group the credit of each agent that trains; "" is the policy of a trace without agents.

    An agent that fewer than two traces have is compared with nothing, and not trained.
    """
    rewards = [trace.agent_rewards for trace in traces]
    credited: list[dict[str, Credit]] = [{} for _ in traces]
    for name in dict.fromkeys(name for found in rewards for name in found):
        places = [place for place, found in enumerate(rewards) if name in found]
        if len(places) < 2:
            continue
        values = advantages(estimator, [rewards[place][name] for place in places])
        for place, value in zip(places, values, strict=True):
            credited[place][name] = Credit(rewards[place][name], value)
    return credited


def training_samples(trace: Trace, reward: float, advantage: float, temperature: float) -> list[TrainingSample]:
    """The samples of a trace of one policy; `reward` is the trace's, which costs time to add up."""
    return agent_samples(trace, {"": Credit(reward, advantage)}, temperature)


def agent_samples(trace: Trace, credited: Mapping[str, Credit], temperature: float) -> list[TrainingSample]:
    """One sample for each branch that has tokens to train: those of agents with a credit.

    A node that several branches share trains in the first of them only; in the others its tokens are context.
    """
    samples = []
    trained: set[int] = set()
    branches = [trace.nodes] if is_chain(trace) else trace.branches()
    for branch in branches:
        turns: list[Turn] = []
        shares: list[Credit | None] = []
        for node in branch:
            if node.turn is None:
                continue
            turns.append(node.turn)
            shares.append(None if id(node) in trained else credited.get(node.agent))
            trained.add(id(node))
        if any(share is not None and turn.token_ids for turn, share in zip(turns, shares, strict=True)):
            samples.append(_sample(trace, turns, shares, temperature))
    return samples


def is_chain(trace: Trace) -> bool:
    """Whether each message follows the one before it, so that there is one branch: the common case."""
    return all(node.parent == index - 1 for index, node in enumerate(trace.nodes) if index)


def _sample(trace: Trace, turns: Sequence[Turn], shares: Sequence[Credit | None], temperature: float) -> TrainingSample:
    """The tokens of a branch; those of turns with a share train, the others are context."""
    token_ids: list[int] = []
    loss_mask: list[int] = []
    logprobs: list[float] = []
    advantages: list[float] = []
    versions: list[int] = []
    reward = 0.0
    for turn, share in zip(turns, shares, strict=True):
        context, sampled = len(turn.context_token_ids), len(turn.token_ids)
        token_ids += turn.context_token_ids
        token_ids += turn.token_ids
        loss_mask += [0] * context + [int(share is not None)] * sampled
        logprobs += [0.0] * context
        logprobs += turn.logprobs if share is not None else [0.0] * sampled
        advantages += [0.0] * context + [0.0 if share is None else share.advantage] * sampled
        if share is not None:
            reward = share.reward
            versions += [run.version for run in turn.versions if run.count]
    return TrainingSample(
        token_ids=token_ids,
        loss_mask=loss_mask,
        logprobs=logprobs,
        advantages=advantages,
        temperature=temperature,
        version=min(versions),
        group=trace.group,
        attempt=trace.attempt,
        reward=reward,
    )
