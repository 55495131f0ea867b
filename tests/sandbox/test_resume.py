"""Broken connections to a node: what was under way goes on, once, and no byte is lost or comes twice."""

import asyncio
import random
import sys

import pytest

from hone.sandbox.errors import SandboxError
from hone.sandbox.wire.remote import RemoteNode
from hone.schema.sandboxes import Outcome, SandboxSpec
from proxies import Proxy
from scripted_node import until

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)


@pytest.fixture
async def process(cells, tmp_path):
    """A node as users start it."""
    (tmp_path / "tokens").write_text("me 0123456789abcdef\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hone.cli.main", "sandbox", "serve", "--listen", "tcp://127.0.0.1:0"),
        *("--folder", str(tmp_path / "node"), "--tokens", str(tmp_path / "tokens")),
        stdout=asyncio.subprocess.PIPE,
    )
    yield process
    if process.returncode is None:
        process.terminate()
    await process.communicate()


@pytest.fixture
async def address(process):
    return (await process.stdout.readline()).decode().split()[-1]


@pytest.fixture
async def proxy(address):
    async with Proxy(int(address.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy):
    client = RemoteNode(proxy.address, "0123456789abcdef")
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


async def test_fifty_megabytes_each_way_through_twenty_cuts_are_whole(client, box, proxy):
    sent = random.Random(1).randbytes(50 << 20)
    process = await box.spawn(["cat"])

    async def feed() -> None:
        await process.write(sent)
        process.end_input()

    writing = asyncio.create_task(feed())
    received = bytearray()
    num_cuts = 0
    while data := await process.read():
        received += data
        if len(received) * 21 > len(sent) * (num_cuts + 1):
            proxy.cut()
            num_cuts += 1
    await writing
    assert num_cuts >= 20
    assert client.num_reconnections >= 10  # a cut may hit a connection that is only being made
    assert bytes(received) == sent
    assert await process.wait() == 0
    await process.close()


async def test_trees_and_files_through_cuts_are_whole(client, box, proxy, tmp_path):
    chance = random.Random(2)
    contents = {f"{number}.bin": chance.randbytes(1 << 20) for number in range(8)}
    (tmp_path / "tree").mkdir()
    for name, data in contents.items():
        (tmp_path / "tree" / name).write_bytes(data)

    proxy.cut_every = 2 << 20  # more than what one message holds, which goes again from its beginning
    async with asyncio.timeout(60):
        await asyncio.gather(box.upload(tmp_path / "tree", "up"), box.write("alone", contents["0.bin"]))
        await box.download("up", tmp_path / "back")
        assert await box.read("alone") == contents["0.bin"]
    assert client.num_reconnections >= 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == contents


async def test_an_upload_that_begins_without_a_connection_arrives_over_the_next(client, box, proxy, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 1000)
    proxy.is_closed = True
    proxy.cut()
    await until(lambda: client._stream is None)
    upload = asyncio.create_task(box.upload(tmp_path / "file", "up"))
    await until(lambda: any(call.streams and call.streams._is_input_over for call in client._calls.values()))
    proxy.is_closed = False
    async with asyncio.timeout(20):
        assert (await upload).num_bytes == 1000
        assert await box.read("up/file") == b"x" * 1000


async def test_a_connection_that_swallows_everything_is_replaced(client, box, proxy):
    call = asyncio.create_task(box.exec(["sh", "-c", "echo x >> ran; sleep 0.5; cat ran"]))
    await asyncio.sleep(0.1)
    proxy.stall()
    await asyncio.sleep(1)
    proxy.restore()
    assert (await call).stdout == "x\n"
    assert client.num_reconnections >= 1


async def test_a_program_whose_call_was_cancelled_without_a_connection_is_gone_on_return(client, box, proxy):
    call = asyncio.create_task(box.exec(["sleep", "345678"]))
    async with asyncio.timeout(20):
        while "345678" not in await commands(box):
            await asyncio.sleep(0.02)
    proxy.is_closed = True
    proxy.cut()
    await asyncio.sleep(0.1)
    call.cancel()
    await asyncio.sleep(0.1)
    proxy.is_closed = False
    async with asyncio.timeout(20):
        while "345678" in await commands(box):
            await asyncio.sleep(0.02)


async def commands(box) -> str:
    """What runs in a sandbox."""
    return (await box.exec(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"])).stdout


async def test_a_node_that_is_killed_is_known_to_be_lost_at_once(address, process):
    client = RemoteNode(address, "0123456789abcdef")
    await client.connected()
    box = await client.create(SMALL, key="k")
    working = [asyncio.create_task(box.exec(["sleep", "60"])) for _ in range(20)]
    conversation = await box.spawn(["cat"])
    await asyncio.sleep(0.2)
    process.kill()
    async with asyncio.timeout(20):
        for call in (*working, conversation.read(), conversation.write(b"x")):
            with pytest.raises(SandboxError) as error:
                await call
            assert error.value.outcome is Outcome.NODE_LOST
    assert client.is_lost
    await conversation.close()
    await client.close()
