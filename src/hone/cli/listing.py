"""How `hone env` shows what it found: tables for people, JSON for programs."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hone.envs.checks import Check
from hone.envs.environment import Environment, MultiTurn, SingleTurn
from hone.envs.registry import EnvironmentLoadError, installed_environments, load_environment

MAX_PROBLEMS = 3
"""Problems of one check that are shown; --json has all of them."""


def print_table(table: Table) -> None:
    """On standard output, as wide as the terminal, or wide enough for a file."""
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is under way; nothing where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: None
        return
    with console.status(text) as line:
        yield lambda what: line.update(f"{text}: {what}")


def describe_installed() -> list[dict[str, Any]]:
    """One row for each installed environment, loaded with its defaults; `trouble` says why one cannot be."""
    return [_described(name) for name in installed_environments()]


def listing_table(rows: Sequence[dict[str, Any]]) -> Table:
    """`describe_installed` as a table."""
    table = Table("environment", "version", "kind", "train", "held-out", "tools", "rewards", "metrics")
    for row in rows:
        if "trouble" in row:
            table.add_row(row["name"], Text(row["trouble"], style="red"))
            continue
        counts = ["endless" if row[split] is None else f"{row[split]:,}" for split in ("train", "held_out")]
        names = [", ".join(row[what]) or "-" for what in ("tools", "rewards", "metrics")]
        table.add_row(row["name"], row["version"], row["kind"], *counts, *names)
    return table


def checks_table(environment: Environment, checks: Sequence[Check]) -> Table:
    """One row for each check, its first problems below it."""
    table = Table("", "check", "tried", title=f"{environment.name} {environment.version}".rstrip())
    for check in checks:
        mark = (
            Text("-", "yellow") if check.not_tried else Text("ok", "green") if check.has_passed else Text("no", "red")
        )
        text = Text(check.name)
        if check.not_tried:
            text.append(f" ({check.not_tried})", "dim")
        for problem in check.problems[:MAX_PROBLEMS]:
            text.append(f"\n  {_shortened(problem)}", "red")
        if len(check.problems) > MAX_PROBLEMS:
            text.append(f"\n  and {len(check.problems) - MAX_PROBLEMS} more", "red")
        table.add_row(mark, text, str(check.num_tried))
    return table


def _described(name: str) -> dict[str, Any]:
    try:
        environment = load_environment(name)
    except EnvironmentLoadError as error:
        return {"name": name, "trouble": str(error)}
    measures = environment.rubric.measures
    return {
        "name": name,
        "version": environment.version,
        "kind": _kind(environment),
        "train": environment.num_train_tasks,
        "held_out": environment.num_held_out_tasks,
        "tools": [tool.name for tool in environment.tools],
        "rewards": [measure.name for measure in measures if measure.weight is not None],
        "metrics": [measure.name for measure in measures if measure.weight is None],
    }


def _kind(environment: Environment) -> str:
    if isinstance(environment, SingleTurn) or environment.max_turns == 1:
        return "single turn"
    return "multi-turn" if isinstance(environment, MultiTurn) else type(environment).__name__


def _shortened(text: str, length: int = 400) -> str:
    return text if len(text) <= length else f"{text[:length]} …"
