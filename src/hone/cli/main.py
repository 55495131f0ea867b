"""`hone`: the commands and how their mistakes are shown.

Commands import what they need when they run, so that `hone --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hone.cli import config as config_commands
from hone.cli import env as env_commands
from hone.cli import evaluate as evaluate_commands
from hone.cli import model as model_commands
from hone.cli import sandbox as sandbox_commands
from hone.cli import sandbox_gateway as gateway_commands
from hone.cli import synth as synth_commands
from hone.cli import train as train_commands

app = typer.Typer(
    name="hone",
    help="From a base language model to a trained, evaluated, served one: SFT, asynchronous RL, evaluation, chat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train_commands.register(app)
model_commands.register(app)
synth_commands.register(app)
app.add_typer(evaluate_commands.app, name="eval")
app.add_typer(config_commands.app, name="config")
app.add_typer(env_commands.app, name="env")
gateway_commands.register(sandbox_commands.app)
app.add_typer(sandbox_commands.app, name="sandbox")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"hone {installed_version('hone')}")
        raise typer.Exit


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, for example runs/reverse.")],
    output: Annotated[
        Path | None, typer.Option(help="Where to write the page; default: report.html in the folder.")
    ] = None,
) -> None:
    """Write a run's report: one self-contained HTML file with its curves, timeline and traces."""
    from hone.studio.report import write_report

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a run's folder; the runs are in runs/ unless the recipe says otherwise")
    typer.echo(write_report(folder, output))


def main() -> None:
    """Run a command; what the caller can mend is one readable message and exit code 2, never a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        sys.exit(130)
    except Exception as error:  # whatever is not the caller's to mend is raised again, with its traceback
        from hone.cli.errors import complaint

        if (told := complaint(error)) is None:
            raise
        typer.echo(f"error: {told}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
