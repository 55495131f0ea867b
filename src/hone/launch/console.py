"""What a person sees while a stage runs: progress bars fed from metrics.jsonl, and the processes' own lines above them."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

POLL_SECONDS = 0.25

Update = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Bar:
    """A progress bar of one stage: its title, and how a metrics line moves it.

    total: how many steps there will be; None where only the process knows, which says so in the metric `total_of`.
    step_of: name of the metric whose presence marks a line of this bar; shown: metric names and their labels.
    """

    title: str
    total: int | None
    step_of: str
    shown: tuple[tuple[str, str], ...]
    total_of: str = ""


SFT_SHOWN = (("sft/loss", "loss"), ("sft/tokens_per_second", "tokens/s"))
RL_SHOWN = (
    ("train/reward_mean", "reward"),
    ("train/loss", "loss"),
    ("train/staleness_max", "staleness"),
    ("train/samples_per_second", "samples/s"),
)


class StageConsole:
    """Progress bars and log lines of one run on one terminal (or as plain lines in a file)."""

    def __init__(self, verbose: bool = False) -> None:
        self._console = Console(stderr=True)
        self._verbose = verbose

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def show(self, name: str, line: str) -> None:
        """A line that a process wrote on its standard error; its everyday lines are in its log file."""
        if self._verbose or "warning:" in line or "error:" in line or "Error" in line or "starting again" in line:
            self._console.print(f"  [dim]{name}[/dim] {_escape(line)}", highlight=False)

    @contextlib.asynccontextmanager
    async def following(self, metrics: Path, bar: Bar) -> AsyncIterator[None]:
        """Show `bar` while the body runs, moved by the lines that are appended to `metrics`."""
        with self._progress() as progress:
            task = progress.add_task(bar.title, total=bar.total, values="")
            follower = asyncio.create_task(_follow(metrics, bar, progress, task))
            try:
                yield
            finally:
                await asyncio.sleep(POLL_SECONDS)  # let the follower read the stage's last lines
                follower.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await follower

    @contextlib.contextmanager
    def counting(self, title: str, total: int) -> Iterator[Update]:
        """A bar moved by calling the yielded function with how many are done, of how many, and what to say."""
        with self._progress() as progress:
            task = progress.add_task(title, total=total, values="")

            def update(done: int, out_of: int, values: str) -> None:
                progress.update(task, completed=done, total=out_of, values=values)

            yield update

    def table(self, table: Table) -> None:
        self._console.print(table)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console,
        )


async def _follow(path: Path, bar: Bar, progress: Progress, task: TaskID) -> None:
    position = 0
    while True:
        if path.exists():
            with path.open() as file:
                file.seek(position)
                while (line := file.readline()).endswith("\n"):
                    position = file.tell()
                    _move(line, bar, progress, task)
        await asyncio.sleep(POLL_SECONDS)  # files have no event to wait for that works on every file system


def _move(line: str, bar: Bar, progress: Progress, task: TaskID) -> None:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:  # torn by a process that was killed
        return
    if bar.total_of in values:
        progress.update(task, total=values[bar.total_of])
    if bar.step_of not in values or "step" not in values:
        return
    parts = [f"{label} {_short(values[name])}" for name, label in bar.shown if values.get(name) is not None]
    progress.update(task, completed=values["step"], values=" · ".join(parts))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and math.isfinite(value) else f"{value:.3g}"


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
