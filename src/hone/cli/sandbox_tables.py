"""How `hone sandbox` shows the sandboxes and the numbers of a node: plain tables, and one that is alive."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hone.schema.sandboxes import SandboxStatus, SandboxUsage

SUMMARY = (
    ("sandboxes", ("leases", "queued", "starting", "ready")),
    ("cells", ("cells", "warm", "ending", "unmatched")),
    ("so far", ("created", "failed", "refused", "calls")),
)
MAX_ROWS = 30


@dataclass(frozen=True, slots=True)
class Look:
    """What a node said at a moment."""

    statistics: Mapping[str, float]
    sandboxes: Sequence[SandboxStatus]
    seconds: float = field(default_factory=time.monotonic)


def sandboxes_table(sandboxes: Sequence[SandboxStatus]) -> Table:
    """All sandboxes with what they have used so far."""
    table = Table("sandbox", "owner", "stage", "image", "age", "left", *_usage_columns("cpu s"))
    for one in sandboxes:
        age, left = f"{one.age_seconds:.0f} s", f"{one.seconds_left:.0f} s"
        cpu = f"{one.usage.cpu_seconds:.2f}"
        table.add_row(one.sandbox_id, one.owner, one.stage, one.image, age, left, cpu, *_usage_cells(one.usage))
    return table


def statistics_table(statistics: Mapping[str, float]) -> Table:
    """All numbers by name."""
    table = Table("metric", "value")
    for name, value in statistics.items():
        table.add_row(name, f"{value:g}")
    return table


def live_view(now: Look, before: Look | None, max_rows: int = MAX_ROWS) -> Group:
    """A node at a glance, with the sandboxes that use its processors most first. before: for what happens per second."""
    rows = sorted(_cpu_shares(now, before), key=lambda row: -row[0])
    table = Table("sandbox", "owner", "stage", "image", "age", *_usage_columns("cpu"), expand=True)
    for share, one in rows[:max_rows]:
        cells = (f"{one.age_seconds:.0f} s", f"{share:.0%}", *_usage_cells(one.usage))
        table.add_row(one.sandbox_id, one.owner, one.stage, one.image, *cells)
    left_out = [Text(f"and {len(rows) - max_rows} more", "dim")] if len(rows) > max_rows else []
    return Group(_summary(now, before), table, *left_out)


def _summary(now: Look, before: Look | None) -> Table:
    grid = Table.grid(padding=(0, 3))
    for title, names in SUMMARY:
        values = [
            Text.assemble((f"{name} ", "dim"), f"{now.statistics[key]:g}", _style(name, now.statistics[key]))
            for name in names
            if (key := f"sandbox/{name}") in now.statistics
        ]
        if values:
            grid.add_row(Text(title, "bold"), *values)
    memory = _bytes(int(now.statistics.get("sandbox/memory_bytes", 0)))
    use = [Text.assemble(("memory ", "dim"), memory)]
    for name, unit in (("cpu_seconds", "cores"), ("calls", "calls/s"), ("created", "cells/s")):
        use.append(Text.assemble((f"{unit} ", "dim"), f"{_rate(f'sandbox/{name}', now, before):.2f}"))
    grid.add_row(Text("use", "bold"), *use)
    if now.statistics.get("sandbox/draining"):
        grid.add_row(Text("takes no more sandboxes, as it is about to stop", "yellow"))
    return grid


def _style(name: str, value: float) -> Text:
    return Text(" !", "red") if name == "unmatched" and value else Text("")


def _rate(name: str, now: Look, before: Look | None) -> float:
    if before is None or now.seconds <= before.seconds:
        return 0.0
    return (now.statistics.get(name, 0.0) - before.statistics.get(name, 0.0)) / (now.seconds - before.seconds)


def _cpu_shares(now: Look, before: Look | None) -> list[tuple[float, SandboxStatus]]:
    """Of one core, since the look before; for a sandbox that was not there then, since it was asked for."""
    known = {one.sandbox_id: one.usage.cpu_seconds for one in before.sandboxes} if before is not None else {}
    shares = []
    for one in now.sandboxes:
        if before is not None and one.sandbox_id in known:
            used, seconds = one.usage.cpu_seconds - known[one.sandbox_id], now.seconds - before.seconds
        else:
            used, seconds = one.usage.cpu_seconds, one.age_seconds
        shares.append((used / seconds if seconds > 0 else 0.0, one))
    return shares


def _usage_columns(cpu: str) -> tuple[str, ...]:
    return (cpu, "memory", "peak", "processes", "disk", "output", "calls")


def _usage_cells(usage: SandboxUsage) -> tuple[str, ...]:
    processes = "-" if usage.num_processes is None else str(usage.num_processes)
    sizes = (_bytes(size) for size in (usage.memory_bytes, usage.peak_memory_bytes))
    return (*sizes, processes, _bytes(usage.disk_bytes), _bytes(usage.output_bytes), str(usage.num_calls))


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
