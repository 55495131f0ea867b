"""A scored trace to training samples: the tokens of each branch exactly as they were sampled."""

from collections.abc import Sequence

from hone.schema.batches import TrainingSample
from hone.schema.sampling import Turn
from hone.schema.traces import FailureClass, Trace


class UntrainableTraceError(ValueError):
    """A trace without sampled tokens, or whose tokens, logprobs and versions do not fit together; `kind`: by whom."""

    def __init__(self, kind: FailureClass, complaint: str) -> None:
        super().__init__(complaint)
        self.kind = kind


def check_trainable(trace: Trace) -> None:
    """Raise `UntrainableTraceError` unless `training_samples` can make samples of the trace."""
    has_tokens = False
    for turn in trace.turns:
        num_tokens = len(turn.token_ids)
        has_tokens = has_tokens or num_tokens > 0
        if len(turn.logprobs) != num_tokens:
            raise UntrainableTraceError(
                FailureClass.MODEL, f"{num_tokens} sampled tokens, but {len(turn.logprobs)} logprobs"
            )
        num_versioned = sum(run.count for run in turn.versions)
        if num_versioned != num_tokens:
            raise UntrainableTraceError(
                FailureClass.MODEL, f"{num_tokens} sampled tokens, but versions of {num_versioned}"
            )
    if not has_tokens:
        raise UntrainableTraceError(
            FailureClass.ENVIRONMENT, "the rollout ended without a sampled token; there is nothing to train"
        )


def training_samples(trace: Trace, advantage: float, temperature: float) -> list[TrainingSample]:
    """One sample for each branch that has tokens to train.

    A node that several branches share trains in the first of them only; in the others its tokens are context.
    """
    reward = trace.reward
    samples = []
    trained: set[int] = set()
    for branch in trace.branches():
        turns = [(id(node), node.turn) for node in branch if node.turn is not None]
        fresh = [turn for identity, turn in turns if identity not in trained and turn.token_ids]
        if fresh:
            masks = [identity not in trained for identity, _ in turns]
            sample = _sample(trace, [turn for _, turn in turns], masks, fresh, advantage, temperature, reward)
            samples.append(sample)
        trained.update(identity for identity, _ in turns)
    return samples


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
        version=min(run.version for turn in fresh for run in turn.versions),
        group=trace.group,
        attempt=trace.attempt,
        reward=reward,
    )
