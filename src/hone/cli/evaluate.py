"""`hone eval`: run evaluations; compare and report what they found."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hone.cli.arguments import EXTRA, overrides
from hone.cli.running import run_rollouts

if TYPE_CHECKING:
    from hone.config.evaluation import EvaluationFile
    from hone.config.recipe import Recipe
    from hone.evals.evaluate import Pending

Key = Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="API key of an http address.")]

NOT_FINISHED = 1
"""Exit code of an evaluation of which rollouts are missing or too many failed."""


class WithDefaultCommand(TyperGroup):
    """A group that takes what is none of its commands for the arguments of `default`."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`hone eval FILE` is `hone eval run FILE`."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=WithDefaultCommand,
    help="Evaluate models on environments: `hone eval FILE.toml`. Compare and report the results.",
    no_args_is_help=True,
)


@app.command(context_settings=EXTRA)
def run(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(help="A recipe, or an evaluation file with [[environments]] and [[models]]."),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Evaluate this model folder or http address; default: the newest policy of the recipe's run."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the result; default: made from the target.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name at an http address.")] = None,
    api_key: Key = None,
    retry_failures: Annotated[
        bool, typer.Option("--retry-failures", help="Run the rollouts that failed again, and nothing else.")
    ] = False,
) -> None:
    """Run environments without training: avg@k, pass@k and pass^k with confidence intervals. The word `run` may be left out.

    Interrupted, the same command goes on. Results and traces of a recipe lie in its run's folder under evals/, those of
    an evaluation file in evals/ and its name. --section.field=value overrides a field of the file.
    """
    from hone.config.load import load_evaluated
    from hone.config.recipe import Recipe
    from hone.evals.evaluate import Pending

    tree = load_evaluated(file, overrides(context))
    pending = Pending.FAILED if retry_failures else None
    if isinstance(tree, Recipe):
        finished = _evaluate_recipe(tree, target, name, model, api_key, pending or Pending.BOTH)
    else:
        given = [option for option, value in (("target", target), ("name", name), ("model", model)) if value]
        if given:
            raise ValueError(f"--{given[0]} is for a recipe; {file} is an evaluation file, which names its [[models]]")
        finished = _evaluate_file(tree, pending or Pending.MISSING)
    if not finished:
        raise typer.Exit(NOT_FINISHED)


def _evaluate_recipe(
    recipe: "Recipe", target: str | None, name: str | None, model: str | None, api_key: str | None, pending: "Pending"
) -> bool:
    from hone.launch.console import StageConsole
    from hone.launch.evaluations import evaluate_target
    from hone.launch.preflight import preflight
    from hone.launch.run_folder import claim
    from hone.observability import logs

    preflight(recipe)
    with claim(recipe) as folder:
        logs.configure("launcher", folder, console=False)
        results = run_rollouts(
            evaluate_target(
                recipe, folder, StageConsole(), target, name=name, model=model, api_key=api_key, pending=pending
            )
        )
    return all(result.shortcoming is None for result in results.values())


def _evaluate_file(tree: "EvaluationFile", pending: "Pending") -> bool:
    from hone.cli.summary import show_matrix
    from hone.launch.board import Board
    from hone.launch.matrix import evaluate_file
    from hone.observability import logs

    tree.folder.mkdir(parents=True, exist_ok=True)
    logs.configure("evaluation", tree.folder, console=False)
    board = Board()
    results = run_rollouts(evaluate_file(tree, board, pending))
    show_matrix({(place.model, place.environment): result for place, result in results.items()}, tree.folder, board)
    return all(result.shortcoming is None for result in results.values())


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a model's results, or of an evaluation of two models.")],
    second: Annotated[
        Path | None, typer.Argument(help="Folder of the other model's results; the differences are it minus the first.")
    ] = None,
    max_flips: Annotated[int, typer.Option(help="Most flipped tasks to list for each environment.")] = 20,
) -> None:
    """Paired differences of two models on the same tasks, with intervals, and the tasks that flipped."""
    from rich.console import Console

    from hone.evals.comparison import compare as compare_outcomes
    from hone.evals.folders import find_cells, shared_environments, two_models
    from hone.evals.report import difference_table, flip_table
    from hone.launch.board import WIDTH

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if second is None:
        first, second = two_models(first)
    names = _told_apart(first, second)
    pairs = shared_environments(find_cells(first), find_cells(second))
    comparisons = {name: compare_outcomes(ours.outcomes, theirs.outcomes) for name, (ours, theirs) in pairs.items()}
    console.print(difference_table(comparisons, *names))
    for name, (ours, theirs) in pairs.items():
        for label, cell in zip(names, (ours, theirs), strict=True):
            if cell.shortcoming is not None:
                console.print(f"{name}: {label} is not finished: {cell.shortcoming}", style="red", highlight=False)
        if left_out := comparisons[name].num_left_out:
            console.print(f"{name}: left out {left_out:,} tasks that only one of the two has a valid attempt of")
        if comparisons[name].flips and max_flips > 0:
            console.print(flip_table(name, comparisons[name], ours.prompts(), names, max_flips))


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of an evaluation, for example evals/math, or runs/demo/evals.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Where to write the page; default: report.html in the folder.")
    ] = None,
    max_traces: Annotated[int, typer.Option(help="Most traces to embed, spread over models and environments.")] = 5000,
) -> None:
    """Write one self-contained HTML file: scores, curves, paired differences, failures, and every trace to read."""
    from hone.studio.evaluation import write_evaluation_report

    typer.echo(write_evaluation_report(folder, output, max_traces=max_traces))


def _told_apart(first: Path, second: Path) -> tuple[str, str]:
    """The shortest ends of two paths that differ."""
    ours, theirs = first.absolute().parts, second.absolute().parts
    for length in range(1, max(len(ours), len(theirs)) + 1):
        if ours[-length:] != theirs[-length:]:
            return _joined(ours[-length:]), _joined(theirs[-length:])
    raise ValueError(f"{first} and {second} are the same folder; give two different ones")


def _joined(parts: Sequence[str]) -> str:
    return "/".join(parts)
