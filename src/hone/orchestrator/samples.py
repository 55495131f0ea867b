"""A scored trace to training samples: the tokens of each branch exactly as they were sampled."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from hone.schema.batches import TrainingSample
from hone.schema.sampling import Turn
from hone.schema.traces import FailureClass, Trace


class UntrainableTraceError(ValueError):
    """A trace without sampled tokens, or whose tokens, logprobs and versions do not fit together; `kind`: by whom."""

    def __init__(self, kind: FailureClass, complaint: str) -> None:
        super().__init__(complaint)
        self.kind = kind


class Trainable(NamedTuple):
    """What a trace brings to its group: the total reward and the lowest version among its sampled tokens."""

    reward: float
    min_version: int


def check_trainable(trace: Trace) -> Trainable:
    """Raise `UntrainableTraceError` unless `training_samples` can make samples of the trace."""
    versions: list[int] = []
    for node in trace.nodes:
        turn = node.turn
        if turn is None:
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
    return Trainable(reward, min(versions))


def training_samples(trace: Trace, reward: float, advantage: float, temperature: float) -> list[TrainingSample]:
    """One sample for each branch that has tokens to train; `reward` is the trace's, which costs time to add up.

    A node that several branches share trains in the first of them only; in the others its tokens are context.
    """
    samples = []
    trained: set[int] = set()
    branches = [trace.nodes] if is_chain(trace) else trace.branches()
    for branch in branches:
        turns = [(id(node), node.turn) for node in branch if node.turn is not None]
        fresh = [turn for identity, turn in turns if identity not in trained and turn.token_ids]
        if fresh:
            masks = [identity not in trained for identity, _ in turns]
            sample = _sample(trace, [turn for _, turn in turns], masks, fresh, advantage, temperature, reward)
            samples.append(sample)
        trained.update(identity for identity, _ in turns)
    return samples


def is_chain(trace: Trace) -> bool:
    """Whether each message follows the one before it, so that there is one branch: the common case."""
    return all(node.parent == index - 1 for index, node in enumerate(trace.nodes) if index)


def _sample(
    trace: Trace,
    turns: Sequence[Turn],
    masks: Sequence[bool],
    fresh: Sequence[Turn],
    advantage: float,
    temperature: float,
    reward: float,
) -> TrainingSample:
    token_ids: list[int] = []
    loss_mask: list[int] = []
    logprobs: list[float] = []
    advantages: list[float] = []
    for turn, trains in zip(turns, masks, strict=True):
        context, sampled = len(turn.context_token_ids), len(turn.token_ids)
        token_ids += turn.context_token_ids
        token_ids += turn.token_ids
        loss_mask += [0] * context + [int(trains)] * sampled
        logprobs += [0.0] * context
        logprobs += turn.logprobs if trains else [0.0] * sampled
        advantages += [0.0] * context + [advantage if trains else 0.0] * sampled
    return TrainingSample(
        token_ids=token_ids,
        loss_mask=loss_mask,
        logprobs=logprobs,
        advantages=advantages,
        temperature=temperature,
        version=min(run.version for turn in fresh for run in turn.versions if run.count),
        group=trace.group,
        attempt=trace.attempt,
        reward=reward,
    )
