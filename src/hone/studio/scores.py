"""The headline: what every evaluated policy scores on held-out tasks, with confidence intervals."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hone.evals.report import rows_of
from hone.evals.results import EvalResult
from hone.evals.statistics import Estimate
from hone.evals.storage import read_result

ORDER = ("base", "sft", "rl")


@dataclass(frozen=True, slots=True)
class Rail:
    """An interval drawn on a line from 0 to 1, in percent."""

    left: float
    width: float
    at: float


@dataclass(frozen=True, slots=True)
class Score:
    """One number of the table, ready to be read."""

    environment: str
    score: str
    policy: str
    value: str
    interval: str
    size: str
    rail: Rail | None


def scores_of(evals: Path) -> list[Score]:
    """The scores of all evaluations before and after training, policies that compare beside one another."""
    results = [(label, read_result(folder)) for label, folder in _folders(evals)]
    scores = [score for label, result in results for score in scores_of_result(label, result)]
    places = {key: place for place, key in enumerate(dict.fromkeys((s.environment, s.score) for s in scores))}
    return sorted(scores, key=lambda score: places[score.environment, score.score])


def _folders(evals: Path) -> Iterator[tuple[str, Path]]:
    """Folders with a result and the name of what was evaluated, in the order of a run."""
    found = [(path.relative_to(evals).parts[0], path.parent) for path in sorted(evals.glob("**/result.json"))]
    yield from sorted(found, key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER))


def scores_of_result(label: str, result: EvalResult) -> Iterator[Score]:
    """The rows of one policy on one environment."""
    for name, estimate in rows_of(result).items():
        yield Score(
            environment=result.environment,
            score=name,
            policy=label,
            value=f"{estimate.mean:.3f}",
            interval=_interval(estimate),
            size=f"{estimate.num_tasks:,}",
            rail=_rail(estimate),
        )
    for name, count in result.failures.items():
        yield Score(result.environment, f"failed: {name}", label, f"{count:,}", "", f"of {result.num_rollouts:,}", None)


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.3f} - {estimate.high:.3f}"


def _rail(estimate: Estimate) -> Rail | None:
    low, high = estimate.low, estimate.high
    if low is None or high is None or not 0 <= low <= estimate.mean <= high <= 1:
        return None
    return Rail(left=round(100 * low, 2), width=round(100 * (high - low), 2), at=round(100 * estimate.mean, 2))
