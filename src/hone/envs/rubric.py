"""The weighted rewards and the metrics of an environment: declared with decorators, checked when the rubric is built."""

import asyncio
import inspect
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, overload

import msgspec

from hone.envs.blocking import call_blocking
from hone.envs.failures import RolloutFailure, deadline, failures_as
from hone.envs.isolation import IsolatedError, ProcessDied, call_isolated, place_of
from hone.schema.messages import Message
from hone.schema.traces import AgentRecord, FailureClass, Reward, Trace

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Measure:
    """A function that judges finished rollouts; made by `@reward` and its kin, and still callable as written.

    weight: its share in the total reward; None for a metric. of_group: it judges all rollouts of a group at once.
    blocking: a synchronous function that may take long and runs in a thread; isolated: one that runs in a process of
    its own. deadline_seconds: None takes the rubric's. arguments: what it wants to know, by name. agent: who earns it
    where there are several; None: all of them.
    """

    function: Function
    name: str
    weight: float | None
    of_group: bool
    blocking: bool
    isolated: bool
    deadline_seconds: float | None
    arguments: tuple[str, ...]
    is_async: bool
    agent: str | None = None

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self.function(*positional, **named)

    @property
    def __wrapped__(self) -> Function:
        """The function as written, where `inspect` looks for it."""
        return self.function

    @property
    def is_inline(self) -> bool:
        """Whether the event loop waits for it from beginning to end."""
        return not (self.is_async or self.blocking or self.isolated)

    @property
    def where(self) -> str:
        """What failures call it."""
        kind = "metric" if self.weight is None else "reward"
        return f"group {kind} {self.name}" if self.of_group else f"{kind} {self.name}"


@overload
def reward(function: Function, /) -> Measure: ...
@overload
def reward(
    *,
    weight: float = 1.0,
    name: str | None = None,
    blocking: bool = False,
    isolated: bool = False,
    deadline_seconds: float | None = None,
    agent: str | None = None,
) -> Callable[[Function], Measure]: ...
def reward(
    function: Function | None = None,
    /,
    *,
    weight: float = 1.0,
    name: str | None = None,
    blocking: bool = False,
    isolated: bool = False,
    deadline_seconds: float | None = None,
    agent: str | None = None,
) -> Measure | Callable[[Function], Measure]:
    """Declare a function as a reward: a number that trains, sync or async.

    It names what it wants among task, trace, prompt, completion (the messages after the prompt), answer (the policy's
    last text), reference, info, state and, with several agents, agent_answers (the last text of each, by name)::

        @reward
        def exact(answer: str, reference: str) -> float:
            return float(answer.strip() == reference)

    What it raises, a value that is not finite, and a passed deadline are failures of the rollout, never a zero.
    A synchronous function runs on the event loop of all rollouts and must be quick. One that is not is declared with
    blocking=True, and runs in a thread, or with isolated=True, and runs in a process that is killed at the deadline:
    it must be at the top of a module, and may want anything but the state, which stays in this process. With several
    agents all of them earn it, or the one that `agent` names.
    """
    if not math.isfinite(weight):
        raise ValueError(f"weight {weight} of a reward is not a finite number")

    def declare(function: Function) -> Measure:
        measure = _measure(function, name, float(weight), False, blocking, isolated, deadline_seconds)
        return measure if agent is None else replace(measure, agent=agent)

    return declare if function is None else declare(function)


@overload
def metric(function: Function, /) -> Measure: ...
@overload
def metric(
    *,
    name: str | None = None,
    blocking: bool = False,
    isolated: bool = False,
    deadline_seconds: float | None = None,
) -> Callable[[Function], Measure]: ...
def metric(
    function: Function | None = None,
    /,
    *,
    name: str | None = None,
    blocking: bool = False,
    isolated: bool = False,
    deadline_seconds: float | None = None,
) -> Measure | Callable[[Function], Measure]:
    """Declare a function as a metric: a number that is only watched. Its arguments are those of a `reward`.

    A metric that fails costs no reward: it is missing from the trace, whose info says why under `failed_metrics`.
    """

    def declare(function: Function) -> Measure:
        return _measure(function, name, None, False, blocking, isolated, deadline_seconds)

    return declare if function is None else declare(function)


@overload
def group_reward(function: Function, /) -> Measure: ...
@overload
def group_reward(
    *,
    weight: float = 1.0,
    name: str | None = None,
    blocking: bool = False,
    isolated: bool = False,
    deadline_seconds: float | None = None,
) -> Callable[[Function], Measure]: ...
def group_reward(
    function: Function | None = None,
    /,
    *,
    weight: float = 1.0,
    name: str | None = None,
    blocking: bool = False,
    isolated: bool = False,
    deadline_seconds: float | None = None,
) -> Measure | Callable[[Function], Measure]:
    """Declare a function as a reward of all rollouts of a group, which gives one number for each, in their order.

    It names what it wants among task, prompt, reference and info, which the group shares, and traces, completions and
    answers, with one entry for each rollout::

        @group_reward
        def agrees(answers: list[str]) -> list[float]:
            [(most_common, _)] = Counter(answers).most_common(1)
            return [float(answer == most_common) for answer in answers]

    It sees the rollouts that have not failed, with their other rewards. What it raises, a wrong number of values, a
    value that is not finite, and a passed deadline are failures of all of them, never a zero.
    """
    if not math.isfinite(weight):
        raise ValueError(f"weight {weight} of a reward is not a finite number")

    def declare(function: Function) -> Measure:
        return _measure(function, name, float(weight), True, blocking, isolated, deadline_seconds)

    return declare if function is None else declare(function)


@overload
def group_metric(function: Function, /) -> Measure: ...
@overload
def group_metric(
    *,
    name: str | None = None,
    blocking: bool = False,
    isolated: bool = False,
    deadline_seconds: float | None = None,
) -> Callable[[Function], Measure]: ...
def group_metric(
    function: Function | None = None,
    /,
    *,
    name: str | None = None,
    blocking: bool = False,
    isolated: bool = False,
    deadline_seconds: float | None = None,
) -> Measure | Callable[[Function], Measure]:
    """Declare a function as a metric of all rollouts of a group. Its arguments are those of a `group_reward`."""

    def declare(function: Function) -> Measure:
        return _measure(function, name, None, True, blocking, isolated, deadline_seconds)

    return declare if function is None else declare(function)


@dataclass(frozen=True, slots=True)
class Scores:
    """What a rubric found. failed_metrics: why a metric is missing, by name. agent_rewards: of single agents."""

    rewards: dict[str, Reward] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    failed_metrics: dict[str, str] = field(default_factory=dict)
    agent_rewards: dict[str, dict[str, Reward]] = field(default_factory=dict)


NO_SCORES = Scores()


class Rubric:
    """Rewards and metrics of an environment, at least one reward among them.

    deadline_seconds: for each async, blocking or isolated function that has no deadline of its own.
    """

    def __init__(self, measures: Iterable[Measure], *, deadline_seconds: float = 60.0) -> None:
        self.measures = tuple(measures)
        self.deadline_seconds = deadline_seconds
        _check(self.measures)
        self._own = _Part(tuple(m for m in self.measures if not m.of_group), deadline_seconds)
        self._of_group = _Part(tuple(m for m in self.measures if m.of_group), deadline_seconds)

    @property
    def scores_groups(self) -> bool:
        """Whether a rollout has all its rewards only when those of its group are known."""
        return bool(self._of_group.measures)

    @property
    def group_seconds(self) -> float:
        """How long `score_group` may take."""
        return max((self._of_group.seconds_of(m) for m in self._of_group.awaited), default=0.0)

    async def score(self, trace: Trace, state: Any = None) -> Scores:
        """Judge a rollout, its group aside. Raises a `RolloutFailure` when a reward is no finite number."""
        part = self._own
        arguments = {name: ARGUMENTS[name](trace, state) for name in part.wanted}
        return _scores(part.measures, await part.outcomes(arguments, _number))

    @property
    def agents(self) -> set[str]:
        """Agents with rewards of their own."""
        return {measure.agent for measure in self.measures if measure.agent is not None}

    async def score_group(self, traces: Sequence[Trace]) -> list[Trace]:
        """The traces of one group, scored each on its own, with the rewards and metrics of the group added.

        Those that have failed stay as they are and are not seen by the functions. When a group reward fails, all
        others get its failure.
        """
        valid = [trace for trace in traces if trace.failure is None]
        if not valid or not self.scores_groups:
            return list(traces)
        started, part = time.perf_counter(), self._of_group
        arguments = {name: GROUP_ARGUMENTS[name](valid) for name in part.wanted}
        outcomes = await part.outcomes(arguments, lambda values: _numbers(values, len(valid)))
        seconds = time.perf_counter() - started
        scored = iter(
            [_with_group(trace, part.measures, _at(place, outcomes), seconds) for place, trace in enumerate(valid)]
        )
        return [trace if trace.failure is not None else next(scored) for trace in traces]


Outcome = Any | RolloutFailure
"""What a measure gave, as numbers, or why it gave none."""

ARGUMENTS: dict[str, Callable[[Trace, Any], Any]] = {
    "task": lambda trace, state: trace.task,
    "trace": lambda trace, state: trace,
    "prompt": lambda trace, state: trace.task.prompt,
    "completion": lambda trace, state: _completion(trace),
    "answer": lambda trace, state: _answer(trace),
    "reference": lambda trace, state: trace.task.reference,
    "info": lambda trace, state: trace.task.info,
    "state": lambda trace, state: state,
    "agent_answers": lambda trace, state: _agent_answers(trace),
}

GROUP_ARGUMENTS: dict[str, Callable[[Sequence[Trace]], Any]] = {
    "task": lambda traces: traces[0].task,
    "prompt": lambda traces: traces[0].task.prompt,
    "reference": lambda traces: traces[0].task.reference,
    "info": lambda traces: traces[0].task.info,
    "traces": list,
    "completions": lambda traces: [_completion(trace) for trace in traces],
    "answers": lambda traces: [_answer(trace) for trace in traces],
}


class _Part:
    """The measures that are asked at the same time, and how."""

    def __init__(self, measures: tuple[Measure, ...], deadline_seconds: float) -> None:
        self.measures = measures
        self.inline = tuple(m for m in measures if m.is_inline)
        self.awaited = tuple(m for m in measures if not m.is_inline)
        self.wanted = sorted({name for measure in measures for name in measure.arguments})
        self._deadline_seconds = deadline_seconds

    def seconds_of(self, measure: Measure) -> float:
        return measure.deadline_seconds or self._deadline_seconds

    async def outcomes(self, arguments: Mapping[str, Any], read: Callable[[Any], Any]) -> dict[str, Outcome]:
        """What every measure gives, by name."""
        outcomes = {measure.name: _call(measure, arguments, read) for measure in self.inline}
        if self.awaited:
            awaited = await asyncio.gather(*(self._await(measure, arguments, read) for measure in self.awaited))
            outcomes |= zip((measure.name for measure in self.awaited), awaited, strict=True)
        return outcomes

    async def _await(self, measure: Measure, arguments: Mapping[str, Any], read: Callable[[Any], Any]) -> Outcome:
        try:
            with failures_as(FailureClass.ENVIRONMENT, measure.where):
                return read(await _later(measure, arguments, self.seconds_of(measure)))
        except RolloutFailure as failure:
            return failure


async def _later(measure: Measure, arguments: Mapping[str, Any], seconds: float) -> Any:
    chosen = {name: arguments[name] for name in measure.arguments}
    if measure.blocking:
        return await call_blocking(measure.function, chosen, seconds)
    if measure.isolated:
        try:
            return await call_isolated(measure.function, chosen, seconds)
        except (IsolatedError, ProcessDied) as error:  # the text says where; the traceback here would not
            raise RolloutFailure(FailureClass.ENVIRONMENT, measure.where, str(error)) from error
    async with deadline(seconds):
        return await measure.function(**chosen)


def _call(measure: Measure, arguments: Mapping[str, Any], read: Callable[[Any], Any]) -> Outcome:
    try:
        with failures_as(FailureClass.ENVIRONMENT, measure.where):
            return read(measure.function(**{name: arguments[name] for name in measure.arguments}))
    except RolloutFailure as failure:
        return failure


def _completion(trace: Trace) -> list[Message]:
    return [node.message for node in trace.nodes[len(trace.task.prompt) :]]


def _answer(trace: Trace) -> str:
    return next((node.message.content for node in reversed(trace.nodes) if node.turn is not None), "")


def _agent_answers(trace: Trace) -> dict[str, str]:
    """Empty for an agent that has said nothing."""
    said = {node.agent: node.message.content for node in trace.nodes if node.turn is not None}
    return {name: said.get(name, "") for name in trace.agents}


def _measure(
    function: Function,
    name: str | None,
    weight: float | None,
    of_group: bool,
    blocking: bool,
    isolated: bool,
    deadline_seconds: float | None,
) -> Measure:
    own_name = name or str(getattr(function, "__name__", type(function).__name__))
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    if is_async and (blocking or isolated):
        raise ValueError(f"{own_name} is async; blocking=True and isolated=True are for synchronous functions")
    if blocking and isolated:
        raise ValueError(f"{own_name} is blocking and isolated; it runs either in a thread or in a process, choose one")
    if deadline_seconds is not None and not deadline_seconds > 0:
        raise ValueError(f"deadline_seconds {deadline_seconds} of {own_name} is not positive")
    if deadline_seconds is not None and not (is_async or blocking or isolated):
        raise ValueError(f"{own_name} runs on the event loop, where no deadline can stop it; add blocking=True")
    arguments = _arguments(function, own_name, GROUP_ARGUMENTS if of_group else ARGUMENTS)
    if isolated:
        place_of(function)
        if "state" in arguments:
            raise ValueError(
                f"{own_name} is isolated and wants the state, which stays in its process; use rollout.info"
            )
    return Measure(function, own_name, weight, of_group, blocking, isolated, deadline_seconds, arguments, is_async)


def _arguments(function: Function, name: str, there_are: Collection[str]) -> tuple[str, ...]:
    """The arguments that we must give; those with defaults that we do not know keep them."""
    known = ", ".join(there_are)
    chosen = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{name} takes {parameter}; name the arguments it wants, among {known}")
        if parameter.name in there_are:
            chosen.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise ValueError(f"{name} wants {parameter.name!r}, which is unknown; there are {known}")
    return tuple(chosen)


def _check(measures: tuple[Measure, ...]) -> None:
    for measure in measures:
        if not isinstance(measure, Measure):
            raise TypeError(
                f"a rubric takes functions declared with @reward or @metric (or @group_...), not {measure!r}"
            )
    names = [measure.name for measure in measures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the name {twice[0]!r} is given twice in a rubric; set another with name=...")
    if all(measure.weight is None for measure in measures):
        raise ValueError("a rubric without a reward cannot train; declare one function with @reward")


def _number(value: Any) -> float:
    """A finite number as a float; a claim (bool) counts 1 or 0."""
    if not isinstance(value, float | int | Real):
        if inspect.iscoroutine(value):
            value.close()
        raise TypeError(f"returned {type(value).__name__}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}, not a finite number")
    return number


def _numbers(values: Any, count: int) -> list[float]:
    """One finite number for each of `count` rollouts."""
    if inspect.iscoroutine(values):
        values.close()
    if not isinstance(values, Collection) or isinstance(values, str | bytes | Mapping | Set):
        raise TypeError(f"returned {type(values).__name__}, not a list of numbers, one for each rollout")
    if len(values) != count:
        raise ValueError(f"returned {len(values)} numbers for {count} rollouts")
    return [_number(value) for value in values]


def _scores(measures: tuple[Measure, ...], outcomes: Mapping[str, Outcome]) -> Scores:
    scores = Scores()
    for measure in measures:
        outcome = outcomes[measure.name]
        if measure.weight is None:
            if isinstance(outcome, RolloutFailure):
                scores.failed_metrics[measure.name] = outcome.failure.message
            else:
                scores.metrics[measure.name] = outcome
        elif isinstance(outcome, RolloutFailure):
            raise outcome
        elif measure.agent is not None:
            scores.agent_rewards.setdefault(measure.agent, {})[measure.name] = Reward(outcome, measure.weight)
        else:
            scores.rewards[measure.name] = Reward(outcome, measure.weight)
    return scores


def _at(place: int, outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """What the measures of a group gave one of its rollouts."""
    return {
        name: outcome if isinstance(outcome, RolloutFailure) else outcome[place] for name, outcome in outcomes.items()
    }


def _with_group(trace: Trace, measures: tuple[Measure, ...], outcomes: Mapping[str, Outcome], seconds: float) -> Trace:
    timing = msgspec.structs.replace(
        trace.timing,
        total_seconds=trace.timing.total_seconds + seconds,
        score_seconds=trace.timing.score_seconds + seconds,
    )
    try:
        scores = _scores(measures, outcomes)
    except RolloutFailure as error:
        agents = {name: AgentRecord(agent.trains) for name, agent in trace.agents.items()}
        return msgspec.structs.replace(
            trace, rewards={}, agents=agents, metrics={}, stop_reason=None, failure=error.failure, timing=timing
        )
    info = trace.info
    if scores.failed_metrics:
        info = info | {"failed_metrics": info.get("failed_metrics", {}) | scores.failed_metrics}
    return msgspec.structs.replace(
        trace, rewards=trace.rewards | scores.rewards, metrics=trace.metrics | scores.metrics, info=info, timing=timing
    )
