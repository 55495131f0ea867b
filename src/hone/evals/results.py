"""What an evaluation found: one light outcome for each rollout, and the numbers over all of them."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

import msgspec

from hone.evals.statistics import Estimate, estimate_mean, estimate_pass_all, estimate_pass_at
from hone.schema.traces import FailureClass, StopReason, Trace

logger = logging.getLogger("hone.evals.results")

MAX_FAILED_SHARE = 0.05
"""An evaluation of which more failed is not taken for a finished one, unless it says how much it bears."""

TOKENS_PER_PRICE = 1_000_000


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a million tokens cost. cached: of prompt tokens that the endpoint had in its cache; None: as the others."""

    prompt: float = 0.0
    completion: float = 0.0
    cached: float | None = None


class Usage(msgspec.Struct, forbid_unknown_fields=True):
    """Tokens of all rollouts, failed ones and those that ran again included. cached: those of `prompt` that were cached."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def add(self, trace: Trace) -> None:
        """Count the turns of one more rollout."""
        for turn in trace.turns:
            self.prompt += turn.num_prompt_tokens
            self.cached += turn.num_cached_tokens
            self.completion += turn.num_completion_tokens

    def cost(self, prices: Prices) -> float:
        """What the tokens cost at these prices."""
        cached = prices.prompt if prices.cached is None else prices.cached
        paid = (self.prompt - self.cached) * prices.prompt + self.cached * cached + self.completion * prices.completion
        return paid / TOKENS_PER_PRICE


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the numbers need of one trace. Everything after `failure` is meaningless when that is set."""

    task: str
    attempt: int
    failure: FailureClass | None = None
    reward: float = 0.0
    rewards: dict[str, float] = {}
    metrics: dict[str, float] = {}
    is_solved: bool = False
    is_truncated: bool = False
    stop_reason: StopReason | None = None
    num_turns: int = 0
    num_completion_tokens: int = 0


def reaches_one(trace: Trace) -> bool:
    """Whether a scored trace has a reward of 1 or more: what `Environment.is_solved` says unless it is overridden."""
    return trace.reward >= 1 - 1e-9


def outcome_of(trace: Trace, is_solved: Callable[[Trace], bool] = reaches_one) -> Outcome:
    """The outcome that a trace records; is_solved: the environment's, whose errors are a failure of the rollout."""
    if trace.failure is not None:
        return Outcome(trace.task.key, trace.attempt, trace.failure.kind)
    try:
        solved = bool(is_solved(trace))
    except Exception as error:  # code of an environment may raise anything
        logger.warning("environment %r cannot tell whether a rollout solved its task: %r", trace.environment, error)
        return Outcome(trace.task.key, trace.attempt, FailureClass.ENVIRONMENT)
    turns = trace.turns
    return Outcome(
        task=trace.task.key,
        attempt=trace.attempt,
        reward=trace.reward,
        rewards={name: reward.value for name, reward in trace.rewards.items()},
        metrics=dict(trace.metrics),
        is_solved=solved,
        is_truncated=trace.is_truncated,
        stop_reason=trace.stop_reason,
        num_turns=len(turns),
        num_completion_tokens=sum(turn.num_completion_tokens for turn in turns),
    )


class EvalResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scores of one model on one environment. Failed rollouts are counted in `failures` and in nothing else.

    attempts: the k of avg@k, asked for each task. reward: avg@k of the total reward. pass_at, pass_all: pass@k and
    pass^k by k, for the powers of two up to `attempts` and for `attempts` itself; which rollout passes is
    `Environment.is_solved`'s to say. truncated: share of rollouts that a budget ended. An estimate is None when no
    rollout is left to make it from. num_wanted: the rollouts that were asked for; 0 where nobody counted. usage: tokens
    of everything that ran; cost: what they cost, where prices are known. seconds: of this process's part.
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
    pass_all: dict[int, Estimate] = {}
    stop_reasons: dict[str, int] = {}
    num_wanted: int = 0
    max_failed_share: float = MAX_FAILED_SHARE
    usage: Usage = msgspec.field(default_factory=Usage)
    cost: float | None = None

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

    @property
    def shortcoming(self) -> str | None:
        """Why this is not the result that was asked for: rollouts are missing, or too many failed; None if it is."""
        if self.num_rollouts < self.num_wanted:
            return f"{self.num_wanted - self.num_rollouts} of {self.num_wanted} rollouts are missing"
        if self.num_failed > self.max_failed_share * self.num_rollouts:
            return f"{self.num_failed} of {self.num_rollouts} rollouts failed, more than {self.max_failed_share:.0%}"
        return None

    def score(self, name: str) -> Estimate | None:
        """The estimate of a metric or reward by its name."""
        return self.metrics.get(name) or self.rewards.get(name)


def summarise(
    outcomes: Iterable[Outcome],
    *,
    environment: str,
    version: str = "",
    attempts: int,
    model: str = "",
    seconds: float = 0.0,
    num_wanted: int = 0,
    max_failed_share: float = MAX_FAILED_SHARE,
    usage: Usage | None = None,
    prices: Prices | None = None,
) -> EvalResult:
    """The numbers over all outcomes."""
    outcomes = list(outcomes)
    valid = [outcome for outcome in outcomes if outcome.failure is None]
    failures = Counter(outcome.failure.value for outcome in outcomes if outcome.failure is not None)
    stop_reasons = Counter(o.stop_reason.value for o in valid if o.stop_reason is not None)
    usage = usage or Usage()
    return EvalResult(
        environment=environment,
        environment_version=version,
        model=model,
        attempts=attempts,
        num_rollouts=len(outcomes),
        reward=estimate_mean(_by_task((o.task, o.reward) for o in valid)),
        rewards=_named((o.task, o.rewards) for o in valid),
        metrics=_named((o.task, o.metrics) for o in valid),
        pass_at=_of_k(estimate_pass_at, valid, attempts),
        truncated=estimate_mean(_by_task((o.task, float(o.is_truncated)) for o in valid)),
        completion_tokens=estimate_mean(_by_task((o.task, float(o.num_completion_tokens)) for o in valid)),
        failures=dict(failures.most_common()),
        seconds=seconds,
        pass_all=_of_k(estimate_pass_all, valid, attempts),
        stop_reasons=dict(stop_reasons.most_common()),
        num_wanted=num_wanted,
        max_failed_share=max_failed_share,
        usage=usage,
        cost=None if prices is None else usage.cost(prices),
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


def _of_k(
    estimate_of: Callable[[int, Iterable[list[bool]]], Estimate | None], valid: list[Outcome], attempts: int
) -> dict[int, Estimate]:
    tasks: defaultdict[str, list[bool]] = defaultdict(list)
    for outcome in valid:
        tasks[outcome.task].append(outcome.is_solved)
    powers = [1 << exponent for exponent in range(attempts.bit_length())]
    estimates = {k: estimate_of(k, tasks.values()) for k in sorted({*powers, attempts})}
    return {k: estimate for k, estimate in estimates.items() if estimate is not None}
