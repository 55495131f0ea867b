"""A run's folder belongs to one recipe and to one launcher at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hone.config.load import ConfigError, load_recipe, save_recipe
from hone.config.recipe import Recipe
from hone.observability.machine import save_machine

# What may differ when a run goes on: how long and where it runs, not what it computes.
FREE = (
    "run.name",
    "run.folder",
    "run.max_restarts",
    "run.metrics_port",
    "server.",
    "engine.",
    "workers.",
    "retries.",
    "evaluation.",
    "trainer.",
    "rl.num_steps",
    "rl.max_concurrent",
    "rl.stop_at_reward",
    "rl.rollout_timeout_seconds",
)


@contextlib.contextmanager
def claim(recipe: Recipe) -> Iterator[Path]:
    """The run's folder with its resolved configuration in it, held by this process until the body ends.

    Raises `ConfigError` when another launcher holds it, when it belongs to a different recipe, or when it cannot be
    written.
    """
    folder = recipe.folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot write the run's folder {folder}: {error.strerror}; choose another run.folder"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process runs in {folder}; wait for it, stop it, or give another --run.name"
            ) from error
        _check_same_recipe(recipe, folder)
        save_recipe(recipe, folder / "config.toml")
        save_machine(folder / "machine.json")
        yield folder
    finally:
        os.close(lock)


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    path = folder / "config.toml"
    if not path.exists():
        return
    before = dict(_leaves(load_recipe(path).model_dump(mode="json")))
    after = dict(_leaves(recipe.model_dump(mode="json")))
    changed = sorted(
        key for key in before.keys() | after.keys() if before.get(key) != after.get(key) and not key.startswith(FREE)
    )
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{folder} belongs to a run with {key} = {before.get(key)!r}, now it is {after.get(key)!r}"
            f"{f' (and {len(changed) - 1} more)' if len(changed) > 1 else ''}; "
            "give another --run.name, or delete the folder to start over"
        )


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
