"""Write an environment package from a template: one that installs, and whose tests pass as they are."""

import keyword
import re
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
SUFFIX = ".template"
COMMON = "common"


@dataclass(frozen=True, slots=True)
class Kind:
    """A template: one sentence for the package, and what it needs to be installed."""

    summary: str
    dependencies: tuple[str, ...] = ("hone",)


KINDS = {
    "single": Kind("Put digits in order, in one answer."),
    "multi": Kind("Find a number, with a hint after each guess."),
    "tool": Kind("Add up prices that only a tool knows."),
    "sandbox": Kind("Write a Python function, which tests run in a sandbox."),
    "harness": Kind("A sum that an agent program asks for twice.", ("hone[harness]",)),
}


@dataclass(frozen=True, slots=True)
class Scaffold:
    """What was written."""

    folder: Path
    files: tuple[Path, ...]


def scaffold(name: str, kind: str, folder: Path) -> Scaffold:
    """Write a package with an environment `name` into `folder`, which must be empty or not there.

    Raises `ValueError` for a name that no entry point or module may have, an unknown kind, or a folder with something
    in it.
    """
    check_name(name)
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and is not empty; nothing was written. Give another --folder")
    words = _words(name, kind)
    files = []
    for source, target in _files(kind, name):
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(source.read_text(encoding="utf-8"), words), encoding="utf-8")
        files.append(path)
    return Scaffold(folder, tuple(files))


def check_name(name: str) -> None:
    """Refuse a name that cannot be that of an environment and, with hone_ before it, of a module."""
    if not NAME.fullmatch(name):
        suggestion = "_".join(re.findall("[a-z0-9]+", name.lower())).lstrip("0123456789_")
        hint = f"; try {suggestion}" if NAME.fullmatch(suggestion) else ""
        raise ValueError(
            f"{name!r} cannot be the name of an environment: lower case letters, digits and single _ between them,"
            f" a letter first{hint}"
        )
    if keyword.iskeyword(name):
        raise ValueError(f"{name!r} is a word of Python's; give another name")


def _files(kind: str, name: str) -> list[tuple[Traversable, Path]]:
    """The templates of a kind, and where each goes in the package's folder."""
    templates = resources.files("hone.envs") / "templates"
    places = {
        "pyproject.toml": Path("pyproject.toml"),
        "README.md": Path("README.md"),
        "recipe.toml": Path("recipe.toml"),
        "test.py": Path("tests") / f"test_{name}.py",
    }
    found = []
    for source in [*(templates / COMMON).iterdir(), *(templates / kind).iterdir()]:
        if source.name.endswith(SUFFIX):
            target = source.name.removesuffix(SUFFIX)
            found.append((source, places.get(target, Path(f"hone_{name}") / target)))
    return sorted(found, key=lambda pair: pair[1])


def _words(name: str, kind: str) -> dict[str, str]:
    return {
        "name": name,
        "package": f"hone_{name}",
        "distribution": f"hone-{name.replace('_', '-')}",
        "class": "".join(part.capitalize() for part in name.split("_")),
        "summary": KINDS[kind].summary,
        "dependencies": ", ".join(f'"{one}"' for one in KINDS[kind].dependencies),
    }


def _filled(template: str, words: dict[str, str]) -> str:
    for word, text in words.items():
        template = template.replace(f"@{word}@", text)
    return template
