"""What can be known to be wrong before any work: checked at the start, so that a mistake costs seconds and not hours."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hone.config.load import ConfigError
from hone.config.recipe import Recipe
from hone.envs.registry import load_environment
from hone.model.families import ModelConfig
from hone.model.native import library
from hone.text.tokenizer import Tokenizer
from hone.transport.addresses import allocate

MIN_FREE_BYTES = 64 * 2**20


def preflight(recipe: Recipe) -> None:
    """Raise `ConfigError` (or another `ValueError`) with one readable message when the recipe cannot be run here."""
    for check in CHECKS:
        check(recipe)


def _folder_is_writable(recipe: Recipe) -> None:
    existing = next(path for path in (recipe.folder, *recipe.folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"run.folder {recipe.run.folder} cannot be written; choose another")
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        raise ConfigError(
            f"only {free / 2**20:.0f} MiB are free on the disk of {existing}; free some space or choose another run.folder"
        )


def _files_exist(recipe: Recipe) -> None:
    named = {"tokenizer.path": recipe.tokenizer.path}
    if recipe.sft is not None and recipe.sft.data.endswith((".jsonl", ".parquet")):
        named["sft.data"] = recipe.sft.data
    if recipe.tokenizer.chat_template is not None and "." in recipe.tokenizer.chat_template:
        named["tokenizer.chat_template"] = recipe.tokenizer.chat_template
    if recipe.model.path is not None and recipe.model.path.startswith((".", "/", "~")):
        named["model.path"] = recipe.model.path
    for field, value in named.items():
        if value is not None and not Path(value).expanduser().exists():
            raise ConfigError(f"{field} = {value!r}: there is no such file or folder")


def _model_is_buildable(recipe: Recipe) -> None:
    if recipe.model.config is not None:
        # The tokenizer's size is filled in when it has been trained.
        ModelConfig.from_hugging_face({"vocab_size": recipe.tokenizer.vocab_size or 256} | recipe.model.config)
    elif recipe.model.path is not None and Path(recipe.model.path).exists():
        path = Path(recipe.model.path)
        if not (path / "config.json").exists():
            raise ConfigError(
                f"model.path = {recipe.model.path!r} holds no config.json: not a model in the Hugging Face layout"
            )


def _tokenizer_is_readable(recipe: Recipe) -> None:
    if recipe.tokenizer.path is not None:
        Tokenizer.load(recipe.tokenizer.path)


def _strict_numerics_are_possible(recipe: Recipe) -> None:
    if recipe.trainer.numerics == "strict" and (obstacle := library.obstacle()) is not None:
        raise ConfigError(
            f"trainer.numerics = 'strict' needs the native kernels: {obstacle}; or set trainer.numerics = 'fast'"
        )


def _environments_load(recipe: Recipe) -> None:
    for section in recipe.environments:
        load_environment(section.name, **section.arguments)


def _ports_are_free(recipe: Recipe) -> None:
    allocate(recipe)


CHECKS: tuple[Callable[[Recipe], None], ...] = (
    _folder_is_writable,
    _files_exist,
    _model_is_buildable,
    _tokenizer_is_readable,
    _strict_numerics_are_possible,
    _environments_load,
    _ports_are_free,
)
