"""Metrics of a run as series that a page can draw: by step, by wall-clock, thinned to what a screen can show."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

MAX_POINTS = 1500
"""Points of one curve; a screen is about as wide."""

NOT_METRICS = ("time", "process", "step")

Point = tuple[int | None, float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over a run, in the order of writing. `steps` has None where a line told no step."""

    steps: list[int | None]
    minutes: list[float]
    values: list[float]

    def beginning_and_end(self) -> tuple[float, float]:
        """The means of the first and of the last tenth."""
        count = max(1, len(self.values) // 10)
        return fmean(self.values[:count]), fmean(self.values[-count:])

    def thinned(self) -> "Series":
        """Every n-th point and the last one, at most MAX_POINTS of them."""
        stride = -(-len(self.values) // MAX_POINTS)
        if stride <= 1:
            return self
        chosen = sorted({*range(0, len(self.values), stride), len(self.values) - 1})
        return Series(
            [self.steps[index] for index in chosen],
            [self.minutes[index] for index in chosen],
            [self.values[index] for index in chosen],
        )


def series_of(lines: Iterable[Mapping[str, object]]) -> dict[str, Series]:
    """The series of every metric. A step that a restarted process repeated counts as it was done last."""
    points: dict[str, dict[int, Point]] = defaultdict(dict)
    for number, line in enumerate(lines):
        time, step = line.get("time"), line.get("step")
        if not isinstance(time, int | float):
            continue
        known = step if isinstance(step, int) else None
        # Lines without a step keep their order behind those with one; a metric has the one kind or the other.
        place = number + 2**40 if known is None else known
        for name, value in line.items():
            if name not in NOT_METRICS and isinstance(value, int | float):
                points[name][place] = (known, float(time), float(value))
    started = min((time for series in points.values() for _, time, _ in series.values()), default=0.0)
    return {name: _series([found[place] for place in sorted(found)], started) for name, found in points.items()}


def _series(points: list[Point], started: float) -> Series:
    return Series(
        [step for step, _, _ in points],
        [round((time - started) / 60, 4) for _, time, _ in points],
        [value for _, _, value in points],
    )
