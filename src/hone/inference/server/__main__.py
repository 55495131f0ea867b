"""The inference server of a run: `python -m hone.inference.server RUN_FOLDER [--model FOLDER]`."""

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import torch

from hone.config.load import load_recipe
from hone.config.recipe import EngineSection, Recipe
from hone.inference.engine.engine import Engine
from hone.inference.server.admin import describe
from hone.inference.server.serve import Endpoint, Serving, run, secret
from hone.model.checkpoint import CheckpointError
from hone.observability import logs
from hone.observability.disk import disk_complaint, is_disk_trouble
from hone.observability.metrics import Metrics
from hone.transport.addresses import load_addresses
from hone.transport.folders import RunFolder

logger = logging.getLogger("hone.inference.server")

WILL_NEVER_WORK = 2
NUM_LOADS = 10
LOAD_AGAIN_SECONDS = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hone.inference.server")
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--model", type=Path, help="serve this model folder instead of the newest policy")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.folder)
    try:
        logs.configure("inference", folder.path)
        recipe = load_recipe(folder.config)
        with Metrics(folder.metrics, "inference") as metrics:  # Prometheus scrapes the admin routes' /metrics
            serve_run(recipe, folder, arguments.model, reporter(metrics))
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WILL_NEVER_WORK
    except OSError as error:
        if not is_disk_trouble(error):
            raise
        print(f"error: {disk_complaint(error, folder.path)}", file=sys.stderr)
        return WILL_NEVER_WORK
    return 0


def serve_run(
    recipe: Recipe, folder: RunFolder, model: Path | None, report: Callable[[Engine], None] | None = None
) -> None:
    """Serve the given model, or the newest policy: when a trainer removes its folder under our hands, the next one."""
    for _ in range(NUM_LOADS):
        serving = serving_of(recipe, folder, model, report)
        try:
            return run(serving)
        except (ValueError, CheckpointError, FileNotFoundError) as error:
            if model is not None or not _is_outdated(serving, folder):
                raise
            logger.warning("version %d vanished while it was loaded (%s); looking again", serving.version, error)
            time.sleep(LOAD_AGAIN_SECONDS)
    raise RuntimeError(f"{NUM_LOADS} versions in {folder.weights} vanished while they were loaded")


def _is_outdated(serving: Serving, folder: RunFolder) -> bool:
    return not (serving.model_folder / "config.json").exists() or folder.newest_weights()[0] != serving.version


def serving_of(
    recipe: Recipe, folder: RunFolder, model: Path | None, report: Callable[[Engine], None] | None = None
) -> Serving:
    """What a run serves: the given model, or its newest published policy; the tokenizer is the base model's."""
    addresses, server = load_addresses(folder.addresses), recipe.server
    version, weights = (0, model) if model is not None else folder.newest_weights()
    own_tokenizer = (weights / "tokenizer.json").is_file()
    return Serving(
        model_folder=weights,
        name=recipe.run.name,
        engine=engine_of(recipe),
        # The addresses say where local processes connect; where to bind is the recipe's to say (0.0.0.0).
        api=Endpoint(server.host, port_of(addresses.api)),
        version=version,
        tokenizer_folder=weights if own_tokenizer else folder.model,
        admin=None
        if addresses.admin == addresses.api
        else Endpoint(server.admin_host or server.host, port_of(addresses.admin)),
        admin_token=secret(server.admin_token_variable),
        tokens=addresses.tokens,
        dtype=getattr(torch, recipe.model.dtype),
        device=recipe.device,
        strict=recipe.trainer.numerics == "strict",
        report=report,
    )


def engine_of(recipe: Recipe) -> EngineSection:
    """The recipe's engine; in RL no rollout gets longer than what the trainer can forward at once."""
    if recipe.rl is None:
        return recipe.engine
    longest = min(recipe.engine.max_context or recipe.trainer.micro_batch_tokens, recipe.trainer.micro_batch_tokens)
    return recipe.engine.model_copy(update={"max_context": longest})


def port_of(address: str) -> int:
    port = urlsplit(address).port
    if port is None:
        raise ValueError(f"{address} is not an address of the form http://host:port")
    return port


def reporter(metrics: Metrics) -> Callable[[Engine], None]:
    """Writes the engine's state while it works, with the tokens per second since the last time."""
    last = (time.monotonic(), 0)

    def report(engine: Engine) -> None:
        nonlocal last
        (then, before), now, sampled = last, time.monotonic(), engine.num_sampled
        last = (now, sampled)
        if sampled > before:
            metrics.write({**describe(engine), "engine/tokens_per_second": (sampled - before) / (now - then)})

    return report


if __name__ == "__main__":
    sys.exit(main())
