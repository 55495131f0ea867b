"""What a run's folder tells, part by part; a part that is missing or unreadable becomes a note, never an error."""

import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeVar

from hone.observability.jsonlines import read_lines
from hone.observability.machine import read_machine
from hone.observability.metrics import read_metrics
from hone.observability.spans import read_spans
from hone.orchestrator.evaluation import PREFIX
from hone.schema.traces import Trace
from hone.studio.excerpts import first_and_last
from hone.studio.outcomes import Outcome, outcomes_of
from hone.studio.scores import Score, scores_of
from hone.studio.series import Series, series_of
from hone.studio.timeline import Span, spans_of
from hone.transport.folders import RunFolder
from hone.transport.traces import read_traces

NUM_TRACES = 8
"""Traces of the beginning, and as many of the end."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Trouble:
    """A warning or an error of the logs, with how often it was said."""

    process: str
    level: str
    message: str
    count: int


@dataclass(slots=True)
class Run:
    """Everything that the report shows; `notes` says what is missing."""

    folder: RunFolder
    series: dict[str, Series] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    traces: tuple[list[Trace], list[Trace]] = field(default_factory=lambda: ([], []))
    troubles: list[Trouble] = field(default_factory=list)
    config: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def gather(folder: RunFolder) -> Run:
    """Read what there is."""
    run = Run(folder)
    run.config = _read(run, "config.toml", lambda: folder.config.read_text(), "")
    run.series = _read(run, "metrics", lambda: series_of(read_metrics(folder.metrics)), {})
    run.spans = _read(run, "spans", lambda: spans_of(read_spans(folder.spans)), [])
    run.scores = _read(run, "evaluations", lambda: scores_of(folder.evals), [])
    run.outcomes = _read(run, "ledger", lambda: outcomes_of(folder.ledger), [])
    run.traces = _read(run, "traces", lambda: _traces(folder.traces), run.traces)
    run.machine = _read(run, "machine.json", lambda: read_machine(folder.path / "machine.json"), {})
    run.troubles = _read(run, "logs", lambda: _troubles(folder.logs), [])
    missing = {
        "configuration": run.config,
        "metrics": run.series,
        "spans": run.spans,
        "evaluations": run.scores,
        "ledger of rollouts": run.outcomes,
        "traces": run.traces[0],
    }
    absent = [name for name, found in missing.items() if not found]
    if absent:
        run.notes.append(f"Left out, because the folder has none (yet): {', '.join(absent)}.")
    return run


def _read(run: Run, what: str, reader: Callable[[], T], otherwise: T) -> T:
    try:
        return reader()
    except FileNotFoundError:
        return otherwise
    except (OSError, ValueError, sqlite3.Error) as error:
        run.notes.append(f"{what} could not be read: {error}")
        return otherwise


def _traces(folder: Path) -> tuple[list[Trace], list[Trace]]:
    results = (result for _, result in read_traces(folder))
    return first_and_last((r.trace for r in results if not r.group.startswith(PREFIX)), NUM_TRACES)


def _troubles(folder: Path) -> list[Trouble]:
    lines = chain.from_iterable(read_lines(path) for path in sorted(folder.glob("*.log")))
    bad = [line for line in lines if line.get("level") in ("warning", "error", "critical")]
    counted = Counter((str(line.get("process")), str(line["level"]), str(line.get("message"))) for line in bad)
    return [Trouble(*key, count) for key, count in counted.most_common()]
