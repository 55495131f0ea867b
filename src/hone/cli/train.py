"""`hone run`, `hone sft`, `hone rl`: train by a recipe."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hone.cli.arguments import EXTRA, overrides
from hone.cli.running import run_rollouts

if TYPE_CHECKING:
    from hone.launch.console import StageConsole
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

    from hone.cli.summary import show_results
    from hone.launch.console import StageConsole

    console = StageConsole(verbose)

    async def everything(stages: "Stages", folder: Path) -> None:
        show_results(await stages.run(), folder, console)

    _perform(context, recipe, console, everything)


def sft(context: typer.Context, recipe: RecipePath, verbose: Verbose = False) -> None:
    """Supervised fine-tuning only (section [sft] of the recipe)."""

    from hone.launch.console import StageConsole

    _perform(context, recipe, StageConsole(verbose), lambda stages, _: stages.sft())


def rl(context: typer.Context, recipe: RecipePath, verbose: Verbose = False) -> None:
    """Asynchronous reinforcement learning only (section [rl]), from the SFT result where there is one."""

    from hone.launch.console import StageConsole

    _perform(context, recipe, StageConsole(verbose), lambda stages, _: stages.rl())


def _perform(
    context: typer.Context,
    path: Path,
    console: "StageConsole",
    job: Callable[["Stages", Path], Coroutine[None, None, None]],
) -> None:
    from hone.config.load import load_recipe
    from hone.launch.preflight import preflight
    from hone.launch.run_folder import claim
    from hone.launch.stages import Stages
    from hone.observability import logs

    recipe = load_recipe(path, overrides(context))
    preflight(recipe)
    with claim(recipe) as folder:
        logs.configure("launcher", folder, console=False)
        run_rollouts(job(Stages(recipe, folder, console), folder))
