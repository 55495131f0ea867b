"""Broken connections to a node: what was under way goes on, once, and no byte is lost or comes twice."""

import asyncio
import os

import pytest

from hone.sandbox.node import Node
from hone.sandbox.remote import RemoteNode
from hone.sandbox.serve import NodeServer
from hone.schema.sandboxes import SandboxSpec
from proxies import Proxy

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)


@pytest.fixture
async def server(cells):
    async with Node("n") as node, NodeServer(node, "tcp://127.0.0.1:0", tokens={"secret": "me"}) as server:
        yield server


@pytest.fixture
async def proxy(server):
    async with Proxy(int(server.address.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy):
    client = RemoteNode(proxy.address, "secret")
    await client.connected()
    yield client
    await client.close()


@pytest.fixture
async def box(client):
    box = await client.create(SMALL, key="k")
    await box.ready()
    yield box
    await box.close()


async def test_a_program_under_way_when_the_connection_breaks_is_run_once(client, box, proxy):
    call = asyncio.create_task(box.exec(["sh", "-c", "echo x >> ran; sleep 0.5; cat ran"]))
    for _ in range(3):
        await asyncio.sleep(0.1)
        proxy.cut()
    assert (await call).stdout == "x\n"
    assert client.num_reconnections >= 1


async def test_a_stream_through_many_cuts_is_whole(client, box, proxy):
    sent = os.urandom(4 << 20)
    process = await box.spawn(["cat"])
    received = bytearray()

    async def feed():
        await process.write(sent)
        process.end_input()

    writing = asyncio.create_task(feed())
    next_cut = 0
    while data := await process.read():
        received += data
        if len(received) >= next_cut:
            proxy.cut()
            next_cut += len(sent) // 10
    await writing
    assert bytes(received) == sent
    assert await process.wait() == 0
    assert client.num_reconnections >= 5
    await process.close()
