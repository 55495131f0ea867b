"""One cell at a time: creation, a program, pause, and the warm pool and the address of a node, in turn with F."""

import asyncio
import time

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.errors import Unsupported
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.schema.sandboxes import SandboxSpec
from sandbox_measures.rounds import FLOOR, Floor, Taken, take_turns, timed

NETWORK = SandboxSpec(memory_mb=256, disk_mb=64, max_processes=64)
OFF = SandboxSpec(memory_mb=256, disk_mb=64, max_processes=64, network="off")
WARM_SECONDS = 10.0


async def creations(floor: Floor, rounds: int) -> Taken:
    """Create to ready with a network namespace (`none`) and without (`off`), and the end."""
    async with Cells() as cells:
        made: list[Cell] = []

        async def create(spec: SandboxSpec) -> float:
            started = time.perf_counter()
            made.append(await cells.create(spec))
            return time.perf_counter() - started

        await create(OFF)
        return await take_turns(
            rounds,
            {
                FLOOR: floor,
                "destroy": lambda: timed(made.pop().destroy()),
                "create_net": lambda: create(NETWORK),
                "destroy_net": lambda: timed(made.pop().destroy()),
                "create": lambda: create(OFF),
            },
        )


async def programs(floor: Floor, rounds: int) -> Taken:
    """A program in a running cell, and the cell's pause, apart from creations, which the kernel ends long afterwards."""
    async with Cells() as cells:
        cell = await cells.create(NETWORK)
        measures = {FLOOR: floor, "exec": lambda: timed(cell.exec(["/bin/true"]))}
        try:
            await cell.pause()
            await cell.resume()
            measures |= {"pause": lambda: timed(cell.pause()), "resume": lambda: timed(cell.resume())}
        except Unsupported:
            pass
        return await take_turns(rounds, measures)


async def acquisitions(floor: Floor, rounds: int) -> Taken:
    """A sandbox from a node's warm pool, from asking to ready; the pool is full again before each."""
    async with Node("bench", limits=Limits(max_warm=8)) as node:
        await node.keep_warm(OFF, 4)

        async def acquire() -> float:
            async with asyncio.timeout(WARM_SECONDS):
                while node.statistics()["sandbox/warm"] < 4:  # noqa: ASYNC110 - a pool does not tell that it is full
                    await asyncio.sleep(0.002)
            started = time.perf_counter()
            sandbox = node.create(OFF)
            await sandbox.ready()
            seconds = time.perf_counter() - started
            assert (await sandbox.exec(["/bin/true"])).is_success
            await sandbox.close()
            return seconds

        return await take_turns(rounds, {FLOOR: floor, "acquire": acquire})
