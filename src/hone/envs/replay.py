"""Judge saved traces again with the environment's present rubric."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from hone.envs.environment import Environment
from hone.envs.failures import RolloutFailure
from hone.envs.rollout import Limits, run_rollout
from hone.schema.messages import ToolSpec
from hone.schema.sampling import FinishReason, SamplingParameters, Turn
from hone.schema.traces import AgentRecord, Failure, FailureClass, Node, StopReason, Trace

JUDGING = ("reward ", "group reward ", "score")
"""Where failures of judging happen: a reward by its name, and the rollout's deadline while it is judged."""


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
        return (old.rewards, old.agents, old.metrics, old.failure) != (
            new.rewards,
            new.agents,
            new.metrics,
            new.failure,
        )


async def replay(environment: Environment, group: Sequence[Trace], limits: Limits = Limits()) -> list[Replayed]:
    """Judge the traces of one group again; never raises for what is in them.

    A rubric that looks at `state`, which no trace keeps, sees it made again: the recorded turns are played through the
    environment, tools and replies included; one of several agents stays as it is then, and so does a rollout that failed
    before it could be judged.
    """
    judged = [await _judged(environment, trace, limits) for trace in group]
    if environment.scores_groups:
        judged = await environment.rubric.score_group(judged)
    return [
        Replayed(before, after, _note(environment, before, after)) for before, after in zip(group, judged, strict=True)
    ]


def groups_of(traces: Iterable[Trace]) -> list[list[Trace]]:
    """Traces by environment and group, in the order of the first of each."""
    groups: dict[tuple[str, str], list[Trace]] = {}
    for trace in traces:
        groups.setdefault((trace.environment, trace.group or trace.task.key), []).append(trace)
    return list(groups.values())


def wants_state(environment: Environment) -> bool:
    """Whether a reward or metric looks at what the rollout kept in `rollout.state`."""
    return any("state" in measure.arguments for measure in environment.rubric.measures)


async def _judged(environment: Environment, trace: Trace, limits: Limits) -> Trace:
    if _obstacle(environment, trace):
        return trace
    if wants_state(environment):
        return await _play_again(environment, trace, limits)
    return await _judge(environment, trace)


def _obstacle(environment: Environment, trace: Trace) -> str:
    """Why a trace cannot be judged again; empty where it can."""
    if trace.failure is not None and not trace.failure.where.startswith(JUDGING):
        return f"failed before it was judged ({trace.failure.kind})"
    if trace.agents and wants_state(environment):
        return "its rewards look at the state, and what several agents did to it cannot be played again"
    return ""


def _note(environment: Environment, before: Trace, after: Trace) -> str:
    if obstacle := _obstacle(environment, before):
        return obstacle
    same_course = after.failure is not None or after.messages == before.messages
    return "" if same_course else "the environment replies otherwise now"


async def _judge(environment: Environment, trace: Trace) -> Trace:
    """By the rubric alone. What the rollout itself measured stays."""
    judged_by = {measure.name for measure in environment.rubric.measures}
    bare = msgspec.structs.replace(
        trace,
        environment_version=environment.version,
        rewards={},
        agents={name: AgentRecord(agent.trains) for name, agent in trace.agents.items()},
        metrics={name: value for name, value in trace.metrics.items() if name not in judged_by},
        failure=None,
        stop_reason=trace.stop_reason or _stop_reason(trace),
    )
    try:
        scores = await environment.rubric.score(bare)
    except RolloutFailure as error:
        return msgspec.structs.replace(bare, failure=error.failure, stop_reason=None)
    return msgspec.structs.replace(
        bare,
        rewards=scores.rewards,
        agents={
            name: msgspec.structs.replace(agent, rewards=scores.agent_rewards.get(name, {}))
            for name, agent in trace.agents.items()
        },
        metrics=bare.metrics | scores.metrics,
    )


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
        is_alone=False,
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
