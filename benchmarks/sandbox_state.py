"""Snapshots, what begins from them, and forks of sessions, beside F and beside the creation of a sandbox, in turn.

A quiet sandbox is snapshot by making what it wrote a layer, a busy one by copying that. Sandboxes that begin from a snapshot
and resets are timed to ready, as creations are.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import harness
from sandbox_measures.rounds import FLOOR, Floor, Taken, take_turns, timed

from hone.sandbox.cells.cells import Cells
from hone.sandbox.client import Sandbox, Snapshot
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.sandbox.python import Zygotes
from hone.schema.sandboxes import SandboxSpec

SPEC = SandboxSpec(memory_mb=512, disk_mb=64, max_processes=64, network="off")
AT_MOST = {"snapshot_ms": 0.5, "snapshot_deep_ms": 0.5, "begin_ratio": 1.5, "reset_ratio": 1.75}
DEEP = 14
HEAP_MB = (0, 50, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a few rounds: does it run?")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(rounds, Path(folder)))
    rows = [(name, value, f"<= {AT_MOST[name]:g}" if name in AT_MOST else "") for name, value in figures.items()]
    harness.show_table("the state of sandboxes", ["figure", "measured", "bar"], rows)
    result = {
        "claim": "a snapshot of a quiet sandbox takes at most half a millisecond and what begins from it about a creation",
        "ratio": figures["begin_ratio"],
        **figures,
        "at_most": AT_MOST,
    }
    print(json.dumps(result)) if arguments.quick else harness.finish("sandbox_state", result, "msgspec")


async def measure(rounds: int, folder: Path) -> dict[str, float]:
    """Milliseconds; ratios are to the creation of a sandbox to ready."""
    floor = Floor(folder)
    try:
        async with Node("bench", limits=Limits(max_snapshots=1 << 16, max_snapshot_mb=1 << 16)) as node:
            quiet = await of_quiet_sandboxes(node, floor, rounds)
            busy = await of_busy_sandboxes(node, rounds)
        sessions = await of_sessions(rounds)
    finally:
        floor.close()
    return {
        "f_ms": quiet.milliseconds(FLOOR),
        "create_ms": quiet.milliseconds("create"),
        "snapshot_ms": quiet.milliseconds("snapshot"),
        "snapshot_deep_ms": quiet.milliseconds("snapshot_deep"),
        "begin_ratio": quiet.ratio("begin", "create"),
        "begin_deep_ratio": quiet.ratio("begin_deep", "create"),
        "reset_ratio": quiet.ratio("reset", "create"),
        **{f"{name}_ms": busy.milliseconds(name) for name in busy.seconds},
        **{f"{name}_ms": sessions.milliseconds(name) for name in sessions.seconds},
    }


async def of_quiet_sandboxes(node: Node, floor: Floor, rounds: int) -> Taken:
    """Snapshots at one layer and at many, sandboxes from them, resets, and creations."""
    async with Sandbox(spec=SPEC, node=node) as box, Sandbox(spec=SPEC, node=node) as again:
        await box.write("a", bytes(4096))
        shallow, deep = await box.snapshot(), await box.snapshot()
        for _ in range(DEEP - 1):
            await box.write("a", bytes(4096))
            await deep.close()
            deep = await box.snapshot()

        async def ready(**arguments: object) -> float:
            one = Sandbox(spec=SPEC, **arguments)
            started = time.perf_counter()
            await one.open()
            await one.ready()
            seconds = time.perf_counter() - started
            await one.close()
            return seconds

        async def snapshot_of(before: Snapshot) -> float:
            async with Sandbox(spec=SPEC, snapshot=before) as one:
                await one.write("b", bytes(4096))
                started = time.perf_counter()
                taken = await one.snapshot()
                seconds = time.perf_counter() - started
                await one.ready()
            await taken.close()
            return seconds

        async def reset() -> None:
            await again.reset(shallow)
            await again.ready()

        return await take_turns(
            rounds,
            {
                FLOOR: floor,
                "create": lambda: ready(node=node),
                "begin": lambda: ready(snapshot=shallow),
                "begin_deep": lambda: ready(snapshot=deep),
                "snapshot": lambda: snapshot_of(shallow),
                "snapshot_deep": lambda: snapshot_of(deep),
                "reset": lambda: timed(reset()),
            },
            pause_seconds=0.002,
        )


async def of_busy_sandboxes(node: Node, rounds: int) -> Taken:
    """Copies of a hundred small files, and of sixteen megabytes, while a program runs."""

    async def copy(box: Sandbox) -> float:
        started = time.perf_counter()
        taken = await box.snapshot()
        seconds = time.perf_counter() - started
        await taken.close()
        return seconds

    async with Sandbox(spec=SPEC, node=node) as small, Sandbox(spec=SPEC, node=node) as large:
        for box, script in (
            (small, "for i in $(seq 100); do echo $i > $i; done"),
            (large, "head -c 16M /dev/urandom > a"),
        ):
            await box.exec(["sh", "-c", f"{script}; setsid sleep 3600 > /dev/null 2>&1 &"])
        await asyncio.sleep(0.5)
        return await take_turns(rounds, {"copy_100_files": lambda: copy(small), "copy_16_mb": lambda: copy(large)})


async def of_sessions(rounds: int) -> Taken:
    """Forks of a live session within its sandbox, with heaps of several sizes."""
    async with Zygotes() as zygotes, Cells() as cells:
        cell = await cells.create(SandboxSpec(memory_mb=2048, network="off"))
        python = await zygotes.warm(cell)
        measures = {}
        for heap in HEAP_MB:
            session = await python.session()
            await session.run(f"x = [bytes([i % 255 + 1]) * 4096 for i in range({heap} * 256)]")

            async def fork(session=session) -> float:
                started = time.perf_counter()
                other = await session.fork()
                seconds = time.perf_counter() - started
                await other.close()
                return seconds

            measures[f"session_fork_{heap}_mb"] = fork
        return await take_turns(rounds, measures)


if __name__ == "__main__":
    main()
