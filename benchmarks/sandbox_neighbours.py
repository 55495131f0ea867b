"""What a cell feels of its neighbours' abuse: how long a program takes in it before and during each, in turn with F.

One abuser with one core, as many as the machine has cores with --abusers; the neighbour runs `true` over and over. The bar
is a ratio of medians of at most 2.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import harness
from sandbox_measures.rounds import FLOOR, Floor, Taken, take_turns, timed

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.errors import SandboxError
from hone.schema.sandboxes import SandboxSpec

ABUSER = SandboxSpec(memory_mb=128, disk_mb=64, max_processes=64, cpus=1.0)
NEIGHBOUR = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64, cpus=1.0)
BAR = 2.0
SETTLE_SECONDS = 0.3
PYTHONS = {
    "fork bomb": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """,
    "thread bomb": """
        import threading
        def live():
            while True:
                try:
                    threading.Thread(target=live).start()
                except RuntimeError:
                    pass
        live()
    """,
    "busy loops": """
        import os
        for _ in range(3):
            os.fork()
        while True:
            pass
    """,
    "memory hogs": """
        import os, time
        while True:
            if os.fork() == 0:
                hog = []
                while True:
                    hog.append(bytearray(b"x") * (4 << 20))
            time.sleep(0.01)
            try:
                os.waitpid(-1, os.WNOHANG)
            except OSError:
                pass
    """,
    "disk fill": """
        import os
        while True:
            with open("/work/file", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 20))
                except OSError:
                    pass
            os.unlink("/work/file")
    """,
    "file storm": """
        import os
        while True:
            for n in range(1000):
                os.close(os.open(f"/work/{n}", os.O_CREAT))
            for n in range(1000):
                os.unlink(f"/work/{n}")
    """,
    "timer storm": """
        import threading, time
        def storm():
            while True:
                time.sleep(0.00005)
        for _ in range(30):
            threading.Thread(target=storm).start()
    """,
    "pipe hoard": """
        import os
        while True:
            ends = []
            try:
                while True:
                    ends.append(os.pipe())
                    os.set_blocking(ends[-1][1], False)
                    try:
                        while True:
                            os.write(ends[-1][1], bytes(65536))
                    except BlockingIOError:
                        pass
            except OSError:
                for end in ends:
                    os.close(end[0]); os.close(end[1])
    """,
    "socket storm": """
        import socket
        while True:
            one, other = socket.socketpair()
            one.send(bytes(1000)); other.recv(1000)
            one.close(); other.close()
    """,
    "program storm": """
        import os
        while True:
            os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    """,
    "mapping storm": """
        import mmap
        while True:
            with mmap.mmap(-1, 32 << 20) as area:
                for page in range(0, 32 << 20, 4096):
                    area[page] = 1
    """,
}
SHELLS = {"output flood": "exec yes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--abusers", type=int, default=1)
    parser.add_argument("--only", default="", help="the name of one abuse")
    parser.add_argument("--quick", action="store_true", help="a few rounds: does it run?")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(run(Path(folder), rounds, arguments.abusers, arguments.only))
    rows = [
        (name, *(figure[key] for key in ("before_ms", "during_ms", "floor_ratio", "ratio")), "yes" if figure["ratio"] <= BAR else "NO")
        for name, figure in figures.items()
    ]  # fmt: skip
    harness.show_table("a neighbour's exec", ["abuse", "before, ms", "during, ms", "F's ratio", "ratio", "kept"], rows)
    worst = max(figure["ratio"] for figure in figures.values())
    result = {"claim": f"<= {BAR:g}", "ratio": worst, "abusers": arguments.abusers, "abuses": figures}
    if arguments.quick or arguments.only:
        print(json.dumps(result))
    else:
        harness.finish("sandbox_neighbours", result)


async def run(folder: Path, rounds: int, num_abusers: int, only: str) -> dict[str, dict[str, float]]:
    """Figures by abuse."""
    commands = {name: ["python3", "-c", textwrap.dedent(code)] for name, code in PYTHONS.items()}
    commands |= {name: ["sh", "-c", script] for name, script in SHELLS.items()}
    floor = Floor(folder)
    figures = {}
    try:
        async with Cells() as cells:
            neighbour = await cells.create(NEIGHBOUR)
            await neighbour.exec(["/bin/true"])
            for name, command in commands.items():
                if only in ("", name):
                    figures[name] = await measure(cells, neighbour, floor, command, rounds, num_abusers)
    finally:
        floor.close()
    return figures


async def measure(
    cells: Cells, neighbour: Cell, floor: Floor, command: list[str], rounds: int, num_abusers: int
) -> dict[str, float]:
    measures = {FLOOR: floor, "exec": lambda: timed(_true(neighbour))}
    before = await take_turns(rounds, measures)
    async with abused(cells, command, num_abusers):
        await asyncio.sleep(SETTLE_SECONDS)
        during = await take_turns(rounds, measures)
    await asyncio.sleep(SETTLE_SECONDS)
    return {
        "before_ms": before.milliseconds("exec"),
        "during_ms": during.milliseconds("exec"),
        "floor_ratio": during.milliseconds(FLOOR) / before.milliseconds(FLOOR),
        "ratio": during.milliseconds("exec") / before.milliseconds("exec"),
        "late_ratio": late(during) / late(before),
    }


def late(taken: Taken) -> float:
    """The ninth decile."""
    return statistics.quantiles(taken.seconds["exec"], n=10)[-1]


async def _true(cell: Cell) -> None:
    assert (await cell.exec(["/bin/true"])).is_success


@asynccontextmanager
async def abused(cells: Cells, command: list[str], number: int) -> AsyncIterator[None]:
    """Cells in which a command runs over and over, and their end."""
    made = [await cells.create(ABUSER) for _ in range(number)]
    tasks = [asyncio.ensure_future(_over_and_over(cell, command)) for cell in made]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for cell in made:
            started = time.perf_counter()
            await cell.destroy()
            assert time.perf_counter() - started < 10


async def _over_and_over(cell: Cell, command: list[str]) -> None:
    while True:
        with suppress(SandboxError):
            await cell.exec(command, timeout_seconds=60, max_output_bytes=1 << 30)
        await asyncio.sleep(0.001)


if __name__ == "__main__":
    main()
