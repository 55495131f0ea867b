"""The live table of an evaluation: a line for each model and environment, or plain lines where nobody watches a terminal."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hone.evals.evaluate import Cell
from hone.evals.report import shown_estimate

WIDTH = 160
"""Of tables in a file, where no terminal says how much there is room for."""
REFRESH_SECONDS = 0.5
QUIET_SECONDS = 60.0
"""Between two lines about everything, where the table cannot be shown."""
MAX_MESSAGES = 3
"""Different failures that are told at the end, most frequent first."""


@dataclass(frozen=True, slots=True)
class Place:
    """One cell of the table."""

    model: str
    environment: str

    def __str__(self) -> str:
        return f"{self.model} on {self.environment}"


class Board:
    """Shows the cells while a body of code works on them; what it costs does not depend on the number of rollouts."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def show(self, name: str, line: str) -> None:
        """A line that a server wrote on its standard error; its everyday lines are in its log file."""
        if "warning:" in line or "error:" in line or "Error" in line:
            self.say(f"  {name} {line}")

    @contextlib.asynccontextmanager
    async def showing(self, cells: Mapping[Place, Cell]) -> AsyncIterator[None]:
        """Keep the table up to date while the body runs."""
        watch = self._live if self.console.is_terminal else self._plain
        watcher = asyncio.create_task(watch(cells))
        try:
            yield
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _live(self, cells: Mapping[Place, Cell]) -> None:
        with Live(table_of(cells), console=self.console, auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(REFRESH_SECONDS)
                live.update(table_of(cells), refresh=True)

    async def _plain(self, cells: Mapping[Place, Cell]) -> None:
        """A line for each cell when it is through, and now and then one about all."""
        told = {place for place, cell in cells.items() if _is_through(cell)}
        last = time.monotonic()
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            for place, cell in cells.items():
                if place not in told and _is_through(cell):
                    told.add(place)
                    self.say(f"{place}: {spoken(cell)}")
            if time.monotonic() - last >= QUIET_SECONDS:
                last = time.monotonic()
                done = sum(cell.progress.num_done for cell in cells.values())
                total = sum(cell.progress.num_total for cell in cells.values())
                failed = sum(cell.progress.num_failed for cell in cells.values())
                self.say(f"{done:,} of {total:,} rollouts done, {failed:,} failed")


def table_of(cells: Mapping[Place, Cell]) -> Table:
    """The table at this moment."""
    has_prices = any(cell.cost is not None for cell in cells.values())
    table = Table(box=None, pad_edge=False)
    for name in ("model", "environment", "", "rollouts"):
        table.add_column(name, justify="right" if name == "rollouts" else "left", no_wrap=True)
    for name in ("reward", "95% interval", "failed", "tokens/s", *(("cost",) if has_prices else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for place, cell in cells.items():
        progress, reward = cell.progress, cell.reward()
        value, interval = ("", "") if reward is None else shown_estimate(reward)
        row: list[RenderableType] = [
            Text(place.model),
            Text(place.environment),
            ProgressBar(total=progress.num_total, completed=progress.num_done, width=16),
            f"{progress.num_done:,}/{progress.num_total:,}",
            value,
            interval,
            Text(f"{progress.num_failed:,}", style="bold red" if progress.num_failed else ""),
            f"{cell.tokens_per_second:,.0f}" if cell.num_new_tokens else "",
        ]
        if has_prices:
            row.append("" if cell.cost is None else f"{cell.cost:,.2f}")
        table.add_row(*row)
    return table


def spoken(cell: Cell) -> str:
    """A cell in one line."""
    progress, reward = cell.progress, cell.reward()
    value, interval = ("no score", "") if reward is None else shown_estimate(reward)
    parts = [
        f"reward {value} ({interval})" if interval else value,
        f"{progress.num_done:,} of {progress.num_total:,} rollouts",
        f"{progress.num_failed:,} failed",
    ]
    if cell.cost is not None:
        parts.append(f"cost {cell.cost:,.2f}")
    return " · ".join(parts)


def _is_through(cell: Cell) -> bool:
    return cell.progress.num_done >= cell.progress.num_total
