"""What an environment gives at each index, in a form that two processes can compare."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.envs.environment import Environment
from hone.envs.registry import load_environment, load_folder
from hone.schema.tasks import Task

DEADLINE_SECONDS = 300.0


def load_target(target: str, arguments: Mapping[str, Any]) -> Environment:
    """The environment of an installed package by name, or of a package's folder by path."""
    is_folder = os.sep in target or target in (os.curdir, os.pardir) or (Path(target) / "pyproject.toml").is_file()
    return load_folder(Path(target), **arguments) if is_folder else load_environment(target, **arguments)


@dataclass(frozen=True, slots=True)
class PlacedTask:
    """A task and where in an environment it is."""

    is_held_out: bool
    index: int
    task: Task

    @property
    def place(self) -> str:
        """`train task 0` and so on."""
        return f"{'held-out' if self.is_held_out else 'train'} task {self.index}"


def first_tasks(environment: Environment, num_tasks: int) -> list[PlacedTask]:
    """The first train tasks, then the first held-out ones, `num_tasks` of each where there are so many."""
    train, held_out = environment.num_train_tasks, environment.num_held_out_tasks
    return [
        *(PlacedTask(False, index, environment.train_task(index)) for index in range(_fewer(num_tasks, train))),
        *(PlacedTask(True, index, environment.held_out_task(index)) for index in range(_fewer(num_tasks, held_out))),
    ]


def fingerprint(environment: Environment, num_tasks: int) -> dict[str, str]:
    """The identity of the first tasks of both splits, gold answers included, by their place."""
    found = {}
    for placed in first_tasks(environment, num_tasks):
        gold = environment.gold(placed.task)
        found[placed.place] = placed.task.key if gold is None else f"{placed.task.key} {Task(prompt=tuple(gold)).key}"
    return found


def fingerprint_elsewhere(
    target: str, arguments: Mapping[str, Any], num_tasks: int, *, deadline_seconds: float = DEADLINE_SECONDS
) -> dict[str, str]:
    """The fingerprint that a new process finds, with other string hashes; `ValueError` when it finds none."""
    command = [sys.executable, "-m", "hone.envs.fingerprint", target, json.dumps(arguments), str(num_tasks)]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=deadline_seconds,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"a second process gave no tasks within {deadline_seconds:g} s") from error
    try:
        found = json.loads(ended.stdout.rpartition("\n")[2] if ended.returncode == 0 else "")
    except json.JSONDecodeError as error:
        last = ended.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"a second process gave no tasks: {last or f'exit code {ended.returncode}'}") from error
    return dict(found)


def _fewer(wanted: int, available: int | None) -> int:
    return wanted if available is None else min(wanted, available)


def main(arguments: list[str]) -> None:
    target, settings, num_tasks = arguments
    found = fingerprint(load_target(target, json.loads(settings)), int(num_tasks))
    sys.stdout.write("\n" + json.dumps(found))  # its own line: environments may print


if __name__ == "__main__":
    main(sys.argv[1:])
