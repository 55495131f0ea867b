"""Clients of a node that ask for much and read little, over real sockets: they wait, and nobody else does."""

import asyncio
import contextlib
import socket

import msgspec
import pytest

import flaky
from hone.sandbox.wire.frames import framed
from hone.sandbox.wire.remote import RemoteNode
from hone.sandbox.wire.serve import NodeServer
from hone.sandbox.wire.session import SessionLimits
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import ExecResult, SandboxSpec

LIMITS = SessionLimits(max_held_bytes=4 << 20)


@pytest.fixture
async def server(tmp_path):
    node = flaky.CountingNode()
    async with NodeServer(node, f"unix:{tmp_path}/node", session_limits=LIMITS, grace_seconds=0.2) as server:
        yield server
    await asyncio.gather(*node.tasks)


@pytest.fixture
async def flooding(server):
    """A client that has greeted, as a socket that does not block."""
    node = server.node
    node.create(SandboxSpec(), key="k", owner="local")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.address.removeprefix("unix:"))
        connection.sendall(framed(calls.Hello(calls.VERSION, "s" * 32, "")))
        connection.setblocking(False)
        yield connection


async def until_it_takes_no_more(connection: socket.socket, data) -> int:
    """Send on and on; how many frames were taken before none was for a second."""
    num_sent = 0
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError):
        while num_sent < 200_000:
            async with asyncio.timeout(1):
                await loop.sock_sendall(connection, data(num_sent))
            num_sent += 1
    return num_sent


def ask(call: int, *argv: str) -> bytes:
    return framed(calls.Exec(call, "n.1.0", list(argv), b"", {}, ".", 1.0, 1))


async def others_work(server) -> None:
    client = RemoteNode(server.address)
    await client.connected()
    box = await client.create(SandboxSpec(), key="mine")
    assert (await box.exec(["ls"])).stdout == "ls"
    await client.close()


async def test_who_reads_no_answers_is_not_listened_to_and_gets_each_answer_when_it_reads(server, flooding):
    num_sent = await until_it_takes_no_more(flooding, lambda call: ask(call, "print", "100000"))
    assert num_sent < 50_000
    (session,) = [client.session for client in server._clients.values()]
    assert session._num_held_bytes <= 4 << 20
    await others_work(server)
    answers = await read_answers(flooding)
    whole = [one for one in answers if isinstance(one, calls.Done)]
    lost = [one for one in answers if isinstance(one, calls.Failed)]
    assert len(whole) >= 30
    assert {len(msgspec.msgpack.decode(one.result, type=ExecResult).stdout) for one in whole} == {100_000}
    assert {one.outcome for one in lost} <= {"node_lost"}
    numbers = [one.call for one in answers]
    assert len(numbers) == len(set(numbers))


async def test_who_pings_and_reads_nothing_is_not_listened_to(server, flooding):
    assert await until_it_takes_no_more(flooding, lambda call: framed(calls.Ping(call)) * 100) < 20_000
    await others_work(server)


async def read_answers(connection: socket.socket) -> list[object]:
    """What comes before nothing does for half a second, but for the welcome."""
    received = bytearray()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0.5):
                received += await loop.sock_recv(connection, 1 << 20)
    answers = []
    while len(received) >= 4:
        size = int.from_bytes(received[:4], "little")
        answers.append(msgspec.msgpack.decode(bytes(received[4 : 4 + size]), type=calls.ToClient))
        del received[: 4 + size]
    return answers[1:]
