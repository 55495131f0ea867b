"""Spans of a run as a timeline: what every process did in a window, and the share of the run that each activity took."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MAX_BARS = 1500
"""Bars that one picture of the timeline shows; the window is shortened until they fit."""


@dataclass(frozen=True, slots=True)
class Span:
    """A timed piece of work; `start` is Unix time."""

    name: str
    process: str
    start: float
    seconds: float
    fields: Mapping[str, object]

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class Share:
    """How much of its life a process spent in work of one name.

    What overlaps counts once. A span that sums up many pieces says how long they took together (`busy_seconds`); with
    these, a share of more than 1 is how many were under way at once.
    """

    process: str
    name: str
    seconds: float
    share: float
    count: int


def spans_of(lines: Iterable[Mapping[str, object]]) -> list[Span]:
    """Typed spans, in the order of their starts; lines that are no spans are passed over."""
    spans = []
    for line in lines:
        start, seconds = line.get("start"), line.get("seconds")
        if isinstance(start, int | float) and isinstance(seconds, int | float):
            known = {"name", "process", "start", "seconds"}
            fields = {name: value for name, value in line.items() if name not in known}
            spans.append(Span(str(line.get("name")), str(line.get("process")), start, seconds, fields))
    return sorted(spans, key=lambda span: span.start)


def shares(spans: Sequence[Span]) -> list[Share]:
    """The activities of every process, the largest first."""
    by_process: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_process[span.process].append(span)
    found = []
    for process, own in sorted(by_process.items()):
        life = max(span.end for span in own) - own[0].start
        by_name: dict[str, list[Span]] = defaultdict(list)
        for span in own:
            by_name[span.name].append(span)
        for name, same in by_name.items():
            seconds = busy_seconds(same)
            found.append(Share(process, name, seconds, seconds / life if life > 0 else 0.0, len(same)))
    return sorted(found, key=lambda share: (share.process, -share.seconds))


def busy_seconds(spans: Sequence[Span]) -> float:
    """What the spans say that their pieces took, or else the time that they cover."""
    told = [span.fields.get("busy_seconds") for span in spans]
    numbers = [float(value) for value in told if isinstance(value, int | float)]
    return sum(numbers) if numbers else covered_seconds(spans)


def covered_seconds(spans: Sequence[Span]) -> float:
    """The length of the union of spans that are sorted by their starts."""
    total, reached = 0.0, float("-inf")
    for span in spans:
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def window(spans: Sequence[Span], seconds: float) -> list[Span]:
    """The spans that touch a window of at most `seconds` from the middle of the time in which all processes work."""
    if not spans:
        return []
    begin, end = _common_time(spans)
    middle = (begin + end) / 2
    while True:
        chosen = [span for span in spans if span.end >= middle and span.start <= middle + seconds]
        if len(chosen) <= MAX_BARS or seconds < 1e-3:
            return chosen[:MAX_BARS]
        seconds /= 2


def _common_time(spans: Sequence[Span]) -> tuple[float, float]:
    """From when the last process began to when the first one ended; the whole time if they never work together."""
    starts: dict[str, float] = {}
    ends: dict[str, float] = {}
    for span in spans:
        starts.setdefault(span.process, span.start)
        ends[span.process] = max(span.end, ends.get(span.process, span.end))
    begin, end = max(starts.values()), min(ends.values())
    return (begin, end) if begin < end else (spans[0].start, max(ends.values()))
