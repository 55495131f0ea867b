"""The documentation tells the truth: its examples run, and what it names exists."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from hone.cli.evaluate import WithDefaultCommand
from hone.cli.main import app
from hone.config.explain import PAGES as GENERATED
from hone.config.explain import explain

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")])
HAND_WRITTEN = [page for page in PAGES if page.name not in GENERATED]
METRICS_PAGE = ROOT / "docs" / "reference" / "metrics.md"

FENCE = re.compile(r"^```(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ENTRY_POINTS = "hone.environments"
METRIC = re.compile(r"[a-z]+/[a-z][a-z0-9_]*[a-z0-9]")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(page: Path) -> list[str]:
    """Everything that is set as code: lines of blocks, and inline pieces."""
    text = page.read_text()
    blocks = [line for _, body in FENCE.findall(text) for line in body.splitlines()]
    return blocks + INLINE.findall(FENCE.sub("", text))


EXAMPLES = [
    pytest.param(body, id=f"{name(page)}-{number}")
    for page in PAGES
    for number, (kind, body) in enumerate(FENCE.findall(page.read_text()), 1)
    if kind.split() == ["python", "test"]
]


@pytest.mark.parametrize("body", EXAMPLES)
def test_an_example_runs(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(body, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def commands() -> TyperGroup:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for piece in code(page):
        found = re.match(r"(?:\$ )?(?:\.venv/bin/)?hone ((?:[a-z]+)(?: .*)?)$", piece.partition("  #")[0].strip())
        if found is None:
            continue
        words = found[1].split()
        command: Any = commands()
        while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
            if isinstance(command, WithDefaultCommand) and words[0] not in command.commands:
                words.insert(0, command.default)
            assert words[0] in command.commands, f"`{piece}`: there is no command {words[0]}"
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        for word in words[: words.index("--")] if "--" in words else words:
            option = word.partition("=")[0]
            if option.startswith("--") and "." in option:
                explain(option.removeprefix("--"))
            elif option.startswith("-") and option != "--help":
                assert option in options, f"`{piece}`: {command.name} has no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for piece in code(page):
        for target in re.findall(r"^make ([a-z][a-z-]*)", piece):
            assert target in targets, f"`{piece}`: there is no such target"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_and_what_is_in_them_exist(page: Path) -> None:
    for piece in code(page):
        for dotted in re.findall(r"\bhone(?:\.[a-zA-Z_]+)+", piece):
            assert dotted == ENTRY_POINTS or resolves(dotted), f"`{piece}`: there is no {dotted}"


@cache
def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or something defined in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath("src", *parts[:length])
        source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if source.exists():
            rest = parts[length:]
            if not rest:
                return True
            module = importlib.import_module(".".join(parts[:length]))
            return hasattr(module, rest[0])
    return False


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_of_the_source_exist(page: Path) -> None:
    for piece in code(page):
        for path in re.findall(r"(?<![\w/.])((?:src|tests|recipes|environments|benchmarks|docs)/[\w./-]*\w)", piece):
            assert (ROOT / path).exists() or (ROOT / "src" / "hone" / path).exists(), f"`{piece}`: there is no {path}"


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name)
def test_configuration_fields_exist(page: Path) -> None:
    sections = "|".join({field.path.split(".")[0] for field in explain()})
    for piece in INLINE.findall(FENCE.sub("", page.read_text())):
        found = re.fullmatch(rf"((?:{sections})(?:\.[a-z_0-9]+)+)(?: = .*)?", piece)
        if found and not found[1].endswith((".py", ".toml", ".jsonl", ".sqlite", ".json")):
            explain(found[1])


@cache
def written_metrics() -> set[str]:
    """Every text in the source that has the form of a metric's name."""
    found = set()
    for path in (ROOT / "src" / "hone").rglob("*.py"):
        if "studio" in path.parts or "cli" in path.parts or "launch" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
                found.add(node.value)
    return found


def test_the_page_of_metrics_lists_what_is_written_and_nothing_else() -> None:
    areas = {metric.split("/")[0] for metric in documented_metrics()}
    assert {metric for metric in written_metrics() if metric.split("/")[0] in areas} == documented_metrics()


def documented_metrics() -> set[str]:
    rows = re.findall(r"^\| `([^`]+)`", METRICS_PAGE.read_text(), re.MULTILINE)
    return {row for row in rows if METRIC.fullmatch(row)}


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name)
def test_metrics_that_are_named_are_written(page: Path) -> None:
    areas = {metric.split("/")[0] for metric in written_metrics()}
    for piece in INLINE.findall(FENCE.sub("", page.read_text())):
        if METRIC.fullmatch(piece) and piece.split("/")[0] in areas:
            assert piece in written_metrics(), f"nobody writes {piece}"


def test_every_page_can_be_found() -> None:
    """Each page of docs/ is linked from another page."""
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in LINK.findall(page.read_text())
        if "://" not in link
    }
    lost = [
        name(page) for page in ROOT.glob("docs/**/*.md") if page.resolve() not in linked and page.name != "index.md"
    ]
    assert lost == []
