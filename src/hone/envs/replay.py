"""Judge saved traces again with the environment's present rubric."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from hone.envs.environment import Environment
from hone.envs.failures import RolloutFailure
from hone.envs.rollout import Limits, run_rollout
from hone.schema.messages import ToolSpec
from hone.schema.sampling import FinishReason, SamplingParameters, Turn
from hone.schema.traces import Failure, FailureClass, Node, StopReason, Trace

REWARD = "reward "
"""Where a failure of a reward happened, according to the rubric: `reward NAME`."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A trace as it was and as it is judged now.

    note: why it was not judged again (then `after` is `before`), or what differs from the recorded course.
    """

    before: Trace
    after: Trace
    note: str = ""

    @property
    def difference(self) -> float | None:
        """The new reward less the old one; None where one of them is missing."""
        if self.before.failure is not None or self.after.failure is not None:
            return None
        return self.after.reward - self.before.reward

    @property
    def is_changed(self) -> bool:
        """Whether rewards, metrics or the failure are others than before."""
        old, new = self.before, self.after
        return (old.rewards, old.metrics, old.failure) != (new.rewards, new.metrics, new.failure)


async def replay(environment: Environment, trace: Trace, limits: Limits = Limits()) -> Replayed:
    """Judge one trace again; never raises for what is in it.

    A rubric that looks at `state`, which no trace keeps, sees it made again: the recorded turns are played through the
    environment, tools and replies included. A rollout that failed before it could be judged stays as it is.
    """
    if trace.failure is not None and not trace.failure.where.startswith(REWARD):
        return Replayed(trace, trace, f"failed before it was judged ({trace.failure.kind})")
    judged = (
        await _play_again(environment, trace, limits) if wants_state(environment) else await _judge(environment, trace)
    )
    same_course = judged.failure is not None or judged.messages == trace.messages
    return Replayed(trace, judged, "" if same_course else "the environment replies otherwise now")


def wants_state(environment: Environment) -> bool:
    """Whether a reward or metric looks at what the rollout kept in `rollout.state`."""
    return any("state" in measure.arguments for measure in environment.rubric.measures)


async def _judge(environment: Environment, trace: Trace) -> Trace:
    bare = msgspec.structs.replace(
        trace,
        environment_version=environment.version,
        rewards={},
        metrics={},
        failure=None,
        stop_reason=trace.stop_reason or _stop_reason(trace),
    )
    try:
        scores = await environment.rubric.score(bare)
    except RolloutFailure as error:
        return msgspec.structs.replace(bare, failure=error.failure, stop_reason=None)
    return msgspec.structs.replace(bare, rewards=scores.rewards, metrics=scores.metrics)


async def _play_again(environment: Environment, trace: Trace, limits: Limits) -> Trace:
    played = await run_rollout(
        environment,
        trace.task,
        trace.attempt,
        Recorded(trace.turns),
        SamplingParameters(),
        0,
        limits,
        group=trace.group,
    )
    if played.failure is not None and played.failure.where == "sample":
        more = Failure(FailureClass.ENVIRONMENT, "replay", "the environment asks for more turns than were recorded")
        return msgspec.structs.replace(played, failure=more)
    return played


def _stop_reason(trace: Trace) -> StopReason:
    """Why a rollout ended whose reward failed: its trace does not say."""
    last = trace.turns[-1] if trace.turns else None
    is_cut = last is not None and last.finish_reason is FinishReason.LENGTH
    return StopReason.MAX_TOKENS if is_cut else StopReason.COMPLETED


class Recorded:
    """A sampler that gives the turns of a trace again, tokens included."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._left = iter(turns)

    async def sample(self, branch: Sequence[Node], tools: Sequence[ToolSpec], sampling: SamplingParameters) -> Turn:
        turn = next(self._left, None)
        if turn is None:
            raise LookupError("no more recorded turns")
        return turn
