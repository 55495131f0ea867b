"""`hone config`: what every field means, and whether a recipe can be run."""

from pathlib import Path
from typing import Annotated

import typer

from hone.cli.arguments import EXTRA, overrides

app = typer.Typer(help="Explain the fields of a recipe; check a recipe without running it.", no_args_is_help=True)


@app.command()
def explain(
    section: Annotated[str, typer.Argument(help="Only this part of the tree, for example rl or rl.loss.")] = "",
) -> None:
    """Print every field with its type, default and meaning."""
    from hone.config.explain import explain as describe

    for field in describe(section):
        limits = f", {field.constraints}" if field.constraints else ""
        head = f"[{field.path}]" if field.is_section else f"{field.path} = {field.default}    ({field.type}{limits})"
        typer.echo(f"{head}\n    {field.meaning}")


@app.command(context_settings=EXTRA)
def check(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="TOML file.")],
) -> None:
    """Refuse what is unknown or meaningless; --a.b=c overrides are checked along with the file."""
    from hone.config.load import load_recipe
    from hone.launch.preflight import preflight

    tree = load_recipe(recipe, overrides(context))
    preflight(tree)
    stages = [name for name, section in (("sft", tree.sft), ("rl", tree.rl)) if section is not None]
    typer.echo(f"{recipe}: fine ({', '.join(stages) or 'no training'}; run folder {tree.folder})")
