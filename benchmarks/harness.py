"""What every benchmark shares: the machine it ran on, medians with their spread, the table and the last JSON line."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def machine() -> dict[str, object]:
    """The processor and the cores that this process may use."""
    import os

    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return {"processor": names[0] if names else platform.processor(), "cores": len(os.sched_getaffinity(0))}


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that a figure depends on."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table for people."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=140).print(table)


def finish(name: str, result: Mapping[str, object], *packages: str) -> None:
    """Save the result under benchmarks/results and print it as the last line."""
    full = {"benchmark": name, **result, "versions": versions(*packages), **machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(full, indent=1) + "\n")
    print(json.dumps(full))
