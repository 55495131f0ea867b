"""`hone synth`: training data from the rollouts of a teacher."""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hone.cli.arguments import EXTRA, overrides
from hone.cli.running import run_rollouts

if TYPE_CHECKING:
    from rich.table import Table

    from hone.config.synthesis import SynthesisFile
    from hone.envs.sampler import Sampler
    from hone.launch.console import StageConsole
    from hone.synth.synthesis import Synthesis
    from hone.synth.teach import Progress


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(context_settings=EXTRA)(synth)


def synth(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="TOML file with [teacher], [[environments]], [rollouts], [keep].")],
) -> None:
    """Let a teacher attempt tasks, keep the best conversations, write them for SFT with a data card.

    Interrupted, the same command goes on; failed rollouts are tried again. Changed filters select anew from the traces
    that are there. Fields of the file are overridden by --section.field=value.
    """
    from hone.config.load import load_synthesis
    from hone.launch.console import StageConsole

    settings = load_synthesis(file, overrides(context))
    console = StageConsole()
    made = run_rollouts(_synthesise(settings, console))
    console.table(_table(made))
    for path in made.files:
        typer.echo(path)
    typer.echo(made.folder / "README.md")


async def _synthesise(settings: "SynthesisFile", console: "StageConsole") -> "Synthesis":
    from hone.config.synthesis import GOLD
    from hone.launch.samplers import source_of
    from hone.synth.synthesis import synthesise

    target = settings.teacher.target
    source = "" if target == GOLD else source_of(target, settings.teacher.model)
    total = settings.rollouts.num_tasks * settings.rollouts.num_attempts
    async with _teacher(settings) as sampler:
        with console.counting(f"synth {settings.synthesis.name}", total) as update:

            def show(progress: "Progress") -> None:
                failed = f" · {progress.num_failed} failed" if progress.num_failed else ""
                update(progress.num_done, progress.num_total, f"reward {progress.mean_reward:.3f}{failed}")

            return await synthesise(settings, sampler, source=source, progress=show)


@contextlib.asynccontextmanager
async def _teacher(settings: "SynthesisFile") -> "AsyncIterator[Sampler | None]":
    from hone.config.synthesis import GOLD
    from hone.launch.samplers import sampler_for

    teacher = settings.teacher
    if teacher.target == GOLD:
        yield None
        return
    async with sampler_for(
        teacher.target,
        model=teacher.model,
        api_key=_key(teacher.api_key_variable),
        deadline_seconds=settings.rollouts.deadline_seconds,
    ) as sampler:
        yield sampler


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"teacher.api_key_variable names {variable}, which is not set; export it")
    return key


def _table(made: "Synthesis") -> "Table":
    from rich.table import Table

    table = Table("filter", "dropped", "left", title=f"{made.num_kept:,} conversations")
    if made.failures:
        told = ", ".join(f"{count} {kind}" for kind, count in made.failures.items())
        table.add_row(f"failed rollouts: {told}", f"{sum(made.failures.values()):,}", f"{made.stages[0].num_in:,}")
    for stage in made.stages:
        table.add_row(stage.name, f"{stage.num_dropped:,}", f"{stage.num_out:,}")
    return table
