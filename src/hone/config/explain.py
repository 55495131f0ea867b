"""Every field of a recipe or an evaluation file in words: path, type, default, limits, meaning; for terminal and docs."""

import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import annotated_types
import tomli_w
from pydantic.fields import FieldInfo

from hone.config.evaluation import EvaluationFile
from hone.config.recipe import Recipe, Section

ITEM = "N"  # stands for the index of a list item in a path: environments.N.name
NONE = "none"
REQUIRED = "required"
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", Any: "value"}
INTRODUCTION = """\
# Configuration reference

Generated from the configuration models by `make docs`; do not edit.

A recipe is a TOML file. Each field can also be given on the command line by its dotted path, for example
`--rl.num_steps=200` or `--environments.0.weight=2`. Unknown fields and combinations without a meaning are refused
before any work starts. The default `none` means that the field is left out; its text says what happens then.
`hone config explain rl.loss` prints one section, `hone config check recipe.toml` checks a recipe.
"""

EVALUATION_INTRODUCTION = """\
# Evaluation files

Generated from the configuration models by `make docs`; do not edit.

`hone eval FILE.toml` takes a recipe, which has a `[model]`, or an evaluation file, which has `[[models]]`: every model
is run on every environment. Each field can also be given on the command line by its dotted path, for example
`--evaluation.num_tasks=200` or `--models.0.path=runs/demo/export`. Unknown fields and combinations without a meaning are
refused before any work starts. The default `none` means that the field is left out; its text says what happens then.
[Evaluate models](../guides/evaluate.md) shows a file and what becomes of it.
"""

PAGES: dict[str, tuple[type[Section], str]] = {
    "configuration.md": (Recipe, INTRODUCTION),
    "evaluation-file.md": (EvaluationFile, EVALUATION_INTRODUCTION),
}
"""The pages of the reference: by file name, the tree they describe and how they begin."""


@dataclass(frozen=True, slots=True)
class FieldDescription:
    """One field or section. `default` reads as in TOML, or is `required` or `none` (left out)."""

    path: str
    type: str
    default: str
    constraints: str
    meaning: str

    @property
    def is_section(self) -> bool:
        return self.type in ("section", "list of sections")

    @property
    def section(self) -> str:
        """The path of the section that the field belongs to."""
        return self.path.rpartition(".")[0].removesuffix(f".{ITEM}")


def explain(prefix: str = "") -> list[FieldDescription]:
    """The fields under a dotted path (`rl.loss`, `environments.0`), a section before its fields; a whole recipe for "".

    A path that leads nowhere in a recipe is looked for in an evaluation file; ValueError where it leads nowhere there.
    """
    wanted = [ITEM if part.isdigit() else part for part in prefix.replace("-", "_").split(".") if part]
    for tree in (Recipe, EvaluationFile):
        found = [field for field in _fields(tree, None, "") if field.path.split(".")[: len(wanted)] == wanted]
        if found:
            return found
    raise ValueError(
        f"no field or section {prefix!r} in a recipe; sections are {', '.join(Recipe.model_fields)};"
        f" those of an evaluation file are {', '.join(EvaluationFile.model_fields)}"
    )


def reference_page(name: str) -> str:
    """A page of the reference in Markdown; name: one of `PAGES`."""
    tree, page = PAGES[name]
    everything = list(_fields(tree, None, ""))
    for section in (field for field in everything if field.is_section):
        rows = [field for field in everything if field.section == section.path and not field.is_section]
        page += f"\n## `{_header(section)}`\n\n{section.meaning}\n"
        if rows:
            page += "\n| field | type | default | meaning |\n|---|---|---|---|\n" + "".join(map(_row, rows))
    return page


def _fields(section: type[Section], values: Section | None, prefix: str) -> Iterator[FieldDescription]:
    """The fields of a section; `values`: the default of the section where its parent gives one."""
    for name, field in section.model_fields.items():
        path = prefix + name
        default = getattr(values, name) if values is not None else field.get_default(call_default_factory=True)
        inner = _section_in(field.annotation)
        yield FieldDescription(
            path=path,
            type=_type_text(field.annotation),
            default=REQUIRED if field.is_required() else _default_text(default),
            constraints=_constraints(field.metadata, field.annotation),
            meaning=_meaning(field, inner),
        )
        if inner is not None:
            is_list = typing.get_origin(field.annotation) is tuple
            defaults = default if isinstance(default, Section) else None
            yield from _fields(inner, defaults, f"{path}.{ITEM}." if is_list else f"{path}.")


def _section_in(annotation: Any) -> type[Section] | None:
    candidates = [annotation, *typing.get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _meaning(field: FieldInfo, section: type[Section] | None) -> str:
    text = field.description or (section.__doc__ if section is not None else None) or ""
    return " ".join(text.split())


def _type_text(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_text(argument) for argument in arguments if argument is not types.NoneType)
    if origin is Literal:
        return " or ".join(_toml(value) for value in arguments)
    if origin is dict:
        return "table"
    if _section_in(annotation) is not None:
        return "list of sections" if origin is tuple else "section"
    if origin is tuple:
        return f"list of {len(arguments)} {NAMES[_bare(arguments[0])]}s"
    return NAMES[annotation]


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _constraints(metadata: list[Any], annotation: Any) -> str:
    """The limits of a number; pydantic keeps them beside a plain annotation and inside an optional one."""
    limits = [*metadata]
    for part in typing.get_args(annotation):
        if typing.get_origin(part) is typing.Annotated:
            limits += [limit for field in part.__metadata__ for limit in getattr(field, "metadata", [field])]
    return ", ".join(dict.fromkeys(text for limit in limits if (text := _limit(limit))))


def _limit(limit: object) -> str:
    match limit:
        case annotated_types.Gt(gt=bound):
            return f"> {bound}"
        case annotated_types.Ge(ge=bound):
            return f"≥ {bound}"
        case annotated_types.Lt(lt=bound):
            return f"< {bound}"
        case annotated_types.Le(le=bound):
            return f"≤ {bound}"
        case _:
            return ""


def _default_text(value: Any) -> str:
    if value is None or isinstance(value, Section):
        return NONE if value is None else ""
    return _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if value % 1 else f"{value:.1f}"
    plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    if plain in ([], {}):
        return str(plain)
    if isinstance(plain, list):
        return "[" + ", ".join(map(_toml, plain)) + "]"
    return tomli_w.dumps({"value": plain}).removeprefix("value = ").rstrip()


def _header(section: FieldDescription) -> str:
    return f"[[{section.path}]]" if section.type == "list of sections" else f"[{section.path}]"


def _row(field: FieldDescription) -> str:
    kind = f"{field.type}, {field.constraints}" if field.constraints else field.type
    cells = [f"`{field.path.rpartition('.')[2]}`", kind, f"`{field.default}`", field.meaning]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    for name in PAGES:
        (Path(sys.argv[1]) / name).write_text(reference_page(name))
