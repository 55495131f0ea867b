"""The page of a node's sandboxes: who used what, how they ended, how many at once; from the accounts in its folder alone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from hone.observability.jsonlines import read_lines
from hone.sandbox.node.accounts import NAME, EndedSandbox
from hone.sandbox.node.lifecycle import End
from hone.studio.page import inlined, template, write_page

MAX_ROWS = 20
NUM_BUCKETS = 120
WIDTH, HEIGHT = 900.0, 160.0
QUIET_ENDS = (End.CLOSED, End.LEASE_OVER, End.IDLE, End.CLIENT_GONE)


@dataclass(frozen=True, slots=True)
class Group:
    """What sandboxes used together. lived: the seconds from asking to the end of all of them."""

    name: str
    num_sandboxes: int
    num_calls: int
    cpu_seconds: float
    lived_seconds: float
    peak_memory_bytes: int
    output_bytes: int
    share: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A line or an area in a picture of `WIDTH` by `HEIGHT`. points: as SVG has them. top: the value at the upper edge."""

    name: str
    points: str
    top: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How often sandboxes ended in a way. reasons: the most frequent ones, of ends that nobody asked for."""

    end: str
    count: int
    reasons: list[tuple[str, int]]


def write_sandboxes_page(folders: Sequence[Path], output: Path) -> Path:
    """Write the page of the nodes of these folders; returns where it is. Raises `ValueError` where there are no accounts."""
    return write_page(output, render(read_accounts(folders)))


def read_accounts(folders: Iterable[Path]) -> list[EndedSandbox]:
    """All sandboxes that ended, as they were asked for; a line that a killed node left incomplete is passed over."""
    found = []
    for folder in folders:
        paths = [folder / f"{NAME}.1", folder / NAME]
        if not any(path.exists() for path in paths):
            raise ValueError(f"{folder} has no {NAME}: it is no folder of a node, or none of its sandboxes has ended")
        for path in paths:
            found += [msgspec.convert({"ready_seconds": None, **line}, EndedSandbox) for line in read_lines(path)]
    return sorted(found, key=lambda one: one.asked)


def render(ended: Sequence[EndedSandbox]) -> str:
    """The page."""
    if not ended:
        raise ValueError("no sandbox has ended yet")
    begin, end = min(one.asked for one in ended), max(one.ended for one in ended)
    return template("sandboxes.html.j2").render(
        css=inlined("report.css"),
        facts=facts_of(ended),
        begin=_clock(begin),
        end=_clock(end),
        width=WIDTH,
        height=HEIGHT,
        alive=alive_curve(ended, begin, end),
        ready=ready_curves(ended, begin, end),
        owners=grouped(ended, lambda one: one.owner or "(this process)"),
        images=grouped(ended, lambda one: one.image),
        endings=endings_of(ended),
        heaviest=sorted(ended, key=lambda one: -one.usage.cpu_seconds)[:MAX_ROWS],
        seconds=seconds_text,
        size=bytes_text,
    )


def facts_of(ended: Sequence[EndedSandbox]) -> list[tuple[str, str]]:
    """Numbers at the head of the page."""
    ready = sorted(one.ready_seconds for one in ended if one.ready_seconds is not None)
    troubled = sum(one.end not in QUIET_ENDS for one in ended)
    facts = [
        ("sandboxes", f"{len(ended)}"),
        ("at once, at most", f"{max(count for _, count in _alive(ended))}"),
        ("calls", f"{sum(one.usage.num_calls for one in ended)}"),
        ("processor time", seconds_text(sum(one.usage.cpu_seconds for one in ended))),
        ("ended by trouble", f"{troubled} ({troubled / len(ended):.1%})"),
    ]
    if ready:
        facts.append(("ready after, median", seconds_text(_quantile(ready, 0.5))))
        facts.append(("ready after, 99 %", seconds_text(_quantile(ready, 0.99))))
    return facts


def grouped(ended: Sequence[EndedSandbox], key: Callable[[EndedSandbox], str]) -> list[Group]:
    """Sums by a key, those with most processor time first; what is beyond `MAX_ROWS` together."""
    parts: dict[str, list[EndedSandbox]] = defaultdict(list)
    for one in ended:
        parts[key(one)].append(one)
    ordered = sorted(parts.items(), key=lambda part: -sum(one.usage.cpu_seconds for one in part[1]))
    if len(ordered) > MAX_ROWS:
        rest = [one for _, part in ordered[MAX_ROWS:] for one in part]
        ordered = [*ordered[:MAX_ROWS], (f"{len(ordered) - MAX_ROWS} others", rest)]
    total = sum(one.usage.cpu_seconds for one in ended) or 1.0
    return [_group(name, part, total) for name, part in ordered]


def endings_of(ended: Sequence[EndedSandbox]) -> list[Ending]:
    """How they ended, the most frequent way first."""
    counts = Counter(one.end for one in ended)
    return [
        Ending(
            end.value.replace("_", " "),
            count,
            [] if end in QUIET_ENDS else Counter(one.reason[:200] for one in ended if one.end is end).most_common(5),
        )
        for end, count in counts.most_common()
    ]


def alive_curve(ended: Sequence[EndedSandbox], begin: float, end: float) -> Curve:
    """Sandboxes that were there, in steps."""
    steps = _alive(ended)
    top = max(count for _, count in steps)
    points, before = [(0.0, HEIGHT)], 0
    for moment, count in steps:
        x = _x(moment, begin, end)
        points += [(x, _y(before, top)), (x, _y(count, top))]
        before = count
    return Curve("at once", _text([*points, (WIDTH, HEIGHT)]), f"{top}")


def ready_curves(ended: Sequence[EndedSandbox], begin: float, end: float) -> list[Curve]:
    """Median and 99 % of the seconds from asking to ready, by the time of asking."""
    buckets: dict[int, list[float]] = defaultdict(list)
    for one in ended:
        if one.ready_seconds is not None:
            buckets[int(_x(one.asked, begin, end) / WIDTH * (NUM_BUCKETS - 1))].append(one.ready_seconds)
    if not buckets:
        return []
    quantiles = {
        share: {at: _quantile(sorted(values), share) for at, values in buckets.items()} for share in (0.5, 0.99)
    }
    top = max(quantiles[0.99].values()) or 1.0
    return [
        Curve(
            "median" if share == 0.5 else "99 %",
            _text([(at / (NUM_BUCKETS - 1) * WIDTH, _y(value, top)) for at, value in sorted(values.items())]),
            seconds_text(top),
        )
        for share, values in quantiles.items()
    ]


def seconds_text(seconds: float) -> str:
    """A duration in the unit that fits."""
    for unit, factor in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def bytes_text(size: float) -> str:
    """A size in the unit that fits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def _group(name: str, part: Sequence[EndedSandbox], total: float) -> Group:
    cpu_seconds = sum(one.usage.cpu_seconds for one in part)
    return Group(
        name=name,
        num_sandboxes=len(part),
        num_calls=sum(one.usage.num_calls for one in part),
        cpu_seconds=cpu_seconds,
        lived_seconds=sum(one.ended - one.asked for one in part),
        peak_memory_bytes=max(one.usage.peak_memory_bytes or 0 for one in part),
        output_bytes=sum(one.usage.output_bytes for one in part),
        share=cpu_seconds / total,
    )


def _alive(ended: Sequence[EndedSandbox]) -> list[tuple[float, int]]:
    """How many there were from each moment on at which that changed."""
    changes = [(one.asked, 1) for one in ended] + [(one.ended, -1) for one in ended]
    found, count = [], 0
    for moment, change in sorted(changes, key=lambda one: (one[0], -one[1])):  # one may end in the moment it begins
        count += change
        found.append((moment, count))
    return found


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _x(moment: float, begin: float, end: float) -> float:
    return (moment - begin) / (end - begin) * WIDTH if end > begin else 0.0


def _y(value: float, top: float) -> float:
    return HEIGHT * (1 - value / top) if top else HEIGHT


def _text(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
