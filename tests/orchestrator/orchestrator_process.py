"""An orchestrator process over an environment that needs no package: `python orchestrator_process.py RUN_FOLDER`."""

import asyncio
import sys
from pathlib import Path

from hone.config.load import load_recipe
from hone.envs import Rubric, SingleTurn, Task, Tasks, reward, user
from hone.observability import logs
from hone.orchestrator.loop import orchestrate
from hone.transport.addresses import load_addresses
from hone.transport.folders import RunFolder


def digits(*measures):
    def task(index):
        return Task(prompt=(user(str(index)),), reference=str(index))

    @reward
    def exact(answer: str) -> float:
        return float(bool(answer))

    return SingleTurn(
        name="digits",
        rubric=Rubric([exact, *measures]),
        train=Tasks(task),
        held_out=Tasks(lambda index: task(-1 - index), count=4),
    )


def main(path):
    folder = RunFolder(path)
    logs.configure("orchestrator", path, console=False)
    environments = {"digits": digits()}
    addresses = load_addresses(folder.addresses)
    asyncio.run(orchestrate(folder, load_recipe(folder.config), environments, addresses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
