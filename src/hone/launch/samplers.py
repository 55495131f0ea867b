"""A sampler for whatever a person may name as a model: an address, a model folder, a recipe's newest policy."""

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from hone.config.load import load_recipe, save_recipe
from hone.config.recipe import ModelSection, Recipe, ServerSection
from hone.envs.sampler import Sampler
from hone.inference.client import DEADLINE_SECONDS, ChatSampler, TokenChannel, TokenSampler
from hone.launch.evaluations import newest_policy
from hone.launch.service import inference_server
from hone.launch.supervise import Supervisor
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone.transport.folders import RunFolder


@contextlib.asynccontextmanager
async def sampler_for(
    target: str, *, model: str | None = None, api_key: str | None = None, deadline_seconds: float = DEADLINE_SECONDS
) -> AsyncIterator[Sampler]:
    """The sampler of an http address, of a model folder, or (a .toml file) of the newest policy of a recipe's run.

    A folder or a recipe is served while the body runs, beside whatever its run does; turns then carry their tokens. An
    address gives texts and counts. model: the model's name at an address.
    """
    if target.startswith(("http://", "https://")):
        if model is None:
            raise ValueError(f"give --model: which of the models at {target} is it?")
        base = target.rstrip("/")
        url = base if base.endswith("/v1") else f"{base}/v1"
        async with ChatSampler(url, model, api_key, deadline_seconds=deadline_seconds) as sampler:
            yield sampler
        return
    if model is not None:
        raise ValueError(f"--model {model} names a model at an http address; {target} is none")
    recipe, weights = _served(target)
    async with _engine(recipe, weights, deadline_seconds) as sampler:
        yield sampler


def _served(target: str) -> tuple[Recipe, Path]:
    if target.endswith(".toml"):
        recipe = load_recipe(Path(target))
        return recipe, newest_policy(RunFolder(recipe.folder.absolute()))
    weights = Path(target).absolute()
    if not (weights / "config.json").exists():
        raise ValueError(f"{target} is neither an http address, nor a recipe (.toml), nor a folder with a config.json")
    return Recipe(model=ModelSection(path=str(weights))), weights


@contextlib.asynccontextmanager
async def _engine(recipe: Recipe, weights: Path, deadline_seconds: float) -> AsyncIterator[Sampler]:
    """Serve in a folder and at addresses of its own, so that a run of the recipe may go on beside it."""
    private = recipe.model_copy(update={"server": ServerSection()})
    own_tokenizer = (weights / "tokenizer.json").is_file()
    renderer = Renderer(Tokenizer.load(weights if own_tokenizer else RunFolder(recipe.folder.absolute()).model))
    with tempfile.TemporaryDirectory(prefix="hone-serve-") as scratch:
        folder = RunFolder(Path(scratch))
        save_recipe(private, folder.config)
        async with (
            inference_server(private, folder, Supervisor(folder.path, max_restarts=1), weights) as addresses,
            TokenChannel(addresses.tokens) as channel,
        ):
            yield TokenSampler(channel, renderer, deadline_seconds=deadline_seconds)
