"""A connection may break after any byte: whatever was under way is done once, and its streams are whole."""

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

import flaky
from flaky import Cut
from hone.sandbox.wire.flow import WINDOW_BYTES
from hone.schema.sandboxes import SandboxSpec

INPUT = [b"first ", b"", b"and some more ", b"last"]
ECHO = b"".join(INPUT)
DONE = [
    "create",
    ("ls",),
    "x = 1",
    ("a.txt", b"content"),
    ("spawn", "tee", "5"),
    ("signal", 10),
    ("size", 3, 4),
    "closed",
]


async def scenario(cuts: list[Cut]) -> tuple[flaky.Network, list[object]]:
    """One call after the other, some at once, and a conversation."""
    async with flaky.network(cuts) as network:
        node = network.server.node
        client = network.client()
        await client.connected()
        box = await client.create(SandboxSpec(), key="k")
        result, _, _ = await asyncio.gather(box.exec(["ls"]), box.python("x = 1"), box.write("a.txt", b"content"))
        assert result.stdout == "ls"
        process = await box.spawn(["tee", "5"])
        reading = [asyncio.create_task(read_all(one)) for one in (process.read, process.read_error)]
        process.signal(10)
        for data in INPUT:
            await process.write(data)
        process.resize(3, 4)
        process.end_input()
        assert await process.wait() == 7
        assert [await task for task in reading] == [ECHO, ECHO]
        await process.close()
        await asyncio.sleep(60)
        (session,) = [client.session for client in network.server._clients.values()]
        assert [session._calls, session._num_held_bytes, session._num_asked_bytes, client._calls] == [{}, 0, 0, {}]
        await client.close()
        return network, node.effects


async def read_all(read, size: int = 1 << 30, pause_seconds: float = 0.004) -> bytes:
    received = b""
    while len(received) < size and (data := await read()):
        received += data
        await asyncio.sleep(pause_seconds)  # so that some is read while there is no connection
    return received


def cut_points() -> list[Cut]:
    """Within and after every frame of the first connection, both ways, but for the greeting."""
    network, effects = flaky.run(scenario([]))
    assert sorted(effects, key=str) == sorted(DONE, key=str)
    points = []
    for to_node, sizes in network.frames.items():
        begin = sizes[0]
        for size in sizes[1:]:
            points += [Cut(to_node, begin + part) for part in (2, 4 + (size - 4) // 2, size)]
            begin += size
    return points


def test_a_cut_before_within_and_after_every_frame_loses_and_repeats_nothing():
    points = cut_points()
    assert len(points) > 100
    for cut in points:
        network, effects = flaky.run(scenario([cut]))
        assert sorted(effects, key=str) == sorted(DONE, key=str), cut
        assert network.num_connections == 2, cut


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(Cut, st.booleans(), st.integers(150, 900)), max_size=6))
def test_many_cuts_lose_and_repeat_nothing(cuts):
    _, effects = flaky.run(scenario(cuts))
    assert sorted(effects, key=str) == sorted(DONE, key=str)


async def long_stream(cuts: list[Cut], sent: bytes) -> None:
    async with flaky.network(cuts) as network:
        client = network.client()
        await client.connected()
        box = await client.create(SandboxSpec(), key="k")
        process = await box.spawn(["tee", "50000"])
        reading = [asyncio.create_task(read_all(one, len(sent), 0.03)) for one in (process.read, process.read_error)]
        await process.write(sent)
        assert [await task for task in reading] == [sent, sent]
        await asyncio.sleep(60)
        (session,) = [client.session for client in network.server._clients.values()]
        (call,) = session._calls.values()
        assert [output.room for output in call.streams.outputs.values()] == [WINDOW_BYTES, WINDOW_BYTES]
        process.end_input()
        assert await process.wait() == 7
        await client.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.builds(Cut, st.booleans(), st.integers(1000, 700_000)), max_size=12))
def test_streams_longer_than_what_may_be_under_way_are_whole_after_many_cuts(cuts):
    flaky.run(long_stream(cuts, random.Random(1).randbytes(900_000)))
