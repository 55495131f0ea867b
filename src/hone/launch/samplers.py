"""A sampler for whatever a person may name as a model: an address, a model folder, a recipe's newest policy."""

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from hone.config.load import load_recipe, save_recipe
from hone.config.recipe import ModelSection, Recipe, ServerSection
from hone.envs.sampler import Sampler
from hone.inference.client import DEADLINE_SECONDS, ChatSampler
from hone.launch.evaluations import newest_policy
from hone.launch.fingerprint import fingerprint
from hone.launch.service import served_sampler
from hone.transport.folders import RunFolder

CHECK_SECONDS = 30.0


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
        address = target.rstrip("/")
        url = address if address.endswith("/v1") else f"{address}/v1"
        await _check_answers(url, api_key)
        async with ChatSampler(url, model, api_key, deadline_seconds=deadline_seconds) as sampler:
            yield sampler
        return
    if model is not None:
        raise ValueError(f"--model {model} names a model at an http address; {target} is none")
    recipe, weights, base = _served(target)
    with tempfile.TemporaryDirectory(prefix="hone-serve-") as name:
        # A folder and addresses of its own, so that a run of the recipe may go on beside it.
        scratch = RunFolder(Path(name))
        scratch.model.symlink_to(base)
        private = recipe.model_copy(update={"server": ServerSection()})
        save_recipe(private, scratch.config)
        async with served_sampler(private, scratch, weights, deadline_seconds=deadline_seconds) as sampler:
            yield sampler


async def _check_answers(url: str, api_key: str | None) -> None:
    """A wrong address is told at once; one that answered before is asked again for as long as a turn may take."""
    import aiohttp  # of an extra that those who serve their own models do not need

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(CHECK_SECONDS), headers=headers) as session,
            session.get(f"{url}/models"),  # whatever it says: not every server lists its models
        ):
            return
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ValueError(f"nothing answers at {url}: {error or 'no answer in time'}") from error


def source_of(target: str, model: str | None) -> str:
    """What answers behind a target: equal for equal weights, or for the same model at the same address."""
    return f"{model} at {target}" if target.startswith(("http://", "https://")) else fingerprint(_served(target)[1])


def _served(target: str) -> tuple[Recipe, Path, Path]:
    """How to serve a model, its weights, and the folder whose tokenizer they have if they have none of their own."""
    if target.endswith(".toml"):
        recipe = load_recipe(Path(target))
        run = RunFolder(recipe.folder.absolute())
        return recipe, newest_policy(run), run.model
    weights = Path(target).absolute()
    if not (weights / "config.json").exists():
        raise ValueError(f"{target} is neither an http address, nor a recipe (.toml), nor a folder with a config.json")
    return Recipe(model=ModelSection(path=str(weights))), weights, weights
