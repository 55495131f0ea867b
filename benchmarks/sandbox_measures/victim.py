"""A process to be killed: it uses sandboxes in every way there is, in itself or at a node, or it is that node.

`embedded`, `client ADDRESS` or `node FOLDER`; its first line says that it is at work. What a client meets that it should
not, it appends to the file $VICTIM_COMPLAINTS.
"""

import asyncio
import os
import random
import sys
import traceback
from pathlib import Path

from hone.sandbox.client import Sandbox, SandboxError, SandboxSpec
from hone.sandbox.errors import Unsupported
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.sandbox.wire.serve import NodeServer

MARK = "7654321"
SPEC = SandboxSpec(memory_mb=64, disk_mb=16, max_processes=32, network="off")
NETWORK = SandboxSpec(memory_mb=64, disk_mb=16, max_processes=32)


async def programs(box: Sandbox) -> None:
    """One with a daemon, one that is late, one in conversation that is left as it is."""
    await box.exec(["sh", "-c", f"setsid sleep {MARK} & sleep 0.01"])
    await box.exec(["sleep", MARK], timeout_seconds=0.02)
    process = await box.spawn(["sh", "-c", f"cat & sleep {MARK}"])
    await process.write(b"x" * 1000)
    await process.close()


async def python(box: Sandbox) -> None:
    """A session with a child, a late one, a snippet."""
    await box.python(f"import subprocess; child = subprocess.Popen(['sleep', '{MARK}'])")
    await box.python("while True: pass", timeout_seconds=0.02)
    await box.snippet("print(1)")


async def files(box: Sandbox) -> None:
    """Written and read while something runs."""
    running = asyncio.ensure_future(box.exec(["sleep", "0.02"]))
    await box.write("deep/file", b"x" * 100_000)
    await box.read("deep/file")
    await running


async def pause(box: Sandbox) -> None:
    """Stopped in the middle of things."""
    running = asyncio.ensure_future(box.exec(["sleep", "0.05"]))
    try:
        await box.pause()
        await asyncio.sleep(0.02)
        await box.resume()
    except Unsupported:
        pass
    await running


async def cancel(box: Sandbox) -> None:
    """A call that nobody waits for any more."""
    running = asyncio.ensure_future(box.exec(["sleep", MARK]))
    await asyncio.sleep(random.uniform(0, 0.02))
    running.cancel()
    await asyncio.wait([running])


async def state(box: Sandbox) -> None:
    """Snapshots of a quiet and of a busy sandbox, others from them, a reset, and one that is left to its time."""
    await box.write("file", b"x" * 100_000)
    async with await box.snapshot() as quiet:
        await box.exec(["sh", "-c", f"setsid sleep {MARK} & echo 1 > file"])
        await box.snapshot(ttl_seconds=30)
        for fork in await box.fork(2):
            await fork.read("file")
            await fork.close()
        await box.reset(quiet)
        await box.read("file")


async def one(node: str | None, use: object) -> None:
    async with Sandbox(spec=random.choice((SPEC, NETWORK)), node=node) as box:
        await use(box)


async def work(node: str | None) -> None:
    """For ever, or until the node is gone: one sandbox after another, now and then a burst."""
    uses = (programs, python, files, pause, cancel, state)
    while True:
        for use in random.sample(uses, len(uses)):
            await one(node, use)
        await asyncio.gather(*(one(node, random.choice(uses)) for _ in range(6)))


async def client(node: str | None) -> None:
    print("at work", flush=True)
    workers = [asyncio.ensure_future(work(node)) for _ in range(2)]
    done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
    for worker in done:
        error = worker.exception()
        if not (node and isinstance(error, SandboxError) and error.outcome.value == "node_lost"):
            complain("".join(traceback.format_exception(error)))
    await asyncio.Event().wait()


def complain(text: str) -> None:
    with Path(os.environ["VICTIM_COMPLAINTS"]).open("a") as file:
        file.write(f"{text}\n")


async def node(folder: Path) -> None:
    async with (
        Node("victim", folder=folder, limits=Limits(max_warm=4)) as node,
        NodeServer(node, f"unix:{folder}/socket", grace_seconds=0.2),
    ):
        await node.keep_warm(SPEC, 2)
        print("at work", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    asyncio.run(node(Path(rest[0])) if kind == "node" else client(rest[0] if rest else None))
