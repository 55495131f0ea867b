"""What a sandbox of a node was: snapshots, forks and resets, in turn with F."""

import time

from hone.sandbox.client import Sandbox
from hone.sandbox.node.node import Node
from sandbox_measures.cells import OFF
from sandbox_measures.rounds import FLOOR, Floor, Taken, take_turns

FILE = b"x" * (64 << 10)


async def states(floor: Floor, rounds: int) -> Taken:
    """`snapshot` of a sandbox in which nothing runs, `fork` until the other one is ready, `reset` until it is as it was."""
    async with Node("bench") as node, Sandbox(spec=OFF, node=node) as box:
        await box.write("file", FILE)

        async def snapshot() -> float:
            started = time.perf_counter()
            taken = await box.snapshot()
            seconds = time.perf_counter() - started
            await taken.close()
            return seconds

        async def fork() -> float:
            started = time.perf_counter()
            (other,) = await box.fork(1)
            await other.ready()
            seconds = time.perf_counter() - started
            assert await other.read("file") == FILE
            await other.close()
            return seconds

        async def reset() -> float:
            async with await box.snapshot() as taken:
                started = time.perf_counter()
                await box.reset(taken)
                await box.ready()
                return time.perf_counter() - started

        measures = {FLOOR: floor, "snapshot": snapshot, "fork": fork, "reset": reset}
        await take_turns(2, measures)
        return await take_turns(rounds, measures)
