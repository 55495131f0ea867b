"""Timed pieces of work of the pipeline (generate, score, wait, train, broadcast), one JSON line each."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from hone.observability.jsonlines import JsonLines, read_lines


class Spans:
    """Appends the spans of one process to the run's spans.jsonl."""

    def __init__(self, path: Path, process: str) -> None:
        self._lines = JsonLines(path)
        self._process = process

    @contextlib.contextmanager
    def span(self, name: str, **fields: int | float | str) -> Iterator[None]:
        """Record how long the body takes."""
        started = time.time()
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.record(name, started, time.perf_counter() - clock, **fields)

    def record(self, name: str, started_at: float, seconds: float, **fields: int | float | str) -> None:
        """Record a piece of work that was timed elsewhere; `started_at` is Unix time."""
        line = {
            "name": name,
            "process": self._process,
            "start": round(started_at, 6),
            "seconds": round(seconds, 6),
        }
        self._lines.write(line | fields)

    def close(self) -> None:
        self._lines.close()


def read_spans(path: Path) -> Iterator[dict[str, float | str]]:
    """The lines of a spans.jsonl; a line that a killed process left incomplete is passed over."""
    return read_lines(path)
