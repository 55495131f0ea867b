"""The inference server of a run: `python -m hone.inference.server RUN_FOLDER [--model FOLDER]`."""

import argparse
import os
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
from hone.inference.server.serve import Endpoint, Serving, run
from hone.model.checkpoint import CheckpointError
from hone.observability import logs
from hone.observability.metrics import Metrics
from hone.transport.addresses import load_addresses
from hone.transport.folders import RunFolder

WILL_NEVER_WORK = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hone.inference.server")
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--model", type=Path, help="serve this model folder instead of the newest policy")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.folder)
    logs.configure("inference", folder.path)
    try:
        recipe = load_recipe(folder.config)
        with Metrics(folder.metrics, "inference") as metrics:  # Prometheus scrapes the admin routes' /metrics
            run(serving_of(recipe, folder, arguments.model, reporter(metrics)))
    except (ValueError, CheckpointError) as error:
        print(f"inference: {error}", file=sys.stderr)
        return WILL_NEVER_WORK
    return 0


def serving_of(
    recipe: Recipe, folder: RunFolder, model: Path | None, report: Callable[[Engine], None] | None = None
) -> Serving:
    """What a run serves: the given model, or its newest published policy; the tokenizer is the base model's."""
    addresses = load_addresses(folder.addresses)
    version, weights = (0, model) if model is not None else folder.newest_weights()
    own_tokenizer = (weights / "tokenizer.json").is_file()
    variable = recipe.server.admin_token_variable
    return Serving(
        model_folder=weights,
        name=recipe.run.name,
        engine=engine_of(recipe),
        api=endpoint(addresses.api),
        version=version,
        tokenizer_folder=weights if own_tokenizer else folder.model,
        admin=None if addresses.admin == addresses.api else endpoint(addresses.admin),
        admin_token=None if variable is None else secret(variable),
        tokens=addresses.tokens,
        dtype=torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32,
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


def endpoint(address: str) -> Endpoint:
    parts = urlsplit(address)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"{address} is not an address of the form http://host:port")
    return Endpoint(parts.hostname, parts.port)


def secret(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"server.admin_token_variable names {variable}, which is not set; export it")
    return value


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
