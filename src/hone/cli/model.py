"""`hone serve`, `hone chat`: use a model."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hone.cli.arguments import EXTRA, overrides

if TYPE_CHECKING:
    from hone.cli.chat import Endpoint
    from hone.config.recipe import Recipe

Target = Annotated[
    str,
    typer.Argument(help="A recipe (its newest policy), a model folder in the Hugging Face layout, or an http address."),
]
Key = Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="API key of an http address.")]
Model = Annotated[str | None, typer.Option(help="Model name at an http address; default: the first that it lists.")]

DEFAULT_PORT = 8000


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(context_settings=EXTRA)(serve)
    app.command(context_settings=EXTRA)(chat)


def serve(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="A recipe (its newest policy) or a model folder.")],
    host: Annotated[
        str | None, typer.Option(help="Address to bind, 0.0.0.0 for every interface; default: the recipe's, 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the OpenAI API and the chat page; default: the recipe's, 8000.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Model name in the API; default: the run's or the folder's.")] = None,
) -> None:
    """Serve a model: OpenAI-compatible API under /v1, a chat page at /."""
    from hone.config.recipe import ServerSection

    recipe, folder = _served(target, overrides(context))
    from hone.inference.server.serve import serve as serve_model  # after the checks: torch takes seconds

    def started(address: str) -> None:
        typer.echo(f"chat page: {address}/    OpenAI API: {address}/v1    stop: Ctrl-C", err=True)

    server = ServerSection() if recipe is None else recipe.server
    serve_model(
        folder,
        recipe,
        host=host or server.host,
        port=(server.port or DEFAULT_PORT) if port is None else port,
        name=name,
        started=started,
    )


def chat(
    context: typer.Context,
    target: Target,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer; default: what the context holds.")] = None,
    model: Model = None,
    api_key: Key = None,
) -> None:
    """Talk with a model in the terminal. A recipe or a folder is served for as long as the conversation lasts."""
    from hone.cli.chat import Settings
    from hone.cli.chat import chat as converse

    changes = overrides(context)

    async def conversation() -> None:
        async with _endpoint(target, changes, model, api_key) as endpoint:
            await converse(endpoint, Settings(temperature, max_tokens), system, prompt)

    asyncio.run(conversation())


@contextlib.asynccontextmanager
async def _endpoint(
    target: str, changes: list[str], model: str | None, api_key: str | None
) -> "AsyncIterator[Endpoint]":
    from hone.cli.chat import Endpoint
    from hone.launch.service import serving

    if not target.startswith(("http://", "https://")):
        _served(target, changes)  # what is wrong with it is said here, before a server starts
        async with serving(Path(target), changes) as address:
            yield Endpoint(f"{address}/v1")
        return
    if changes:
        raise ValueError(f"unknown argument {changes[0]}: {target} is an address, only a recipe has fields to override")
    base = target.rstrip("/")
    yield Endpoint(base if base.endswith("/v1") else f"{base}/v1", model, api_key)


def _served(target: str, changes: list[str]) -> "tuple[Recipe | None, Path]":
    """What a target stands for: a recipe with its newest policy, or a folder alone."""
    recipe = _recipe(target, changes) if target.endswith(".toml") else None
    if recipe is None and changes:
        raise ValueError(f"unknown argument {changes[0]}: {target} is a folder, only a recipe has fields to override")
    folder = Path(target) if recipe is None else _newest_policy(recipe)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no model in the Hugging Face layout: it holds no config.json")
    return recipe, folder


def _recipe(path: str, changes: list[str]) -> "Recipe":
    from hone.config.load import load_recipe

    return load_recipe(Path(path), changes)


def _newest_policy(recipe: "Recipe") -> Path:
    from hone.launch.evaluations import newest_policy
    from hone.transport.folders import RunFolder

    return newest_policy(RunFolder(recipe.folder.absolute()))
