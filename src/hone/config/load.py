"""A recipe or a file of `hone eval` or `hone synth` from TOML and --a.b=c, and back; every mistake is a `ConfigError`."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from hone.config.evaluation import EvaluationFile
from hone.config.recipe import Recipe, Section
from hone.config.synthesis import SynthesisFile

Tree = TypeVar("Tree", bound=Section)


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names the field, the value and what to do."""


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides of the form `--a.b=c` (TOML values; bare words are strings).

    Relative paths inside the recipe are taken as they are, relative to the working directory.
    """
    return recipe_from(_read(path, overrides), str(path))


def load_evaluated(path: Path, overrides: Iterable[str] = ()) -> Recipe | EvaluationFile:
    """A recipe or an evaluation file, whichever the file holds: one has a [model], the other [[models]]."""
    tree = _read(path, overrides)
    if "models" in tree and "model" in tree:
        raise ConfigError(
            f"{path} has [model] and [[models]]: a recipe names the one model that it trains, an evaluation file all"
            " that it compares; remove one of them"
        )
    if "models" in tree:
        return _validated(EvaluationFile, tree, str(path))
    if "model" in tree:
        return recipe_from(tree, str(path))
    raise ConfigError(
        f"{path} is neither a recipe, which has a [model], nor an evaluation file, which has [[models]] and"
        " [[environments]]"
    )


def load_synthesis(path: Path, overrides: Iterable[str] = ()) -> SynthesisFile:
    """Read a file of `hone synth`, with overrides as for a recipe."""
    return _validated(SynthesisFile, _read(path, overrides), str(path))


def recipe_from(tree: Mapping[str, Any], source: str) -> Recipe:
    """Validate a tree; `source` is named in the error."""
    return _validated(Recipe, tree, source)


def save_recipe(recipe: Section, path: Path) -> None:
    """Write the resolved tree so that it can be loaded again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    temporary.replace(path)


def _read(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"no recipe at {path}; give the path of a TOML file, for example recipes/tiny/reverse.toml"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    for override in overrides:
        _apply(tree, override)
    return tree


def _validated(kind: type[Tree], tree: Mapping[str, Any], source: str) -> Tree:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        complaints = "\n".join(_complaint(kind, detail) for detail in error.errors())
        raise ConfigError(f"{source}: {complaints}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.removeprefix("--").partition("=")
    if not separator or not key or not override.startswith("--"):
        raise ConfigError(f"override {override!r} is not of the form --section.field=value")
    *sections, field = key.replace("-", "_").split(".")
    table: Any = tree
    for section in sections:
        if isinstance(table, list):
            table = table[_index(section, table, override)]
        else:
            table = table.setdefault(section, {})
        if not isinstance(table, dict | list):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    if isinstance(table, list):
        table[_index(field, table, override)] = _value(text)
    else:
        table[field] = _value(text)


def _index(text: str, table: list[Any], override: str) -> int:
    if not text.isdigit() or int(text) >= len(table):
        raise ConfigError(f"override {override!r}: {text!r} is not an index below {len(table)}")
    return int(text)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _complaint(kind: type[Section], detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown field {where}{_suggestion(kind, detail['loc'])}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message if message.startswith(where) else f"{where}: {message}"
    return f"{where} = {_shown(detail['input'])}: {message[:1].lower()}{message[1:]}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _suggestion(kind: type[Section], location: tuple[str | int, ...]) -> str:
    import difflib  # only on the way to an error message

    section: Any = kind
    for part in location[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation) or section
    close = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(section.model_fields)}"


def _section_of(annotation: Any) -> Any:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if hasattr(c, "model_fields")), None)
