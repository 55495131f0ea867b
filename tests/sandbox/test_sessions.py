"""What a client's session with a node survives and what it does not, in no time."""

import asyncio
import functools
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaky
from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.wire.frames import Stream
from hone.sandbox.wire.session import SessionLimits
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import Outcome, SandboxSpec

SPEC = SandboxSpec()


def in_no_time(test):
    """The loop is one in which waiting takes no time."""

    @functools.wraps(test)
    def run(*arguments, **options):
        return flaky.run(test(*arguments, **options))

    return run


async def opened(network: flaky.Network, **options):
    client = network.client(**options)
    await client.connected()
    return client, await client.create(SPEC, key="k")


async def lost(call) -> str:
    with pytest.raises(SandboxError) as error:
        await call
    assert error.value.outcome is Outcome.NODE_LOST
    return str(error.value)


@in_no_time
async def test_a_call_that_is_cancelled_while_there_is_no_connection_is_cancelled_on_return():
    async with flaky.network() as network:
        client, box = await opened(network)
        call = asyncio.create_task(box.exec(["sleep", "1000"]))
        await asyncio.sleep(1)
        network.refusal = OSError("no route")
        network.cut()
        await asyncio.sleep(1)
        call.cancel()
        await asyncio.sleep(1)
        assert network.server.node.effects == ["create", ("sleep", "1000")]
        network.refusal = None
        await asyncio.sleep(3)
        assert network.server.node.effects == ["create", ("sleep", "1000"), "cancelled"]
        await client.close()


@in_no_time
async def test_a_call_that_is_cancelled_before_it_was_begun_is_over_too():
    async with flaky.network() as network:
        client, box = await opened(network)
        call = asyncio.create_task(box.exec(["sleep", "1000"]))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.sleep(1)
        (session,) = [client.session for client in network.server._clients.values()]
        assert (session._calls, client._calls) == ({}, {})
        await client.close()


@in_no_time
async def test_a_node_that_was_restarted_has_lost_the_calls_at_once():
    async with flaky.network() as network, flaky.network(node=flaky.CountingNode("n.2.")) as other:
        client, box = await opened(network)
        call = asyncio.create_task(box.exec(["sleep", "1000"]))
        await asyncio.sleep(1)
        network.server = other.server
        network.cut()
        began = asyncio.get_running_loop().time()
        assert "restarted" in await lost(call)
        assert asyncio.get_running_loop().time() - began < 0.1
        assert client.is_lost
        await client.close()


@in_no_time
async def test_an_address_that_refuses_connections_is_that_of_a_dead_node():
    async with flaky.network() as network:
        client, box = await opened(network)
        call = asyncio.create_task(box.exec(["sleep", "1000"]))
        await asyncio.sleep(1)
        network.refusal = ConnectionRefusedError("nobody listens")
        network.cut()
        began = asyncio.get_running_loop().time()
        assert "nobody listens" in await lost(call)
        assert asyncio.get_running_loop().time() - began < 0.1
        await client.close()


@pytest.mark.parametrize(
    ("options", "seconds"), [({}, 10), ({"reconnect_seconds": 3.0}, 3), ({"reconnect_seconds": 0}, 0)]
)
@in_no_time
async def test_a_node_that_cannot_be_reached_is_lost_after_a_time_that_the_client_chooses(options, seconds):
    async with flaky.network() as network:
        client, box = await opened(network, **options)
        call = asyncio.create_task(box.exec(["sleep", "1000"]))
        await asyncio.sleep(1)
        network.refusal = OSError("no route")
        network.cut()
        began = asyncio.get_running_loop().time()
        await lost(call)
        assert seconds - 1.1 <= asyncio.get_running_loop().time() - began <= seconds + 0.1
        await client.close()


@in_no_time
async def test_a_connection_that_says_nothing_is_given_up_within_two_seconds():
    async with flaky.network() as network:
        client, box = await opened(network)
        call = asyncio.create_task(box.exec(["sleep", "1"]))
        await asyncio.sleep(0.5)
        network.hush()
        began = asyncio.get_running_loop().time()
        assert (await call).stdout == "sleep"
        assert asyncio.get_running_loop().time() - began <= 2.1
        assert network.server.node.effects == ["create", ("sleep", "1")]
        assert client.num_reconnections == 1
        await client.close()


@in_no_time
async def test_a_client_that_comes_too_late_hears_so_and_nothing_is_done_again():
    async with flaky.network() as network:
        client, box = await opened(network, reconnect_seconds=60)
        call = asyncio.create_task(box.exec(["ls"]))
        await asyncio.sleep(0.0021)  # it is asked, not answered
        network.refusal = OSError("no route")
        network.cut()
        await asyncio.sleep(20)
        network.refusal = None
        assert "given the client up" in await lost(call)
        assert network.server.node.effects == ["create", ("ls",), ("end", "its client is gone")]
        await box.write("a", b"later calls go on")
        await client.close()


@in_no_time
async def test_nobody_else_can_take_a_session_over():
    async with flaky.network() as network:
        client, box = await opened(network)
        call = asyncio.create_task(box.exec(["sleep", "5"]))
        await asyncio.sleep(1)
        heard, thief = raw(network)
        await network.connect(lambda: thief)
        thief.send(calls.Hello(calls.VERSION, client._session, "other"))
        for number in range(1, 5):
            thief.send(calls.Resume(number, box.sandbox_id, [0, 0], [0, 0], 1))
        thief.send(calls.Exec(9, box.sandbox_id, ["ls"], b"", {}, ".", 1.0, 1))
        await asyncio.sleep(1)
        assert [one.is_known for one in heard[1:5]] == [False] * 4
        assert "no such sandbox" in heard[5].message
        assert (await call).stdout == "sleep"
        assert client.num_reconnections == 0
        short = network.client()
        short._session = "1234"
        with pytest.raises(ValueError, match="can be guessed"):
            await short.connected()
        await client.close()


@in_no_time
async def test_ten_thousand_calls_go_on_over_the_next_connection():
    async with flaky.network() as network:
        client, box = await opened(network)
        many = [asyncio.create_task(box.exec(["sleep", "5", str(number)])) for number in range(10_000)]
        await asyncio.sleep(1)
        network.cut()
        await asyncio.gather(*many)
        assert len(set(network.server.node.effects)) == len(network.server.node.effects) == 10_001
        await client.close()


@in_no_time
async def test_a_client_may_have_so_many_calls_and_bytes_under_way_and_no_more():
    limits = SessionLimits(max_calls=3, max_streamed=1, max_asked_bytes=1000, max_held_bytes=3000)
    async with flaky.network(session_limits=limits) as network:
        client, box = await opened(network)
        await asyncio.sleep(1)
        with pytest.raises(Busy, match="calls under way have"):
            await box.write("a", b"x" * 2000)
        process = await box.spawn(["tee", "5"])
        with pytest.raises(Busy, match="programs in conversation"):
            await box.spawn(["tee", "5"])
        await asyncio.sleep(1)
        calls_under_way = [asyncio.create_task(box.exec(["sleep", "5"])) for _ in range(2)]
        await asyncio.sleep(1)
        with pytest.raises(Busy, match="3 calls under way"):
            await box.exec(["ls"])
        await asyncio.gather(*calls_under_way)
        await process.close()
        await asyncio.sleep(1)
        assert "takes none" in await lost(box.exec(["print", "5000"]))
        assert (await box.exec(["print", "500"])).stdout == "x" * 500
        await client.close()


def raw(network: flaky.Network):
    """A client that says what it likes: what it hears, and how to say something."""
    heard: list[object] = []
    stream = Stream(calls.ToClient, heard.append, heard.append)
    return heard, stream


LIES = {
    "credit for what was never sent": [calls.Credit(2, 1, 1)],
    "credit for no stream": [calls.Credit(2, 7, 1)],
    "credit below nothing": [calls.Credit(2, 1, -5)],
    "input on an output": [calls.Data(2, 1, b"x")],
    "more input than was granted": [calls.Data(2, 0, b"x" * 200_000), calls.Data(2, 0, b"x" * 200_000)],
    "input after its end": [calls.Data(2, 0, b""), calls.Data(2, 0, b"x")],
    "the same call again": [calls.Spawn(2, "n.1.0", ["tee", "5"], {}, ".", None)],
    "more received than was sent": [calls.Resume(2, "n.1.0", [1, 0], [0, 0], 1)],
    "more taken than received": [calls.Resume(2, "n.1.0", [0, 0], [1, 0], 1)],
    "a third stream": [calls.Resume(2, "n.1.0", [0, 0, 0], [0, 0, 0], 1)],
    "two greetings": [calls.Hello(calls.VERSION, "s" * 32, "secret")],
}


@pytest.mark.parametrize("lie", LIES)
@in_no_time
async def test_a_client_that_lies_loses_its_connection_and_nobody_else_anything(lie):
    async with flaky.network() as network:
        client, box = await opened(network)
        heard, liar = raw(network)
        await network.connect(lambda: liar)
        for message in (
            calls.Hello(calls.VERSION, "s" * 32, "secret"),
            calls.Spawn(2, box.sandbox_id, ["tee", "5"], {}, ".", None),
        ):
            liar.send(message)
        await asyncio.sleep(0.1)
        assert heard[1:] == [calls.Data(2, 0, b"")]
        for message in LIES[lie]:
            liar.send(message)
        await asyncio.sleep(1)
        assert heard[-1] == "the other side has closed the connection"
        assert (await box.exec(["ls"])).stdout == "ls"
        await asyncio.sleep(30)
        assert "closed" in network.server.node.effects
        assert len(network.server._clients) == 1
        await client.close()


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\4\0\0\0nope", b"\1\0\0\0\xc0"])
@in_no_time
async def test_nonsense_after_a_greeting_costs_the_connection_only(data):
    async with flaky.network() as network:
        heard, stream = raw(network)
        await network.connect(lambda: stream)
        stream.send(calls.Hello(calls.VERSION, "s" * 32, "secret"))
        await asyncio.sleep(1)
        stream.write(data)
        await asyncio.sleep(1)
        assert heard[-1] == "the other side has closed the connection"
        client, box = await opened(network)
        assert (await box.exec(["ls"])).stdout == "ls"
        await client.close()


numbers = st.integers(-1, 4)
sizes = st.lists(st.integers(-1, 300_000), max_size=3)
pieces = st.integers(0, 300_000).map(bytes)
ids = st.sampled_from(["n.1.0", "n.1.1", "x", ""])
MESSAGES = st.one_of(
    st.builds(calls.Create, numbers, st.just(SPEC), st.sampled_from("ab")),
    st.builds(calls.Exec, numbers, ids, st.just(["sleep", "0.1"]), pieces, st.just({}), ids, st.just(1.0), numbers),
    st.builds(calls.Spawn, numbers, ids, st.just(["tee", "50000"]), st.just({}), st.just("."), st.none()),
    st.builds(calls.Python, numbers, ids, ids, st.booleans(), st.just(1.0)),
    st.builds(calls.Status, numbers),
    st.builds(calls.Statistics, numbers),
    st.builds(calls.Signal, numbers, numbers),
    st.builds(calls.Resize, numbers, numbers, numbers),
    st.builds(calls.Cancel, numbers),
    st.builds(calls.Ping, numbers),
    st.builds(calls.Data, numbers, numbers, pieces),
    st.builds(calls.Credit, numbers, numbers, st.integers(-1, 300_000)),
    st.builds(calls.Resume, numbers, ids, sizes, sizes, numbers),
    st.builds(calls.Received, numbers),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(MESSAGES | st.none(), max_size=12), max_size=4))
def test_whatever_a_client_says_it_harms_only_itself(connections):
    """None is a moment in which something can happen."""

    async def attack() -> None:
        async with flaky.network() as network:
            client, box = await opened(network)
            for messages in connections:
                _, stream = raw(network)
                await network.connect(lambda stream=stream: stream)
                stream.send(calls.Hello(calls.VERSION, "s" * 32, "secret"))
                for message in messages:
                    if message is None:
                        await asyncio.sleep(0.05)
                    else:
                        stream.send(message)
            assert (await box.exec(["ls"])).stdout == "ls"
            network.cut()
            await asyncio.sleep(20)
            assert len(network.server._clients) == 1
            await client.close()

    flaky.run(attack())


@in_no_time
async def test_a_greeting_is_short_and_comes_soon():
    async with flaky.network() as network:
        heard, stream = raw(network)
        await network.connect(lambda: stream)
        stream.send(calls.Hello(calls.VERSION, "s" * 100_000, "secret"))
        await asyncio.sleep(1)
        assert heard == ["the other side has closed the connection"]
        heard, stream = raw(network)
        await network.connect(lambda: stream)
        await asyncio.sleep(11)
        assert heard == ["the other side has closed the connection"]


@in_no_time
async def test_an_answer_whose_receipt_was_lost_is_not_kept_and_its_call_not_done_again():
    async with flaky.network() as network:
        _, stream = raw(network)
        hello = calls.Hello(calls.VERSION, "s" * 32, "secret")
        await network.connect(lambda: stream)
        network.server.node.create(SPEC, key="k", owner="me")
        ask = calls.Python(1, "n.1.0", "x = 1", True, 1.0)
        for message in (hello, ask):
            stream.send(message)
        await asyncio.sleep(1)
        network.cut()
        heard, stream = raw(network)
        await network.connect(lambda: stream)
        stream.send(hello)
        await asyncio.sleep(11)
        (session,) = [client.session for client in network.server._clients.values()]
        assert (session._calls, session._num_held_bytes) == ({}, 0)
        stream.send(calls.Resume(1, "n.1.0", [0, 0], [0, 0], 1))
        await asyncio.sleep(1)
        assert (heard[-1].call, heard[-1].outcome) == (1, "node_lost")
        assert network.server.node.effects == ["create", "x = 1"]


@in_no_time
async def test_a_relay_that_refuses_connections_is_waited_for_and_its_nodes_told_apart_by_their_sandboxes():
    heard: list[object] = []

    class Relay:
        """As a gateway that knows nothing of a sandbox's node any more."""

        def accept(self):
            def hear(message):
                heard.append(message)
                match message:
                    case calls.Hello():
                        stream.send(calls.Welcome(f"relay.{len(heard)}.", 10.0, True))
                    case calls.Create():
                        stream.send(calls.Done(message.call, msgspec.Raw(msgspec.msgpack.encode("n.1.0"))))
                    case calls.Resume():
                        stream.send(calls.Failed(message.call, "sandbox", "no such node", "node_lost"))

            stream = Stream(calls.ToNode, hear, lambda _: None)
            return stream

    network = flaky.Network(Relay(), [])
    client, box = await opened(network)
    call = asyncio.create_task(box.exec(["ls"]))
    await asyncio.sleep(1)
    network.refusal = ConnectionRefusedError()
    network.cut()
    await asyncio.sleep(5)
    assert not call.done()
    network.refusal = None
    assert await lost(call) == "no such node"
    assert not client.is_lost
    await client.close()


@pytest.mark.parametrize("num_breaks", [1, 2, 3])
@in_no_time
async def test_what_was_on_its_way_when_a_relay_lost_its_node_is_not_counted_twice(num_breaks):
    async with flaky.network() as network:
        client, box = await opened(network)
        process = await box.spawn(["tee", "50000"])
        sent = random.Random(1).randbytes(1_000_000)
        writing = asyncio.create_task(process.write(sent))
        errors = asyncio.create_task(drained(process))
        received = b""
        while len(received) < len(sent):
            await asyncio.sleep(0.003 * (len(received) % 7))
            received += await process.read()
            for _ in range(num_breaks):  # the second, before the answer to the first has come
                client._hear_call(calls.Interrupted("n.1."))
                await asyncio.sleep(0.001)
        await writing
        assert received == sent
        errors.cancel()
        await client.close()


async def drained(process) -> None:
    while await process.read_error():
        pass
