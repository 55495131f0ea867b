"""What an environment gives at each index, in a form that two processes can compare."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
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


def fingerprint(environment: Environment, num_tasks: int) -> dict[str, str]:
    """The identity of the first tasks of both splits, by where they are: `train task 0` and so on."""
    found = {}
    for place, task in first_tasks(environment, num_tasks):
        gold = environment.gold(task)
        found[place] = task.key if gold is None else f"{task.key} {Task(prompt=tuple(gold)).key}"
    return found


def first_tasks(environment: Environment, num_tasks: int) -> list[tuple[str, Task]]:
    """The first tasks of both splits, each with its place in words."""
    splits: list[tuple[str, Callable[[int], Task], int | None]] = [
        ("train", environment.train_task, environment.num_train_tasks),
        ("held-out", environment.held_out_task, environment.num_held_out_tasks),
    ]
    return [
        (f"{split} task {index}", task_at(index))
        for split, task_at, count in splits
        for index in range(num_tasks if count is None else min(num_tasks, count))
    ]


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


def main(arguments: list[str]) -> None:
    target, settings, num_tasks = arguments
    found = fingerprint(load_target(target, json.loads(settings)), int(num_tasks))
    sys.stdout.write("\n" + json.dumps(found))  # its own line: environments may print


if __name__ == "__main__":
    main(sys.argv[1:])
