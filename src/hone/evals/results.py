"""What an evaluation found: one light outcome for each rollout, and the numbers over all of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from hone.envs.environment import Environment
from hone.evals.statistics import Estimate, estimate_mean, estimate_pass_at
from hone.schema.traces import FailureClass, Trace


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the numbers need of one trace. Everything after `failure` is meaningless when that is set."""

    task: str
    attempt: int
    failure: FailureClass | None = None
    reward: float = 0.0
    rewards: dict[str, float] = {}
    metrics: dict[str, float] = {}
    is_solved: bool = False
    is_truncated: bool = False
    num_completion_tokens: int = 0


def outcome_of(trace: Trace, environment: Environment) -> Outcome:
    """The outcome that a trace records."""
    if trace.failure is not None:
        return Outcome(trace.task.key, trace.attempt, trace.failure.kind)
    return Outcome(
        task=trace.task.key,
        attempt=trace.attempt,
        reward=trace.reward,
        rewards={name: reward.value for name, reward in trace.rewards.items()},
        metrics=dict(trace.metrics),
        is_solved=environment.is_solved(trace),
        is_truncated=trace.is_truncated,
        num_completion_tokens=trace.num_completion_tokens,
    )


class EvalResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scores of one model on one environment. Failed rollouts are counted in `failures` and in nothing else.

    attempts: the k of avg@k, asked for each task. reward: avg@k of the total reward. pass_at: by k, for the powers of
    two up to `attempts` and for `attempts` itself; which rollout passes is `Environment.is_solved`'s to say.
    truncated: share of rollouts that a budget ended. An estimate is None when no rollout is left to make it from.
    """

    environment: str
    environment_version: str
    model: str
    attempts: int
    num_rollouts: int
    reward: Estimate | None
    rewards: dict[str, Estimate]
    metrics: dict[str, Estimate]
    pass_at: dict[int, Estimate]
    truncated: Estimate | None
    completion_tokens: Estimate | None
    failures: dict[str, int]
    seconds: float = 0.0

    def score(self, name: str) -> Estimate | None:
        """The estimate of a metric or reward by its name."""
        return self.metrics.get(name) or self.rewards.get(name)


def summarise(
    outcomes: Iterable[Outcome], environment: Environment, *, attempts: int, model: str = "", seconds: float = 0.0
) -> EvalResult:
    """The numbers over all outcomes."""
    outcomes = list(outcomes)
    valid = [outcome for outcome in outcomes if outcome.failure is None]
    failures = Counter(outcome.failure.value for outcome in outcomes if outcome.failure is not None)
    return EvalResult(
        environment=environment.name,
        environment_version=environment.version,
        model=model,
        attempts=attempts,
        num_rollouts=len(outcomes),
        reward=estimate_mean(_by_task((o.task, o.reward) for o in valid)),
        rewards=_named((o.task, o.rewards) for o in valid),
        metrics=_named((o.task, o.metrics) for o in valid),
        pass_at=_pass_at(valid, attempts),
        truncated=estimate_mean(_by_task((o.task, float(o.is_truncated)) for o in valid)),
        completion_tokens=estimate_mean(_by_task((o.task, float(o.num_completion_tokens)) for o in valid)),
        failures=dict(failures.most_common()),
        seconds=seconds,
    )


def _by_task(values: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    tasks: defaultdict[str, list[float]] = defaultdict(list)
    for task, value in values:
        tasks[task].append(value)
    return tasks


def _named(values: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, Estimate]:
    names: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    for task, named in values:
        for name, value in named.items():
            names[name].append((task, value))
    estimates = {name: estimate_mean(_by_task(found)) for name, found in names.items()}
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _pass_at(valid: list[Outcome], attempts: int) -> dict[int, Estimate]:
    tasks: defaultdict[str, list[bool]] = defaultdict(list)
    for outcome in valid:
        tasks[outcome.task].append(outcome.is_solved)
    powers = [1 << exponent for exponent in range(attempts.bit_length())]
    estimates = {k: estimate_pass_at(k, tasks.values()) for k in sorted({*powers, attempts})}
    return {k: estimate for k, estimate in estimates.items() if estimate is not None}
