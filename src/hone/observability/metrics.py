"""Numbers over time: every value goes to metrics.jsonl and, where a port is given, to a Prometheus endpoint."""

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from hone.observability.jsonlines import JsonLines, read_lines


class Metrics:
    """Appends the metrics of one process to the run's metrics.jsonl (names `area/what_unit`).

    Several processes append to one file. A value that is not finite is null in the file, and absent when it is read.
    """

    def __init__(self, path: Path, process: str, *, port: int | None = None, host: str = "127.0.0.1") -> None:
        self._process = process
        self._exporter = None if port is None else _Exporter(process, host, port)
        self._lines = JsonLines(path)

    def write(self, values: Mapping[str, float], step: int | None = None) -> None:
        line: dict[str, object] = {"time": round(time.time(), 3), "process": self._process}
        if step is not None:
            line["step"] = step
        self._lines.write(line | {name: _rounded(value) for name, value in values.items()})
        if self._exporter is not None:
            self._exporter.update(values)

    def close(self) -> None:
        self._lines.close()
        if self._exporter is not None:
            self._exporter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> Iterator[dict[str, float | str]]:
    """The lines of a metrics.jsonl; a line that a killed process left incomplete is passed over."""
    return read_lines(path)


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


class _Exporter:
    def __init__(self, process: str, host: str, port: int) -> None:
        # prometheus_client belongs to the extras; a process without a metrics port does not need it.
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        self._gauge = Gauge
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._process = process
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise ValueError(
                f"cannot serve metrics on {host}:{port} ({error.strerror}); choose another run.metrics_port"
            ) from error

    def update(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = self._gauge(
                    "hone_" + re.sub(r"[^a-zA-Z0-9_]", "_", name), name, ["process"], registry=self._registry
                )
            self._gauges[name].labels(self._process).set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
