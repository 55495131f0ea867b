"""Traces of evaluations packed for a page: a light index of all, and their messages in compressed chunks read on demand."""

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hone.evals.folders import FoundCell
from hone.evals.storage import TRACES, read_traces
from hone.schema.traces import Trace
from hone.studio.excerpts import view

CHUNK_TRACES = 64
"""Traces that are compressed together: attempts at one task lie side by side, and their prompts cost nothing twice."""
MAX_CHARACTERS = 20_000
"""Characters of one message that are embedded."""
FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Row:
    """A trace in the list: whose it is and how it ended. cell: index into the cells; outcome: as the filter calls it."""

    cell: int
    task: str
    attempt: int
    outcome: str
    is_truncated: bool
    reward: str
    title: str


@dataclass(frozen=True, slots=True)
class Browser:
    """rows: one for each embedded trace, in order. chunks: base64 of zlib streams of JSON lists of traces, in order."""

    rows: list[Row]
    chunks: list[str]
    num_left_out: int

    def data(self) -> dict[str, Any]:
        """For the page's script: the index as columns, because they are shorter so."""
        columns = {name: [getattr(row, name) for row in self.rows] for name in Row.__slots__}
        return {"columns": columns, "chunks": self.chunks, "chunk_size": CHUNK_TRACES}


def browser_of(cells: Sequence[FoundCell], max_traces: int) -> Browser:
    """The traces of all cells, each cell's share of `max_traces` at most: the first tasks with all their attempts."""
    shares = fair_shares([len(cell.outcomes) for cell in cells], max_traces)
    entries = [entry for index, share in enumerate(shares) for entry in _entries(index, cells[index], share)]
    num_left_out = sum(len(cell.outcomes) for cell in cells) - len(entries)
    return Browser([row for row, _ in entries], list(_chunks([text for _, text in entries])), num_left_out)


def fair_shares(counts: Sequence[int], total: int) -> list[int]:
    """How much of each count fits into `total`: the small ones whole, the others alike."""
    shares = [0] * len(counts)
    remaining = total
    places = sorted(range(len(counts)), key=lambda place: counts[place])
    for done, place in enumerate(places):
        shares[place] = min(counts[place], remaining // (len(places) - done))
        remaining -= shares[place]
    return shares


def _entries(index: int, cell: FoundCell, most: int) -> list[tuple[Row, str]]:
    """One trace for each attempt, a valid one where there is any, tasks in the order in which they were first seen."""
    solved = {(outcome.task, outcome.attempt) for outcome in cell.outcomes if outcome.is_solved}
    kept: dict[tuple[str, int], tuple[Row, str]] = {}
    places: dict[str, int] = {}
    for trace in read_traces(cell.folder / TRACES):
        key = trace.task.key, trace.attempt
        place = places.setdefault(trace.task.key, len(places))
        is_better = trace.failure is None or key not in kept or kept[key][0].outcome == FAILED
        if is_better and place < most:  # each task before it has a trace: a later one cannot be among the first
            kept[key] = _row(index, trace, key in solved), _packed(trace)
    return [kept[key] for key in sorted(kept, key=lambda key: (places[key[0]], key[1]))][:most]


def _row(cell: int, trace: Trace, is_solved: bool) -> Row:
    failed = trace.failure is not None
    return Row(
        cell=cell,
        task=trace.task.key,
        attempt=trace.attempt,
        outcome=FAILED if failed else "solved" if is_solved else "unsolved",
        is_truncated=trace.is_truncated,
        reward="" if failed else f"{trace.reward:.3g}",
        title=view(trace, 0).title.partition(" · ")[2],
    )


def _packed(trace: Trace) -> str:
    shown = asdict(view(trace, MAX_CHARACTERS))
    return json.dumps({name: shown[name] for name in ("failure", "facts", "messages")}, separators=(",", ":"))


def _chunks(texts: Sequence[str]) -> Iterator[str]:
    for start in range(0, len(texts), CHUNK_TRACES):
        chunk = f"[{','.join(texts[start : start + CHUNK_TRACES])}]"
        yield base64.b64encode(zlib.compress(chunk.encode(), 6)).decode()
