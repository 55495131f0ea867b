"""Two models on the same tasks: the mean of the paired differences, its interval, and how likely chance is.

Both models attempted the same tasks, and some tasks are harder than others for everybody. So the unit is the difference
of a task's two means: what a task's difficulty adds to both sides cancels out, and the interval is as narrow as the
data allow. The interval is Student's, of the differences. The p-value is that of the sign-flip permutation test: if the
models were alike, each task's difference could as well have had the other sign (Fisher 1935). It assumes no
distribution: all signs are tried where few tasks differ, else many are drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import msgspec
import numpy as np

from hone.evals.results import Outcome
from hone.evals.statistics import clustered_error, student_interval
from hone.schema.seeds import derive_seed

MAX_EXACT = 14
"""So many differing tasks have all their 2^n signs tried."""
NUM_DRAWS = 20_000
"""Signs drawn where there are more; the smallest p-value is then 1 / (NUM_DRAWS + 1)."""
ROWS_AT_ONCE = 1024


class Difference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Second minus first, over the tasks that both have a valid attempt of.

    first, second: their means over these tasks. low, high: 95 % interval of `mean`; None where one task cannot tell.
    """

    num_tasks: int
    first: float
    second: float
    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    p_value: float


@dataclass(frozen=True, slots=True)
class Flip:
    """A task that one model solves in most attempts and the other does not; shares of solved attempts."""

    task: str
    first: float
    second: float

    @property
    def is_gained(self) -> bool:
        """Whether it is the second model that solves it."""
        return self.second > self.first


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on one environment. num_left_out: tasks that only one of the two has a valid attempt of."""

    reward: Difference | None
    solved: Difference | None
    flips: tuple[Flip, ...]
    num_left_out: int


def compare(first: Sequence[Outcome], second: Sequence[Outcome]) -> Comparison:
    """The paired differences of two sets of outcomes; failures are left out."""
    solved = [_by_task(outcomes, solved=True) for outcomes in (first, second)]
    rewards = [_by_task(outcomes, solved=False) for outcomes in (first, second)]
    shared = solved[0].keys() & solved[1].keys()
    return Comparison(
        reward=paired_difference(*rewards),
        solved=paired_difference(*solved),
        flips=tuple(_flips(*solved)),
        num_left_out=len(solved[0].keys() | solved[1].keys()) - len(shared),
    )


def paired_difference(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> Difference | None:
    """The difference of means over the tasks that both have values of; None when there is no such task."""
    shared = sorted(task for task in first.keys() & second.keys() if first[task] and second[task])
    if not shared:
        return None
    means = [(fmean(first[task]), fmean(second[task])) for task in shared]
    differences = [theirs - ours for ours, theirs in means]
    mean, error = fmean(differences), clustered_error(differences)
    low, high = student_interval(mean, error, len(differences))
    return Difference(
        num_tasks=len(shared),
        first=fmean(ours for ours, _ in means),
        second=fmean(theirs for _, theirs in means),
        mean=mean,
        standard_error=error,
        low=low,
        high=high,
        p_value=sign_flip_p_value(differences),
    )


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """The two-sided p-value of the sign-flip permutation test that the differences lie around zero."""
    nonzero = np.array([difference for difference in differences if abs(difference) > 1e-12])
    if not nonzero.size:
        return 1.0
    # Sums that are equal in exact arithmetic must count as equal.
    bound = abs(nonzero.sum()) - 1e-9 * np.abs(nonzero).sum()
    if nonzero.size <= MAX_EXACT:
        bits = np.arange(2**nonzero.size)[:, None] >> np.arange(nonzero.size) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ nonzero) >= bound))
    random = np.random.default_rng(derive_seed(0, "sign flips", nonzero.size))
    num_extreme = 0
    for start in range(0, NUM_DRAWS, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, NUM_DRAWS - start)
        signs = 2 * random.integers(0, 2, size=(rows, nonzero.size), dtype=np.int8) - 1
        num_extreme += int(np.count_nonzero(np.abs(signs @ nonzero) >= bound))
    return (num_extreme + 1) / (NUM_DRAWS + 1)


def _flips(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> list[Flip]:
    pairs = [Flip(task, fmean(first[task]), fmean(second[task])) for task in sorted(first.keys() & second.keys())]
    flipped = [pair for pair in pairs if (pair.first > 0.5) != (pair.second > 0.5)]
    return sorted(flipped, key=lambda flip: (flip.is_gained, -abs(flip.second - flip.first), flip.task))


def _by_task(outcomes: Sequence[Outcome], *, solved: bool) -> dict[str, list[float]]:
    tasks: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.failure is None:
            tasks.setdefault(outcome.task, []).append(float(outcome.is_solved) if solved else outcome.reward)
    return tasks
