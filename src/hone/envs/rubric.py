"""The weighted rewards and the metrics of an environment: declared with decorators, checked when the rubric is built."""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, overload

from hone.envs.blocking import call_blocking
from hone.envs.failures import RolloutFailure, deadline, failures_as
from hone.schema.traces import FailureClass, Reward, Trace

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Measure:
    """A function that judges a finished rollout; made by `@reward` or `@metric`, and still callable as written.

    weight: its share in the total reward; None for a metric. blocking: a synchronous function that may take long and
    runs in a thread. deadline_seconds: None takes the rubric's. arguments: what it wants to know, by name.
    """

    function: Function
    name: str
    weight: float | None
    blocking: bool
    deadline_seconds: float | None
    arguments: tuple[str, ...]
    is_async: bool

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self.function(*positional, **named)


@overload
def reward(function: Function, /) -> Measure: ...
@overload
def reward(
    *, weight: float = 1.0, name: str | None = None, blocking: bool = False, deadline_seconds: float | None = None
) -> Callable[[Function], Measure]: ...
def reward(
    function: Function | None = None,
    /,
    *,
    weight: float = 1.0,
    name: str | None = None,
    blocking: bool = False,
    deadline_seconds: float | None = None,
) -> Measure | Callable[[Function], Measure]:
    """Declare a function as a reward: a number that trains, sync or async.

    It names what it wants among task, trace, prompt, completion (the messages after the prompt), answer (the policy's
    last text), reference, info and state::

        @reward
        def exact(answer: str, reference: str) -> float:
            return float(answer.strip() == reference)

    What it raises, a value that is not finite, and a passed deadline are failures of the rollout, never a zero.
    A synchronous function runs on the event loop of all rollouts and must be quick; one that is not is declared with
    blocking=True.
    """
    if not math.isfinite(weight):
        raise ValueError(f"weight {weight} of a reward is not a finite number")

    def declare(function: Function) -> Measure:
        return _measure(function, name, float(weight), blocking, deadline_seconds)

    return declare if function is None else declare(function)


@overload
def metric(function: Function, /) -> Measure: ...
@overload
def metric(
    *, name: str | None = None, blocking: bool = False, deadline_seconds: float | None = None
) -> Callable[[Function], Measure]: ...
def metric(
    function: Function | None = None,
    /,
    *,
    name: str | None = None,
    blocking: bool = False,
    deadline_seconds: float | None = None,
) -> Measure | Callable[[Function], Measure]:
    """Declare a function as a metric: a number that is only watched. Its arguments are those of a `reward`.

    A metric that fails costs no reward: it is missing from the trace, whose info says why under `failed_metrics`.
    """

    def declare(function: Function) -> Measure:
        return _measure(function, name, None, blocking, deadline_seconds)

    return declare if function is None else declare(function)


@dataclass(frozen=True, slots=True)
class Scores:
    """What a rubric found. failed_metrics: why a metric is missing, by name."""

    rewards: dict[str, Reward] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    failed_metrics: dict[str, str] = field(default_factory=dict)


NO_SCORES = Scores()


class Rubric:
    """Rewards and metrics of an environment, at least one reward among them.

    deadline_seconds: for each async or blocking function that has no deadline of its own.
    """

    def __init__(self, measures: Iterable[Measure], *, deadline_seconds: float = 60.0) -> None:
        self.measures = tuple(measures)
        self.deadline_seconds = deadline_seconds
        _check(self.measures)
        self._inline = tuple(m for m in self.measures if not m.is_async and not m.blocking)
        self._awaited = tuple(m for m in self.measures if m.is_async or m.blocking)
        self._wanted = sorted({name for measure in self.measures for name in measure.arguments})

    async def score(self, trace: Trace, state: Any = None) -> Scores:
        """Judge a rollout. Raises a `RolloutFailure` when a reward does not come out as a finite number."""
        arguments = {name: ARGUMENTS[name](trace, state) for name in self._wanted}
        outcomes = {measure.name: _call(measure, arguments) for measure in self._inline}
        if self._awaited:
            awaited = await asyncio.gather(*(self._await(measure, arguments) for measure in self._awaited))
            outcomes |= zip((measure.name for measure in self._awaited), awaited, strict=True)
        return _scores(self.measures, outcomes)

    async def _await(self, measure: Measure, arguments: Mapping[str, Any]) -> "Outcome":
        seconds = measure.deadline_seconds or self.deadline_seconds
        chosen = {name: arguments[name] for name in measure.arguments}
        try:
            with failures_as(FailureClass.ENVIRONMENT, _where(measure)):
                if measure.blocking:
                    return _number(await call_blocking(measure.function, chosen, seconds))
                async with deadline(seconds):
                    return _number(await measure.function(**chosen))
        except RolloutFailure as failure:
            return failure


Outcome = float | RolloutFailure

ARGUMENTS: dict[str, Callable[[Trace, Any], Any]] = {
    "task": lambda trace, state: trace.task,
    "trace": lambda trace, state: trace,
    "prompt": lambda trace, state: trace.task.prompt,
    "completion": lambda trace, state: [node.message for node in trace.nodes[len(trace.task.prompt) :]],
    "answer": lambda trace, state: _answer(trace),
    "reference": lambda trace, state: trace.task.reference,
    "info": lambda trace, state: trace.task.info,
    "state": lambda trace, state: state,
}


def _answer(trace: Trace) -> str:
    return next((node.message.content for node in reversed(trace.nodes) if node.turn is not None), "")


def _measure(
    function: Function, name: str | None, weight: float | None, blocking: bool, deadline_seconds: float | None
) -> Measure:
    own_name = name or str(getattr(function, "__name__", type(function).__name__))
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    if is_async and blocking:
        raise ValueError(f"{own_name} is async and blocking; blocking=True is for synchronous functions")
    if deadline_seconds is not None and not deadline_seconds > 0:
        raise ValueError(f"deadline_seconds {deadline_seconds} of {own_name} is not positive")
    if deadline_seconds is not None and not (is_async or blocking):
        raise ValueError(f"{own_name} runs on the event loop, where no deadline can stop it; add blocking=True")
    return Measure(function, own_name, weight, blocking, deadline_seconds, _arguments(function, own_name), is_async)


def _arguments(function: Function, name: str) -> tuple[str, ...]:
    """The arguments that we must give; those with defaults that we do not know keep them."""
    known = ", ".join(ARGUMENTS)
    chosen = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{name} takes {parameter}; name the arguments it wants, among {known}")
        if parameter.name in ARGUMENTS:
            chosen.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise ValueError(f"{name} wants {parameter.name!r}, which is unknown; there are {known}")
    return tuple(chosen)


def _check(measures: tuple[Measure, ...]) -> None:
    for measure in measures:
        if not isinstance(measure, Measure):
            raise TypeError(f"a rubric takes functions declared with @reward or @metric, not {measure!r}")
    names = [measure.name for measure in measures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the name {twice[0]!r} is given twice in a rubric; set another with name=...")
    if all(measure.weight is None for measure in measures):
        raise ValueError("a rubric without a reward cannot train; declare one function with @reward")


def _call(measure: Measure, arguments: Mapping[str, Any]) -> Outcome:
    try:
        with failures_as(FailureClass.ENVIRONMENT, _where(measure)):
            return _number(measure.function(**{name: arguments[name] for name in measure.arguments}))
    except RolloutFailure as failure:
        return failure


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
        else:
            scores.rewards[measure.name] = Reward(outcome, measure.weight)
    return scores


def _where(measure: Measure) -> str:
    return f"{'metric' if measure.weight is None else 'reward'} {measure.name}"
