"""Means over tasks with 95 % confidence intervals that respect that the attempts of one task are alike.

The task is what is drawn at random, so it is the unit: first the mean of each task's attempts, then the mean over
tasks, with the standard error of the task means (clustered by task). From it:

- for any values, Student's t interval with one degree of freedom less than tasks;
- for proportions (values 0 or 1, pass@k and pass^k), Wilson's score interval, which stays inside [0, 1] and does not collapse
  at 0 and 1. With one trial for each task its sample size is the number of tasks. With more it is the effective one,
  p (1 - p) / se^2, shrunk for the few tasks that se was estimated from (Korn and Graubard 1998); where all tasks agree
  on 0 or 1, nothing is known about trials being independent, and it is the number of tasks again.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist, fmean, stdev

import msgspec

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mean over tasks and its 95 % confidence interval; the bounds are None where one task cannot tell.

    standard_error: of the mean, clustered by task: the standard deviation of the task means over the root of their
    number; None for one task.
    """

    mean: float
    low: float | None
    high: float | None
    num_tasks: int
    standard_error: float | None = None


def estimate_mean(values_of_tasks: Mapping[str, Sequence[float]]) -> Estimate | None:
    """The mean of any values by task; proportions are recognised by values that are all 0 or 1. None without values."""
    values_of_tasks = {task: values for task, values in values_of_tasks.items() if values}
    if not values_of_tasks:
        return None
    means = [fmean(values) for values in values_of_tasks.values()]
    if all(value in (0, 1) for values in values_of_tasks.values() for value in values):
        return estimate_proportion(means, num_values=sum(map(len, values_of_tasks.values())))
    return _mean_estimate(fmean(means), clustered_error(means), len(means))


def estimate_proportion(shares: Sequence[float], num_values: float) -> Estimate:
    """The mean of one share in [0, 1] for each task; num_values: independent trials behind them at most."""
    return _proportion_estimate(fmean(shares), clustered_error(shares), len(shares), num_values)


class RunningMean:
    """What `estimate_mean` says of values that come and go one by one, at a cost that does not depend on their number."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[float, int]] = {}
        self._num_values = 0
        self._num_other = 0
        self._sum = 0.0
        self._sum_of_squares = 0.0

    def add(self, task: str, value: float) -> None:
        """One more value of a task."""
        self._count(task, value, 1)

    def remove(self, task: str, value: float) -> None:
        """Take back a value that was added."""
        self._count(task, value, -1)

    def _count(self, task: str, value: float, times: int) -> None:
        total, count = self._tasks.pop(task, (0.0, 0))
        before = total / count if count else 0.0
        total, count = total + times * value, count + times
        after = total / count if count else 0.0
        if count:
            self._tasks[task] = total, count
        self._num_values += times
        self._num_other += times * (value not in (0, 1))
        self._sum += after - before
        self._sum_of_squares += after**2 - before**2

    def estimate(self) -> Estimate | None:
        """Over the values so far; None without any."""
        num_tasks = len(self._tasks)
        if not num_tasks:
            return None
        mean = self._sum / num_tasks
        spread = max(0.0, self._sum_of_squares - num_tasks * mean**2)
        error = math.sqrt(spread / (num_tasks - 1) / num_tasks) if num_tasks > 1 else None
        if self._num_other:
            return _mean_estimate(mean, error, num_tasks)
        return _proportion_estimate(min(1.0, max(0.0, round(mean, 12))), error, num_tasks, self._num_values)


def estimate_pass_at(k: int, solved_of_tasks: Iterable[Sequence[bool]]) -> Estimate | None:
    """The chance that at least one of k attempts solves a task, over the tasks with k attempts or more."""
    return _estimate_of_k(pass_at, k, solved_of_tasks)


def estimate_pass_all(k: int, solved_of_tasks: Iterable[Sequence[bool]]) -> Estimate | None:
    """The chance that all of k attempts solve a task (pass^k), over the tasks with k attempts or more."""
    return _estimate_of_k(pass_all, k, solved_of_tasks)


def pass_at(k: int, num_attempts: int, num_solved: int) -> float:
    """The unbiased estimate from one task's attempts (Chen et al. 2021): 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_attempts:
        raise ValueError(f"pass@{k} needs at least {k} attempts, not {num_attempts}")
    return 1 - math.comb(num_attempts - num_solved, k) / math.comb(num_attempts, k)


def pass_all(k: int, num_attempts: int, num_solved: int) -> float:
    """The unbiased estimate of pass^k from one task's attempts: C(c, k) / C(n, k)."""
    if not 1 <= k <= num_attempts:
        raise ValueError(f"pass^{k} needs at least {k} attempts, not {num_attempts}")
    return math.comb(num_solved, k) / math.comb(num_attempts, k)


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: exact for one and two degrees, else Hill's expansion (within 0.2 %)."""
    if degrees == 1:
        return math.tan(math.pi * CONFIDENCE / 2)
    if degrees == 2:
        return CONFIDENCE * math.sqrt(2 / (1 - CONFIDENCE**2))
    z, n = Z, degrees
    terms = (
        z,
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4),
    )
    return sum(terms)


def clustered_error(means: Sequence[float]) -> float | None:
    """The standard error of the mean of independent task means; None for fewer than two."""
    return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def student_interval(mean: float, error: float | None, num_tasks: int) -> tuple[float, float] | tuple[None, None]:
    """Student's 95 % interval of a mean of independent task means; error: their `clustered_error`."""
    if error is None:
        return None, None
    reach = student_t(num_tasks - 1) * error
    return mean - reach, mean + reach


def _estimate_of_k(
    share_of: Callable[[int, int, int], float], k: int, solved_of_tasks: Iterable[Sequence[bool]]
) -> Estimate | None:
    tasks = [solved for solved in solved_of_tasks if len(solved) >= k]
    if not tasks:
        return None
    shares = [share_of(k, len(solved), sum(solved)) for solved in tasks]
    return estimate_proportion(shares, num_values=sum(len(solved) for solved in tasks) / k)


def _mean_estimate(mean: float, error: float | None, num_tasks: int) -> Estimate:
    low, high = student_interval(mean, error, num_tasks)
    return Estimate(mean, low, high, num_tasks, error)


def _proportion_estimate(mean: float, error: float | None, num_tasks: int, num_values: float) -> Estimate:
    low, high = _wilson_interval(mean, _effective_size(mean, error, num_tasks, num_values))
    return Estimate(mean, low, high, num_tasks, error)


def _effective_size(mean: float, error: float | None, num_tasks: int, num_values: float) -> float:
    if error is None or num_values <= num_tasks or mean in (0, 1):
        return num_tasks
    size = mean * (1 - mean) / error**2 if error else num_values
    return min(size, num_values) * (Z / student_t(num_tasks - 1)) ** 2


def _wilson_interval(mean: float, size: float) -> tuple[float, float]:
    centre = (mean + Z**2 / (2 * size)) / (1 + Z**2 / size)
    reach = Z / (1 + Z**2 / size) * math.sqrt(mean * (1 - mean) / size + Z**2 / (4 * size**2))
    # Rounding must not push the bounds beyond what they bound.
    return max(0.0, min(mean, centre - reach)), min(1.0, max(mean, centre + reach))
