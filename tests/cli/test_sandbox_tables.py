"""Tables of sandboxes: what stands in them, and what a live one makes of two looks."""

import io

from rich.console import Console

from hone.cli.sandbox_tables import Look, live_view, sandboxes_table, statistics_table
from hone.schema.sandboxes import SandboxStatus, SandboxUsage


def shown(renderable):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def status(name, cpu_seconds, **usage):
    used = SandboxUsage(cpu_seconds=cpu_seconds, memory_bytes=4_200_000, output_bytes=12, num_calls=3, **usage)
    return SandboxStatus(name, "me", "ready", "python", 10.0, 590.0, used)


def test_each_sandbox_has_a_row_and_what_nobody_counts_is_a_dash():
    text = shown(sandboxes_table([status("n.1.1", 1.5), status("n.1.2", 0.0, num_processes=2)]))
    [row] = [line for line in text.splitlines() if "n.1.1" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["n.1.1", "me", "ready", "python", "10 s", "590 s", "1.50", "4.2 MB", "-", "-", "0 B", "12 B", "3"]


def test_the_live_view_has_those_that_compute_first_and_rates_per_second():
    before = Look(
        {"sandbox/calls": 10, "sandbox/cpu_seconds": 1.0}, [status("n.1.1", 1.0), status("n.1.2", 1.0)], 100.0
    )
    now = Look(
        {"sandbox/calls": 30, "sandbox/cpu_seconds": 2.0, "sandbox/unmatched": 1, "sandbox/draining": 1},
        [status("n.1.1", 1.1), status("n.1.2", 1.9), status("n.1.3", 0.5)],
        102.0,
    )
    text = shown(live_view(now, before, max_rows=2))
    assert "calls/s 10.00" in text
    assert "cores 0.50" in text
    assert "unmatched 1 !" in text
    assert "about to stop" in text
    rows = [line for line in text.splitlines() if "n.1." in line]
    assert ["45%" in rows[0], "5%" in rows[1], len(rows)] == [True, True, 2]
    assert "and 1 more" in text
    assert shown(live_view(before, None))  # the first look has no rates


def test_statistics_are_listed_by_name():
    assert "sandbox/leases │ 3" in shown(statistics_table({"sandbox/leases": 3.0}))
