"""An inference server for as long as a body of code needs one."""

import asyncio
import contextlib
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from hone.config.recipe import Recipe
from hone.inference.client import AdminClient, EngineLost, TokenChannel, TokenSampler
from hone.launch.plan import ProcessPlan, plan_inference
from hone.launch.supervise import Supervisor
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone.transport.addresses import Addresses, allocate, save_addresses
from hone.transport.folders import RunFolder

READY_SECONDS = 600.0
"""A server that is not ready by then (large weights on a slow disk included) will not become so."""
POLL_SECONDS = 0.05


@contextlib.asynccontextmanager
async def inference_server(
    recipe: Recipe, folder: RunFolder, supervisor: Supervisor, model: Path | None = None
) -> AsyncIterator[Addresses]:
    """Serve `model` (default: the run's newest policy) while the body runs; yields once it answers."""
    addresses = allocate(recipe)
    save_addresses(addresses, folder.addresses)
    async with supervisor.running([plan_inference(recipe, folder.path, model=model)]):
        await wait_until_ready(addresses.admin)
        yield addresses


async def wait_until_ready(admin: str) -> None:
    """Wait for the health route; raises `TimeoutError` with what was waited for."""
    async with AdminClient(admin) as client:
        try:
            async with asyncio.timeout(READY_SECONDS):
                while not await _is_ready(client):  # noqa: ASYNC110 - a server cannot push before it listens
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as error:
            raise TimeoutError(f"the inference server at {admin} was not ready after {READY_SECONDS:.0f} s") from error


async def _is_ready(client: AdminClient) -> bool:
    try:
        return (await client.health()).ready
    except EngineLost:
        return False


@contextlib.asynccontextmanager
async def served_sampler(
    recipe: Recipe,
    folder: RunFolder,
    weights: Path,
    *,
    deadline_seconds: float,
    show: Callable[[str, str], None] | None = None,
) -> AsyncIterator[TokenSampler]:
    """A sampler of `weights`, which are served while the body runs; show: gets what the server writes to its terminal."""
    supervisor = Supervisor(folder.path, recipe.run.max_restarts, show)
    own_tokenizer = (weights / "tokenizer.json").is_file()
    renderer = Renderer(Tokenizer.load(weights if own_tokenizer else folder.model))
    async with (
        inference_server(recipe, folder, supervisor, weights) as addresses,
        TokenChannel(addresses.tokens) as channel,
    ):
        yield TokenSampler(channel, renderer, deadline_seconds=deadline_seconds)


@contextlib.asynccontextmanager
async def serving(target: Path, changes: Sequence[str] = ()) -> AsyncIterator[str]:
    """Serve a model folder, or a recipe's newest policy as its sections say, while the body runs.

    Outside of any run. changes: overrides of the recipe. Yields the server's base address.
    """
    with tempfile.TemporaryDirectory(prefix="hone-serve-") as scratch:
        port = free_port()
        command = (
            sys.executable, "-m", "hone.cli.main", "serve", str(target.absolute()), "--port", str(port), *changes
        )  # fmt: skip
        supervisor = Supervisor(Path(scratch), max_restarts=0)
        async with supervisor.running([ProcessPlan("inference", command)]):
            address = f"http://127.0.0.1:{port}"
            await wait_until_ready(address)
            yield address


def free_port() -> int:
    """A port that is free now; bind it soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
