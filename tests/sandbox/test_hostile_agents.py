"""A cell whose agent is somebody else's: whatever it says, it costs that cell only, and is nobody's answer."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from hone.sandbox.cells import programs
from hone.sandbox.cells.cell import ENDED, FAILED, READY, REPORT, Cell
from hone.sandbox.cells.programs import ending_of
from hone.sandbox.client import Sandbox
from hone.sandbox.errors import SandboxError
from hone.sandbox.node.node import Node
from hone.schema.sandboxes import SandboxSpec

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)
STOPPED = 0x137F
NOTHING = Path("/dev/null")


@pytest.fixture
async def node(cells):
    async with Node("n") as node:
        yield node


@pytest.fixture
async def boxes(node):
    """The one that turns hostile, and its neighbour."""
    async with Sandbox(spec=SMALL, node=node) as hostile, Sandbox(spec=SMALL, node=node) as neighbour:
        await asyncio.gather(hostile.ready(), neighbour.ready())
        yield hostile, neighbour


def possessed(cell: Cell) -> socket.socket:
    """The agent's end of the cell's control socket, which the agent does not have any more."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    control = cell._control.fileno()
    loop.remove_reader(control)
    os.dup2(ours.fileno(), control, inheritable=False)
    ours.close()
    loop.add_reader(control, cell._receive)
    theirs.setblocking(False)
    return theirs


def report(kind: int, identity: int = 1, status: int = 0, error: int = 0, usage=(0, 0, 0)) -> bytes:
    return REPORT.pack(kind, identity, status, error, *usage)


LIES = {
    "too long": [b"x" * 20_000],
    "too short": [b"x"],
    "nothing": [b""],
    "no known kind": [report(77)],
    "that it is ready, again": [report(READY)],
    "that it never began": [report(FAILED, error=2)],
    "the end of what never began": [report(ENDED)] * 2,
    "an end that is none": [report(ENDED, status=STOPPED)],
    "an error that there is not": [report(ENDED, error=-5)],
    "more memory than there is": [report(ENDED, usage=(0, 0, (1 << 64) - 1))],
}


@pytest.mark.parametrize("lie", LIES)
async def test_an_agent_that_lies_costs_its_own_cell_only(node, boxes, lie):
    hostile, neighbour = boxes
    with possessed(node.sandbox(hostile.sandbox_id).cell) as agent:
        call = asyncio.create_task(hostile.exec(["true"]))
        await asyncio.sleep(0.05)
        agent.recv(1 << 20)
        for message in LIES[lie]:
            agent.send(message)
        if lie == "the end of what never began":
            await call  # the first of the two ends it
        else:
            with pytest.raises(SandboxError):
                await call
        assert (await neighbour.exec(["echo", "well"])).stdout == "well\n"
        await gone(node, hostile)


async def test_an_agent_that_never_answers_costs_its_own_cell_only(node, boxes, monkeypatch):
    monkeypatch.setattr(programs, "KILL_SECONDS", 0.2)
    hostile, neighbour = boxes
    with possessed(node.sandbox(hostile.sandbox_id).cell):
        with pytest.raises(SandboxError, match="does not die"):
            await hostile.exec(["true"], timeout_seconds=0.1)
        assert (await neighbour.exec(["echo", "well"])).stdout == "well\n"
        await gone(node, hostile)


async def test_an_agent_that_does_not_listen_costs_its_own_cell_only(node, boxes):
    hostile, neighbour = boxes
    with possessed(node.sandbox(hostile.sandbox_id).cell):
        many = [asyncio.create_task(hostile.exec(["true"], timeout_seconds=60)) for _ in range(400)]
        done, waiting = await asyncio.wait(many, timeout=0.5)
        assert done  # its socket is full
        for task in done:
            with pytest.raises(SandboxError, match="does not listen"):
                task.result()
        assert (await neighbour.exec(["echo", "well"])).stdout == "well\n"
        await hostile.close()
        for task in waiting:
            with pytest.raises(SandboxError):
                await task


async def test_a_flood_of_messages_and_descriptors_leaves_none_behind(node, boxes):
    hostile, neighbour = boxes
    before = num_descriptors()
    with possessed(node.sandbox(hostile.sandbox_id).cell) as agent, NOTHING.open() as nothing:
        try:
            for _ in range(1000):
                socket.send_fds(agent, [report(READY)], [nothing.fileno()] * 10)
        except BlockingIOError:
            pass  # its socket is full
        with pytest.raises(SandboxError):
            await hostile.exec(["true"])
        assert (await neighbour.exec(["echo", "well"])).stdout == "well\n"
        await gone(node, hostile)
    assert num_descriptors() <= before


HOARD = """
import socket
pairs = []
try:
    while True:
        pairs.append(socket.socketpair())
        pairs[-1][0].setblocking(False)
        for _ in range(100):
            socket.send_fds(pairs[-1][0], [b"x"], [pairs[-1][1].fileno()] * 250)
except OSError as error:
    print(error, flush=True)
input()
"""


async def test_descriptors_that_a_cell_has_on_their_way_are_not_its_neighbours_trouble(boxes):
    hostile, neighbour = boxes
    process = await hostile.spawn(["python3", "-c", HOARD])
    assert await process.read()
    assert (await neighbour.exec(["echo", "well"])).stdout == "well\n"
    assert (await hostile.exec(["echo", "well"])).stdout == "well\n"
    await process.close()


async def test_an_agent_that_lies_before_it_is_ready_costs_its_own_cell_only(cells, cell):
    for message, descriptors in ((report(READY), 0), (report(READY), 3), (report(ENDED), 0), (b"", 0)):
        liar = Cell("liar", SMALL, cell.image, 0, 0, lambda _: asyncio.sleep(0))
        with liar.open() as theirs, NOTHING.open() as nothing:
            socket.send_fds(theirs, [message], [nothing.fileno()] * descriptors)
            with pytest.raises(SandboxError, match=r"nonsense|gone"):
                await liar.until_ready([])
        await liar.destroy()
    assert (await cell.exec(["true"])).is_success


def test_what_an_agent_reports_is_an_end_or_nothing():
    assert ending_of(3 << 8, 0, [1_000_000, 500_000, 2]).code == 3
    assert ending_of(signal.SIGKILL, 0, [0, 0, 0]).code == -9
    assert ending_of(0, 2, [0, 0, 0]).code == 126
    for lie in ((STOPPED, 0, [0, 0, 0]), (0xFFFF, 0, [0, 0, 0]), (0, 4096, [0, 0, 0]), (0, 0, [0, 1 << 50, 0])):
        assert ending_of(*lie) is None


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def gone(node: Node, box: Sandbox) -> None:
    async with asyncio.timeout(10):
        while any(status.sandbox_id == box.sandbox_id for status in node.sandboxes()):
            await asyncio.sleep(0.02)
