"""Ports of sandboxes, reached from outside: through the node, over the wire, and from a port of this machine."""

import asyncio
import os
import signal
import socket
import sys

import pytest

from hone.sandbox.client import Sandbox
from hone.sandbox.errors import Busy, SandboxError, Unsupported
from hone.sandbox.gateway.discovery import Fixed
from hone.sandbox.gateway.gateway import Gateway
from hone.sandbox.gateway.tenants import Grant, Scope, Tenants, digest_of
from hone.sandbox.node.node import Node
from hone.sandbox.wire.addresses import parse_address
from hone.sandbox.wire.serve import NodeServer

SMALL = {"memory_mb": 128, "disk_mb": 16, "max_processes": 64}
ME = Tenants({digest_of("mine"): Grant("me", frozenset({Scope.CREATE, Scope.USE}))}, {})
ECHO = """
import socket, sys, threading
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], 8000), family=family)
print("up", flush=True)
def echo(one):
    with one:
        while data := one.recv(65536):
            one.sendall(data)
        one.sendall(b"over")
while True:
    threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
"""


@pytest.fixture
async def node(cells):
    """Of its own; `cells` skips where there can be none, and checks that nothing is left."""
    async with Node("n") as node:
        yield node


@pytest.fixture(params=["embedded", "unix", "gateway"])
async def box(request, node, tmp_path):
    if request.param == "embedded":
        async with Sandbox(node=node, **SMALL) as box:
            yield box
        return
    if request.param == "gateway":
        async with (
            NodeServer(node, "tcp://127.0.0.1:0", tokens={"of it": "gateway"}, gateways={"gateway"}) as server,
            Gateway([Fixed(parse_address(server.address))], "tcp://127.0.0.1:0", tenants=ME, token="of it") as gateway,
            Sandbox(node=gateway.address, token="mine", **SMALL) as box,
        ):
            yield box
        return
    async with NodeServer(node, f"unix:{tmp_path}/socket") as server, Sandbox(node=server.address, **SMALL) as box:
        yield box


async def started(box, address="127.0.0.1"):
    process = await box.spawn(["python3", "-c", ECHO, address])
    assert await process.read() == b"up\n"
    return process


async def everything(connection):
    data = b""
    while piece := await connection.read():
        data += piece
    return data


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0"])
async def test_bytes_go_to_a_port_and_come_back(box, address):
    process = await started(box, address)
    first, second = await box.connect(8000), await box.connect(8000)
    sent = os.urandom(700_000)
    reading = asyncio.create_task(everything(first))
    await first.write(sent)
    await second.write(b"meanwhile")
    assert await second.read() == b"meanwhile"
    first.end_input()
    assert await reading == sent + b"over"
    assert await first.read_error() == b""
    for one in (first, second, process):
        await one.close()


async def test_nobody_at_a_port_is_an_error_or_waited_for(box):
    with pytest.raises(ConnectionRefusedError, match="nobody listens at port 8000 of the sandbox"):
        await box.connect(8000)
    with pytest.raises(ValueError, match="65535"):
        await box.connect(0)
    connecting = asyncio.create_task(box.connect(8000, timeout_seconds=20))
    process = await started(box)
    connection = await connecting
    await connection.write(b"here")
    assert await connection.read() == b"here"
    await connection.close()
    await process.close()


async def test_a_reader_that_is_slow_holds_up_the_writer(box):
    """The credit of the wire, and the windows of TCP: what nobody reads is not sent for ever."""
    process = await started(box)
    connection = await box.connect(8000)
    writing = asyncio.create_task(connection.write(bytes(40 << 20)))
    done, _ = await asyncio.wait([writing], timeout=1)
    assert not done
    writing.cancel()
    await asyncio.wait([writing])
    await connection.close()
    await process.close()


async def test_a_server_that_dies_ends_its_connections(box):
    process = await started(box)
    connection = await box.connect(8000)
    await connection.write(b"x")
    assert await connection.read() == b"x"
    process.kill()
    assert await connection.read() == b""
    await connection.close()
    await process.close()


async def test_a_sandbox_that_ends_takes_its_connections_along(node, box):
    await started(box)
    connection = await box.connect(8000)
    await box.close()
    try:
        assert await connection.read() == b""
        assert await connection.read_error() != b""
    except SandboxError:
        pass  # over the wire the call ends with the sandbox's reason
    await connection.close()
    with pytest.raises(SandboxError):
        await box.connect(8000)


async def test_a_connection_keeps_a_sandbox_from_being_idle(node):
    async with Sandbox(node=node, idle_seconds=0.5, **SMALL) as box:
        await box.exec(["sh", "-c", f"python3 -c '{ECHO}' 127.0.0.1 >/dev/null 2>&1 &"])
        connection = await box.connect(8000, timeout_seconds=10)
        await asyncio.sleep(1.0)
        await connection.write(b"still")
        assert await connection.read() == b"still"
        await connection.close()
        async with asyncio.timeout(10):
            while node.sandboxes():
                await asyncio.sleep(0.05)


async def test_connections_have_a_limit(node, monkeypatch):
    monkeypatch.setattr("hone.sandbox.node.network.MAX_CONNECTIONS", 3)
    async with Sandbox(node=node, **SMALL) as box:
        await started(box)
        held = [await box.connect(8000) for _ in range(3)]
        with pytest.raises(Busy, match="3 connections"):
            await box.connect(8000)
        await held[0].close()
        async with asyncio.timeout(10):
            while not await _connects(box):
                await asyncio.sleep(0.01)
        for one in held:
            await one.close()


async def _connects(box):
    try:
        await (await box.connect(8000)).close()
    except Busy:
        return False
    return True


@pytest.mark.parametrize("network", ["off", "host"])
async def test_there_is_no_loopback_to_connect_to_without_a_network_of_its_own(node, network):
    """On the host's network it would be the host's own services."""
    async with Sandbox(node=node, network=network, **SMALL) as box:
        with pytest.raises(Unsupported, match="no network of its own"):
            await box.connect(22)


async def test_a_port_of_this_machine_leads_to_one_of_a_sandbox(box):
    process = await started(box)
    async with box.forward(8000) as forwarding:
        reader, writer = await asyncio.open_connection("127.0.0.1", forwarding.port)
        writer.write(b"through")
        writer.write_eof()
        assert await reader.read() == b"throughover"
        writer.close()
        process.kill()
        await process.wait()
        reader, writer = await asyncio.open_connection("127.0.0.1", forwarding.port)
        assert await _ends(reader)
        writer.close()
    await process.close()


async def _ends(reader):
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


@pytest.fixture
async def command(node, tmp_path):
    """`hone sandbox forward` to a sandbox; the process, its port, and the sandbox."""
    async with NodeServer(node, f"unix:{tmp_path}/socket") as server, Sandbox(node=server.address, **SMALL) as box:
        await started(box)
        words = ["-m", "hone.cli.main", "sandbox", "forward", box.sandbox_id, "8000:0", "--node", server.address]
        pipe = asyncio.subprocess.PIPE
        forwarding = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=pipe, stderr=pipe)
        try:
            line = (await forwarding.stdout.readline()).decode()
            assert f"leads to port 8000 of {box.sandbox_id}" in line, (await forwarding.stderr.read()).decode()
            yield forwarding, int(line.split()[0].partition(":")[2]), box
        finally:
            if forwarding.returncode is None:
                forwarding.kill()
            await forwarding.communicate()


async def test_the_command_forwards_until_it_is_stopped(command):
    forwarding, port, _ = command
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"cli")
    writer.write_eof()
    assert await reader.read() == b"cliover"
    writer.close()
    forwarding.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(forwarding.wait(), 20) == 0


async def test_the_command_says_that_the_sandbox_is_gone(command):
    forwarding, port, box = command
    await box.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await _ends(reader)
    writer.close()
    assert await asyncio.wait_for(forwarding.wait(), 20) != 0
    assert "it is closed" in (await forwarding.stderr.read()).decode()


async def test_a_full_queue_of_a_server_is_waited_for_and_given_up(node, monkeypatch):
    """A server that listens and never accepts, with a queue that is full: the connection is late, not refused."""
    monkeypatch.setattr("hone.sandbox.cells.cell.CONNECT_SECONDS", 1.0)
    deaf = "import socket,time; s=socket.socket(); s.bind(('127.0.0.1',8000)); s.listen(0); print('up',flush=True); time.sleep(60)"
    async with Sandbox(node=node, **SMALL) as box:
        process = await box.spawn(["python3", "-c", deaf])
        assert await process.read() == b"up\n"
        held = [await box.connect(8000)]
        while len(held) < 10:
            try:
                held.append(await box.connect(8000))
            except TimeoutError as error:
                late = error
                break
        assert "takes no connection" in str(late)
        for one in held:
            await one.close()


async def test_the_nodes_end_is_in_the_cells_network_and_not_shared_with_it(node):
    """Its owner inside could make it block, or read it, if it were."""
    async with Sandbox(node=node, **SMALL) as box:
        await started(box)
        cell = node.sandbox(box.sandbox_id).cell
        made = await cell.connect(8000)
        try:
            assert made.getsockname()[0] == "127.0.0.1"
            with socket.socket() as ours:
                cookies = [one.getsockopt(socket.SOL_SOCKET, 71, 8) for one in (made, ours)]  # SO_NETNS_COOKIE
            assert cookies[0] != cookies[1]
            inode = os.fstat(made.fileno()).st_ino
            shown = await box.exec(["sh", "-c", "readlink /proc/[0-9]*/fd/*"])
            assert f"socket:[{inode}]" not in shown.stdout
        finally:
            made.close()
