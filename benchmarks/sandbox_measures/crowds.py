"""Many cells: bursts, thousands that are idle, what each costs, and how many come and go in a second."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TypeVar

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.descriptors import PER_CELL, provide
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.sandbox.python import Zygotes
from sandbox_measures.cells import OFF
from sandbox_measures.rounds import FLOOR, Floor, take_turns, timed

AT_ONCE = 16
MAX_LOOKS = 60
SETTLED_KB = 2048

Given = TypeVar("Given")
Result = TypeVar("Result")


async def burst(number: int) -> dict[str, float]:
    """All at once until all are ready; then a program in all of them at once; then the end of all at once."""
    provide(number * PER_CELL)
    async with Cells() as cells:
        await cells.create(OFF)
        started = time.perf_counter()
        made = await asyncio.gather(*(cells.create(OFF) for _ in range(number)))
        ready = time.perf_counter() - started
        started = time.perf_counter()
        results = await asyncio.gather(*(cell.exec(["/bin/true"]) for cell in made))
        executed = time.perf_counter() - started
        assert all(result.is_success for result in results)
        ended = await timed(asyncio.gather(*(cell.destroy() for cell in made)))
    return {
        f"burst_{number}_seconds": ready,
        "exec_all_per_second": number / executed,
        "destroy_all_per_second": number / ended,
    }


async def crowd(floor: Floor, number: int, rounds: int) -> dict[str, float]:
    """So many idle cells, a program in each of them, and then how long one takes in any of them."""
    provide(number * PER_CELL)
    async with Cells() as cells:
        await cells.create(OFF)
        before = available_kb()
        started = time.perf_counter()
        made = await some_at_once(lambda _: cells.create(OFF), range(number))
        ready = time.perf_counter() - started
        idle = (before - available_kb()) / number
        results = await some_at_once(lambda cell: cell.exec(["/bin/true"]), made)
        assert all(result.is_success for result in results)
        which = iter(range(0, number, max(1, number // (rounds + 1))))

        async def execute() -> float:
            return await timed(made[next(which)].exec(["/bin/true"]))

        taken = await take_turns(min(rounds, number), {FLOOR: floor, "exec": execute})
        started = time.perf_counter()
        await some_at_once(lambda cell: cell.destroy(), made)
        ended = time.perf_counter() - started
    return {
        f"cells_{number}": number,
        "idle_kb": idle,
        f"create_{number}_seconds": ready,
        f"destroy_{number}_seconds": ended,
        f"exec_{number}_f": taken.ratio("exec"),
    }


async def warm_crowd(number: int) -> dict[str, float]:
    """What an idle cell costs with a warm Python that has run something."""
    async with Zygotes() as zygotes, Cells() as cells:
        first = await cells.create(OFF)
        await (await zygotes.warm(first)).run("1")
        before = available_kb()

        async def warm_up(_: int) -> Cell:
            cell = await cells.create(OFF)
            assert (await (await zygotes.warm(cell)).run("1")).is_success
            return cell

        await some_at_once(warm_up, range(number))
        await asyncio.sleep(0.5)
        return {"idle_python_kb": (before - available_kb()) / number}


async def sustained(seconds: float) -> dict[str, float]:
    """Create, exec and destroy, over and over, in as many tasks as keep the cores busy; cells per second and core."""
    cores = len(os.sched_getaffinity(0))
    counts = [0] * (2 * cores)

    async def turn_over(cells: Cells, number: int) -> None:
        while time.perf_counter() < end:
            cell = await cells.create(OFF)
            assert (await cell.exec(["/bin/true"])).is_success
            await cell.destroy()
            counts[number] += 1

    async with Cells() as cells:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(turn_over(cells, number) for number in range(len(counts))))
    return {"sustained_per_core": sum(counts) / seconds / cores}


async def storm(number: int) -> dict[str, float]:
    """Sandboxes of a node that come and go in a second, asked for by ten times as many as there is room for and by few."""
    room = 8 * len(os.sched_getaffinity(0))
    async with Node("bench", limits=Limits(max_sandboxes=room)) as node:
        await _come_and_go(node, room, room)
        few = await _come_and_go(node, number, room // 2)
        many = await _come_and_go(node, number, 10 * room)
    return {"storm_share": many / few}


async def _come_and_go(node: Node, number: int, at_once: int) -> float:
    async def one(_: int) -> None:
        sandbox = node.create(OFF)
        await sandbox.ready()
        await sandbox.close()

    started = time.perf_counter()
    await some_at_once(one, range(number), at_once)
    return number / (time.perf_counter() - started)


async def some_at_once(
    work: Callable[[Given], Awaitable[Result]], given: Iterable[Given], at_once: int = AT_ONCE
) -> list[Result]:
    """Do something for each, a few at a time; the results in order."""
    places = asyncio.Semaphore(at_once)

    async def one(item: Given) -> Result:
        async with places:
            return await work(item)

    return list(await asyncio.gather(*map(one, given)))


def available_kb() -> int:
    """What the machine has left once that changes no more: the kernel frees late what belonged to those before."""
    looks: list[int] = []
    while len(looks) < MAX_LOOKS and (len(looks) < 4 or max(looks[-4:]) - min(looks[-4:]) > SETTLED_KB):
        time.sleep(0.5)
        lines = Path("/proc/meminfo").read_text().splitlines()
        looks.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    return looks[-1]
