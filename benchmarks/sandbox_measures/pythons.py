"""Python in cells, in turn with what it replaces: a cold `python3 -c print(1)` outside of any sandbox."""

import asyncio
import subprocess
import sys
import time

from hone.sandbox.cells.cells import Cells
from hone.sandbox.python import Zygotes
from sandbox_measures.cells import OFF
from sandbox_measures.rounds import FLOOR, Floor, Taken, take_turns

CALLS_IN_TURN = 10


async def pythons(floor: Floor, rounds: int) -> Taken:
    """Sessions (calls that follow one another, and the first after something else), snippets, and from nothing to output."""
    async with Zygotes() as zygotes, Cells() as cells:
        cell = await cells.create(OFF)
        warm = await zygotes.warm(cell)
        session = await warm.session()

        async def call() -> float:
            started = time.perf_counter()
            answer = await session.run("1 + 1")
            seconds = time.perf_counter() - started
            assert answer.text == "2\n", answer
            return seconds

        async def calls() -> list[float]:
            return [await call() for _ in range(CALLS_IN_TURN)]

        async def snippet() -> float:
            started = time.perf_counter()
            result = await warm.run("print(1)")
            seconds = time.perf_counter() - started
            assert result.stdout == "1\n", result
            return seconds

        async def first_output() -> float:
            started = time.perf_counter()
            other = await cells.create(OFF)
            python = await zygotes.warm(other)
            result = await python.run("print(1)")
            seconds = time.perf_counter() - started
            assert result.stdout == "1\n", result
            await python.close()
            await other.destroy()
            return seconds

        measures = {
            FLOOR: floor,
            "cold": cold,
            "snippet": snippet,
            "session_first": call,
            "session": calls,
            "first_output": first_output,
        }
        await take_turns(3, measures)
        return await take_turns(rounds, measures)


async def cold() -> float:
    """`python3 -c print(1)`, unsandboxed, to its end."""
    started = time.perf_counter()
    finished = subprocess.run([sys.executable, "-c", "print(1)"], stdout=subprocess.PIPE, check=True)  # noqa: ASYNC221
    seconds = time.perf_counter() - started
    assert finished.stdout == b"1\n"
    await asyncio.sleep(0)
    return seconds
