"""Advantages: a group's rewards to one number for each rollout, and their scale over a step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Estimator = Literal["grpo", "dr_grpo", "rloo", "max_rl"]

EPSILON = 1e-6


def advantages(estimator: Estimator, rewards: Sequence[float]) -> list[float]:
    """One advantage for each reward of a group of at least two."""
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)} rewards has no baseline; at least 2 are needed")
    return ESTIMATORS[estimator](rewards)


def normalised(values: Sequence[float]) -> list[float]:
    """The advantages of a step, divided by their standard deviation (about their mean, population form)."""
    deviation = math.sqrt(_variance(values, len(values)))
    return [value / (deviation + EPSILON) for value in values]


def grpo(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-6) with the sample's standard deviation (n - 1), as verl, slime and TRL have it."""
    mean = _mean(rewards)
    deviation = math.sqrt(_variance(rewards, len(rewards) - 1))
    return [(reward - mean) / (deviation + EPSILON) for reward in rewards]


def dr_grpo(rewards: Sequence[float]) -> list[float]:
    """r - mean (arXiv 2503.20783): without the division, groups of all difficulties weigh the same."""
    mean = _mean(rewards)
    return [reward - mean for reward in rewards]


def rloo(rewards: Sequence[float]) -> list[float]:
    """r - mean of the others (arXiv 2402.14740), which is r - mean times n / (n - 1)."""
    total, others = math.fsum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


def max_rl(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / mean: a success counts the more, the rarer it is. All zero where the mean is not positive."""
    mean = _mean(rewards)
    return [(reward - mean) / mean if mean > 0 else 0.0 for reward in rewards]


ESTIMATORS: Mapping[Estimator, Callable[[Sequence[float]], list[float]]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "max_rl": max_rl,
}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float], degrees: int) -> float:
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values) / degrees
