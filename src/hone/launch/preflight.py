"""What can be known to be wrong before any work: checked at the start, so that a mistake costs seconds and not hours."""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from hone.config.load import ConfigError
from hone.config.recipe import Recipe
from hone.envs.remote import environment_of
from hone.model.families import ModelConfig
from hone.model.native import library
from hone.orchestrator.curriculum import check_curriculum
from hone.text.tokenizer import Tokenizer
from hone.transport.addresses import allocate

MIN_FREE_BYTES = 64 * 2**20
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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
    for field, value in named.items():
        if value is not None and not Path(value).expanduser().exists():
            raise ConfigError(f"{field} = {value!r}: there is no such file or folder")


def _model_is_buildable(recipe: Recipe) -> None:
    if recipe.model.config is not None:
        # The tokenizer's size is filled in when it has been trained.
        ModelConfig.from_hugging_face({"vocab_size": recipe.tokenizer.vocab_size or 256} | recipe.model.config)
        return
    assert recipe.model.path is not None  # the recipe's own rule
    path = Path(recipe.model.path).expanduser()
    if not path.exists():
        if not HUB_NAME.fullmatch(recipe.model.path):
            raise ConfigError(
                f"model.path = {recipe.model.path!r}: there is no such folder, and it is no name on the hub (owner/name)"
            )
    elif not (path / "config.json").is_file():
        raise ConfigError(
            f"model.path = {recipe.model.path!r} holds no config.json: not a model in the Hugging Face layout"
        )
    else:
        ModelConfig.from_hugging_face(_read_json(path / "config.json"))


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return content


def _tokenizer_is_readable(recipe: Recipe) -> None:
    folder = recipe.tokenizer.path or recipe.model.path
    if folder is None or not Path(folder).expanduser().is_dir():  # one that is trained, or comes from the hub
        return
    tokenizer = Tokenizer.load(Path(folder).expanduser())
    if recipe.environments and recipe.tokenizer.chat_template is None and tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer in {folder} has no chat template, which environments need; give tokenizer.chat_template"
        )


def _strict_numerics_are_possible(recipe: Recipe) -> None:
    if recipe.trainer.numerics == "strict" and (obstacle := library.obstacle()) is not None:
        raise ConfigError(
            f"trainer.numerics = 'strict' needs the native kernels: {obstacle}; or set trainer.numerics = 'fast'"
        )


def _environments_load(recipe: Recipe) -> None:
    for section in recipe.environments:
        check_curriculum(section, environment_of(section))


def _ports_are_free(recipe: Recipe) -> None:
    allocate(recipe)
    first = recipe.run.metrics_port
    for port in () if first is None else (first, first + 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ConfigError(
                    f"port {port} is in use, run.metrics_port = {first} needs {first} and {port}; choose another"
                    if port != first
                    else f"run.metrics_port = {first} is in use; choose another"
                ) from error


def _admin_is_guarded(recipe: Recipe) -> None:
    server = recipe.server
    variable = server.admin_token_variable
    if variable is not None and not os.environ.get(variable):
        raise ConfigError(f"server.admin_token_variable names {variable}, which is not set; export it")
    host = server.admin_host or server.host
    if variable is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            f"the admin routes would be open to the network at {host}; give server.admin_token_variable, or"
            " server.admin_host = '127.0.0.1' with server.admin_port = 0"
        )


CHECKS: tuple[Callable[[Recipe], None], ...] = (
    _folder_is_writable,
    _files_exist,
    _model_is_buildable,
    _tokenizer_is_readable,
    _strict_numerics_are_possible,
    _environments_load,
    _ports_are_free,
    _admin_is_guarded,
)
