"""`hone run`, `hone sft`, `hone rl`: train by a recipe."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hone.cli.arguments import EXTRA, overrides

if TYPE_CHECKING:
    from hone.launch.stages import Stages

RecipePath = Annotated[Path, typer.Argument(help="TOML file, for example recipes/tiny/reverse.toml.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log lines of every process.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (run, sft, rl):
        app.command(context_settings=EXTRA)(command)


def run(context: typer.Context, recipe: RecipePath, verbose: Verbose = False) -> None:
    """The whole job: evaluate the base model, SFT, RL, evaluate again, write the report.

    Stages that are done are not done again; an interrupted one goes on. Fields of the recipe are overridden by
    --section.field=value.
    """

    async def everything(stages: "Stages") -> None:
        await stages.run()

    _perform(context, recipe, verbose, everything)


def sft(context: typer.Context, recipe: RecipePath, verbose: Verbose = False) -> None:
    """Supervised fine-tuning only (section [sft] of the recipe)."""

    async def only_sft(stages: "Stages") -> None:
        await stages.sft()

    _perform(context, recipe, verbose, only_sft)


def rl(context: typer.Context, recipe: RecipePath, verbose: Verbose = False) -> None:
    """Asynchronous reinforcement learning only (section [rl]), from the SFT result where there is one."""

    async def only_rl(stages: "Stages") -> None:
        await stages.rl()

    _perform(context, recipe, verbose, only_rl)


def _perform(context: typer.Context, path: Path, verbose: bool, job: Callable[["Stages"], Awaitable[None]]) -> None:
    from hone.config.load import load_recipe
    from hone.launch.console import StageConsole
    from hone.launch.preflight import preflight
    from hone.launch.run_folder import claim
    from hone.launch.stages import Stages
    from hone.observability import logs

    recipe = load_recipe(path, overrides(context))
    preflight(recipe)
    with claim(recipe) as folder:
        logs.configure("launcher", folder, console=False)
        asyncio.run(_awaited(job(Stages(recipe, folder, StageConsole(verbose)))))


async def _awaited(job: Awaitable[None]) -> None:
    await job
