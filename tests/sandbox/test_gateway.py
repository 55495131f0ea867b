"""A gateway before nodes that do what the test says: placement, keys, quotas, scopes, and nodes that die."""

import asyncio
import contextlib

import pytest

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.gateway.control import Control
from hone.sandbox.gateway.discovery import parse_source
from hone.sandbox.gateway.gateway import Gateway
from hone.sandbox.gateway.tenants import Grant, Quota, Scope, Tenants, digest_of
from hone.sandbox.wire.remote import RemoteNode, RemoteSandbox
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import Outcome, SandboxSpec, SandboxStatus, SandboxUsage
from scripted_node import ScriptedNode, until

SMALL = SandboxSpec(memory_mb=64, disk_mb=16)
EVERYTHING = frozenset({Scope.CREATE, Scope.USE, Scope.OBSERVE})


@pytest.fixture
async def nodes(tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ScriptedNode(f"n{number}", tmp_path)) for number in range(3)]


@pytest.fixture
async def gateway(nodes, tmp_path):
    async with Gateway([parse_source(one.address) for one in nodes], f"unix:{tmp_path}/gateway") as gateway:
        assert len(gateway.nodes) == 3
        yield gateway


@pytest.fixture
async def client(gateway):
    client = RemoteNode(gateway.address)
    await client.connected()
    yield client
    await client.close()


def tenants(**quotas: Quota) -> Tenants:
    grants = {digest_of(f"token of {name}"): Grant(name, EVERYTHING) for name in quotas}
    grants[digest_of("token of admin")] = Grant("admin", frozenset({Scope.ADMIN}))
    grants[digest_of("token of reader")] = Grant(next(iter(quotas)), frozenset({Scope.OBSERVE}))
    return Tenants(grants, quotas)


@contextlib.asynccontextmanager
async def connected(address: str, token: str = ""):
    client = RemoteNode(address, token)
    await client.connected()
    try:
        yield client
    finally:
        await client.close()


def node_of(nodes: list[ScriptedNode], box: RemoteSandbox) -> ScriptedNode:
    return next(one for one in nodes if box.sandbox_id.startswith(one.prefix))


async def test_calls_find_their_node_and_answers_their_caller(nodes, gateway, client):
    boxes = await asyncio.gather(*(client.create(SMALL, key=f"k{number}") for number in range(60)))
    counts = [len(one.sandboxes) for one in nodes]
    assert sum(counts) == 60
    assert min(counts) > 5  # spread, not flooded
    for one in nodes:
        one.answer = lambda message, one=one: f"{one.prefix} {message.path}".encode()
    told = await asyncio.gather(*(box.read(f"/{number}") for number, box in enumerate(boxes)))
    assert told == [f"{node_of(nodes, box).prefix} /{number}".encode() for number, box in enumerate(boxes)]
    assert {one.links() for one in nodes} == {1}
    for box in boxes:
        await box.close()
    assert gateway.ledger.totals("local").num_sandboxes == 0
    assert not any(one.sandboxes for one in nodes)


async def test_sessions_stay_apart_at_the_nodes(nodes, gateway, client):
    await client.create(SMALL, key="a")
    async with connected(gateway.address) as other:
        for number in range(20):
            await other.create(SMALL, key=f"b{number}")
    for one in nodes:
        assert {name for _, name in one.sessions} <= {client._session, other._session}
    assert client._session != other._session
    used = [name for one in nodes for _, name in one.sessions]
    assert used.count(client._session) == 1


async def test_a_key_is_one_sandbox_whoever_asks_and_however_often(nodes, gateway, client):
    first = await client.create(SMALL, key="k")
    async with connected(gateway.address) as other:
        made = await asyncio.gather(*(one.create(SMALL, key="k") for one in (client, other) for _ in range(5)))
    assert {box.sandbox_id for box in made} == {first.sandbox_id}
    assert gateway.ledger.totals("local").num_sandboxes == 1


async def test_two_who_ask_for_a_key_at_once_get_one_sandbox(nodes, gateway, client):
    for one in nodes:
        one.holds_creates = True
    asked = [asyncio.create_task(client.create(SMALL, key="k")) for _ in range(4)]
    await until(lambda: sum(len(one.heard) for one in nodes) == 1)
    for one in nodes:
        one.holds_creates = False
    (holder,) = [one for one in nodes if one.heard]
    holder._create(holder.streams[-1], "local", holder.heard[0])
    assert len({(await one).sandbox_id for one in asked}) == 1
    assert sum(len(one.sandboxes) for one in nodes) == 1


async def test_a_busy_node_is_not_the_last_word(nodes, client):
    nodes[0].busy, nodes[1].busy = 7.0, 3.0
    for number in range(10):
        assert node_of(nodes, await client.create(SMALL, key=f"k{number}")) is nodes[2]
    nodes[2].busy = 5.0
    with pytest.raises(Busy) as error:
        await client.create(SMALL, key="k")
    assert error.value.retry_after_seconds == 3.0


async def test_a_repeated_key_whose_sandbox_is_over_is_made_anew_where_there_is_room(nodes, gateway, client):
    box = await client.create(SMALL, key="k")
    node = node_of(nodes, box)
    node.sandboxes.clear()  # its lease was over
    node.busy = 1.0
    other = await client.create(SMALL, key="k")
    assert node_of(nodes, other) is not node
    assert gateway.ledger.totals("local").num_sandboxes == 1


async def test_a_sandbox_too_large_for_every_node_is_refused(nodes, client):
    with pytest.raises(Busy, match="no node takes a sandbox of 200000 MB"):
        await client.create(SandboxSpec(memory_mb=200_000), key="k")


async def test_what_begins_from_a_snapshot_is_where_the_snapshot_is(nodes, gateway, client):
    for number in range(10):
        box = await client.create(SMALL, key=f"k{number}", snapshot_id=f"{nodes[1].prefix}s7")
        assert node_of(nodes, box) is nodes[1]
    nodes[1].busy = 2.0
    with pytest.raises(Busy):
        await client.create(SMALL, key="k", snapshot_id=f"{nodes[1].prefix}s7")
    with pytest.raises(SandboxError, match=r"n9\.1 of the snapshot is gone") as error:
        await client.create(SMALL, key="k", snapshot_id="n9.1.s7")
    assert error.value.outcome is Outcome.NODE_LOST
    assert gateway.ledger.totals("local").num_sandboxes == 10


async def test_errors_of_a_node_come_through_as_they_are(nodes, gateway, client):
    with pytest.raises(SandboxError, match="no such image"):
        await client.create(SandboxSpec(image="broken"), key="k")
    assert gateway.ledger.totals("local").num_sandboxes == 0


# --- nodes that die -------------------------------------------------------------------------------------------------


async def lost(waiting) -> None:
    with pytest.raises(SandboxError) as error:
        await waiting
    assert error.value.outcome is Outcome.NODE_LOST


async def test_all_that_was_under_way_at_a_dead_node_is_node_lost_and_nothing_else(nodes, gateway, client):
    for one in nodes:
        one.answer = lambda message: None
    boxes = [await client.create(SMALL, key=f"k{number}") for number in range(30)]
    waiting = {box: asyncio.create_task(box.read("/x")) for box in boxes}
    await until(lambda: sum(isinstance(m, calls.Read) for one in nodes for m in one.heard) == 30)
    nodes[0].die()
    for box in boxes:
        if node_of(nodes, box) is nodes[0]:
            await lost(waiting[box])
            await lost(box.read("/later"))
            await box.close()  # with its node, it is gone already
        else:
            assert not waiting[box].done()
            waiting[box].cancel()
    for one in nodes[1:]:
        one.answer = lambda message: b"here"
    for box in boxes:
        if node_of(nodes, box) is not nodes[0]:
            assert await box.read("/x") == b"here"
    for number in range(10):
        assert node_of(nodes, await client.create(SMALL, key=f"after {number}")) is not nodes[0]


async def test_a_silent_node_is_noticed(nodes, gateway, client):
    boxes = [await client.create(SMALL, key=f"k{number}") for number in range(12)]
    victim = node_of(nodes, boxes[0])
    victim.is_silent = True
    async with asyncio.timeout(20):
        await lost(boxes[0].read("/x"))
    assert len(gateway.nodes) == 2
    for one in nodes:
        one.answer = lambda message: b"here"
    for box in boxes:
        if node_of(nodes, box) is not victim:
            assert await box.read("/x") == b"here"


async def test_a_key_of_a_lost_node_is_not_made_a_second_time_while_it_may_live(nodes, gateway, client):
    box = await client.create(SMALL, key="k")
    victim = node_of(nodes, box)
    victim.die()
    await until(lambda: len(gateway.nodes) == 2)
    with pytest.raises(Busy, match="may stand for a sandbox of a lost node") as error:
        await client.create(SMALL, key="k")
    assert 10 < error.value.retry_after_seconds <= 22  # until the node must have ended it
    await client.create(SMALL, key="another")


async def test_a_node_that_is_started_anew_frees_the_keys_of_the_one_before(nodes, gateway, client, tmp_path):
    box = await client.create(SMALL, key="k")
    number = nodes.index(node_of(nodes, box))
    nodes[number].die()
    await until(lambda: len(gateway.nodes) == 2)
    async with ScriptedNode(f"n{number}", tmp_path, start="1"):
        await until(lambda: len(gateway.nodes) == 3)
        await lost(box.read("/x"))
        assert (await client.create(SMALL, key="k")).sandbox_id != box.sandbox_id


async def test_a_node_that_comes_back_has_its_sandboxes_still_but_those_nobody_wants(nodes, gateway, client):
    boxes = [await client.create(SMALL, key=f"k{number}") for number in range(12)]
    victim = node_of(nodes, boxes[0])
    its = [box for box in boxes if node_of(nodes, box) is victim]
    victim.is_silent = True
    await until(lambda: len(gateway.nodes) == 2)
    await its[0].close()
    victim.is_silent = False
    await until(lambda: len(gateway.nodes) == 3)
    await until(lambda: its[0].sandbox_id not in victim.sandboxes)
    assert len(victim.sandboxes) == len(its) - 1
    victim.answer = lambda message: b"here"
    for box in its[1:]:
        assert await box.read("/x") == b"here"
    assert gateway.ledger.totals("local").num_sandboxes == 11


async def test_one_broken_connection_is_that_sessions_alone(nodes, gateway, client):
    box = await client.create(SMALL, key="a")
    async with connected(gateway.address) as other:
        theirs = await other.create(SMALL, key="a")
        node = node_of(nodes, box)
        node.answer = lambda message: None
        mine, their = asyncio.create_task(box.read("/x")), asyncio.create_task(theirs.read("/x"))
        await until(lambda: sum(isinstance(m, calls.Read) for m in node.heard) == 2)
        node.answer = lambda message: b"here"
        node.streams[-2].close()
        assert await mine == b"here"
        assert sum(isinstance(m, calls.Resume) for m in node.heard) == 1
        assert not their.done()
        their.cancel()
    assert len(gateway.nodes) == 3


async def test_a_node_where_no_connection_lasts_is_lost_to_the_client_in_the_end(nodes, gateway, client):
    box = await client.create(SMALL, key="k")
    node = node_of(nodes, box)
    node.answer = lambda message: node.streams[-1].close()  # as it does with one that breaks its rules
    await lost(box.read("/x"))
    assert 1 < node.links() < 10
    node.answer = lambda message: b"here"
    assert await box.read("/x") == b"here"
    assert len(gateway.nodes) == 3


# --- clients --------------------------------------------------------------------------------------------------------


async def test_the_connections_of_a_client_that_is_gone_are_closed_and_made_again_when_it_is_back(nodes, gateway):
    async with connected(gateway.address) as client:
        boxes = [await client.create(SMALL, key=f"k{number}") for number in range(12)]
    await until(lambda: all(len(one.streams) == 1 for one in nodes))  # the gateway's own
    back = RemoteNode(gateway.address)
    back._session = client._session
    await back.connected()
    await until(lambda: all(one.links() == 2 for one in nodes))
    assert len(boxes) == sum(len(one.sandboxes) for one in nodes)
    assert all(one.sessions[0] == one.sessions[1] for one in nodes)
    await back.close()


async def test_another_gateway_learns_from_the_nodes_what_there_is(nodes, gateway, client, tmp_path):
    box = await client.create(SMALL, key="k")
    async with (
        Gateway([parse_source(one.address) for one in nodes], f"unix:{tmp_path}/second") as second,
        connected(second.address) as other,
    ):
        assert second.ledger.totals("local").memory_mb == 64
        assert (await other.create(SMALL, key="k")).sandbox_id == box.sandbox_id


async def test_a_cancelled_call_is_cancelled_at_the_node(nodes, gateway, client):
    box = await client.create(SMALL, key="k")
    node = node_of(nodes, box)
    node.answer = lambda message: None
    call = asyncio.create_task(box.read("/x"))
    await until(lambda: any(isinstance(m, calls.Read) for m in node.heard))
    call.cancel()
    await until(lambda: any(isinstance(m, calls.Cancel) for m in node.heard))
    await until(lambda: not any(front.calls for front in gateway._fronts))


@pytest.mark.parametrize("data", [b"\xff\xff\xff\x7f", b"\4\0\0\0nope", b"\1\0\0\0\xc0", b"\0\x20\0\0" + b"x" * 8192])
async def test_nonsense_costs_the_connection_only(gateway, client, tmp_path, data):
    reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/gateway")
    writer.write(data)
    async with asyncio.timeout(5):
        await reader.read()
    writer.close()
    await client.create(SMALL, key="k")


# --- who may what ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def guarded(nodes):
    known = tenants(
        research=Quota(max_sandboxes=3, max_memory_mb=1000, max_cpus=2.5),
        students=Quota(creates_per_second=0.1, creates_at_once=2),
        alone=Quota(max_clients=1),
    )
    async with Gateway([parse_source(one.address) for one in nodes], "tcp://127.0.0.1:0", tenants=known) as gateway:
        yield gateway


async def test_who_has_no_token_stays_outside(guarded, nodes):
    for token in ("", "token of nobody"):
        with pytest.raises(ValueError, match="does not let you in"):
            await RemoteNode(guarded.address, token).connected()
    with pytest.raises(ValueError, match="give tenants"):
        Gateway([parse_source(nodes[0].address)], "tcp://127.0.0.1:0")


async def test_a_tenant_sees_its_own_and_the_admin_everybodys(guarded, nodes):
    for one in nodes:
        one.answer = lambda message, one=one: [
            SandboxStatus(sandbox.sandbox_id, sandbox.owner, "ready", "python", 1.0, 1.0, SandboxUsage())
            for sandbox in one.sandboxes.values()
        ]
    async with (
        connected(guarded.address, "token of research") as mine,
        connected(guarded.address, "token of students") as theirs,
        connected(guarded.address, "token of admin") as admin,
        connected(guarded.address, "token of reader") as reader,
    ):
        box = await mine.create(SMALL, key="k")
        other = await theirs.create(SMALL, key="k")
        assert box.sandbox_id != other.sandbox_id
        assert [one.sandbox_id for one in await mine.sandboxes()] == [box.sandbox_id]
        assert [one.sandbox_id for one in await reader.sandboxes()] == [box.sandbox_id]
        assert len(await admin.sandboxes()) == 2
        for refused in (reader.create(SMALL, key="k"), RemoteSandbox(reader, box.sandbox_id).read("/x")):
            with pytest.raises(SandboxError, match="lacks the scope") as error:
                await refused
            assert error.value.outcome is Outcome.POLICY_DENIED
        with pytest.raises(SandboxError, match="lacks the scope admin"):
            await mine.call(calls.Drain(mine.number(), "n0", True), int)
        # What one tenant says of another's sandbox changes nothing that is counted.
        nodes_before = guarded.ledger.totals("research").num_sandboxes
        await RemoteSandbox(theirs, "n9.0.1").close()
        assert guarded.ledger.totals("research").num_sandboxes == nodes_before == 1


async def test_quotas_hold_and_are_free_again_when_sandboxes_end(guarded):
    async with connected(guarded.address, "token of research") as client:
        with pytest.raises(SandboxError, match="more than the quota of 1000") as error:
            await client.create(SandboxSpec(memory_mb=1001), key="k")
        assert error.value.outcome is Outcome.POLICY_DENIED
        two = [await client.create(SMALL, key=f"k{number}") for number in range(2)]
        with pytest.raises(Busy, match=r"quota of 2.5 cpus"):
            await client.create(SMALL, key="k3")
        half = SandboxSpec(memory_mb=64, cpus=0.5)
        await client.create(half, key="k4")
        assert (await client.create(SMALL, key="k0")).sandbox_id == two[0].sandbox_id  # asking again is free
        with pytest.raises(Busy, match="quota of 3 sandboxes"):
            await client.create(half, key="k5")
        await two[0].close()
        await client.create(half, key="k5")


async def test_a_tenant_that_asks_too_fast_waits(guarded):
    async with connected(guarded.address, "token of students") as client:
        for number in range(2):
            await client.create(SMALL, key=f"k{number}")
        with pytest.raises(Busy) as error:
            await client.create(SMALL, key="k2")
        assert 5 < error.value.retry_after_seconds <= 10
        await client.create(SMALL, key="k0")  # asking again is free


async def test_a_tenant_has_as_many_clients_as_it_may(guarded):
    async with connected(guarded.address, "token of alone"):
        with pytest.raises(ValueError, match="as many clients"):
            await RemoteNode(guarded.address, "token of alone").connected()
    await until(lambda: guarded.has_room("alone", ""))
    async with connected(guarded.address, "token of alone") as client:
        client._stream._transport.abort()  # who is back is not another one
        await until(lambda: client.num_reconnections)
        assert not client.is_lost


async def test_what_a_client_names_is_not_kept_or_told_at_any_length(gateway, client):
    with pytest.raises(ValueError, match="a key of 1000000 characters"):
        await client.create(SMALL, key="k" * 1_000_000)
    with pytest.raises(SandboxError) as error:
        await RemoteSandbox(client, "n" * 1_000_000 + ".0.1").read("/x")
    assert len(str(error.value)) < 1000


async def test_a_flood_of_questions_is_busy_and_harms_nobody(nodes, gateway, client):
    for one in nodes:
        one.answer = lambda message: None
    asked = [asyncio.create_task(client.sandboxes()) for _ in range(200)]
    await until(lambda: sum(one.done() for one in asked) >= 100)
    with pytest.raises(Busy, match="questions are under way"):
        await asyncio.gather(*asked)
    await client.create(SMALL, key="k")
    for one in asked:
        one.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


async def test_a_drained_node_gets_nothing_new_and_keeps_what_it_has(guarded, nodes):
    async with (
        connected(guarded.address, "token of admin") as admin,
        connected(guarded.address, "token of alone") as client,
    ):
        with pytest.raises(ValueError, match=r"0 nodes are called 'n7'; there are: n0.0, n1.0, n2.0"):
            await admin.call(calls.Drain(admin.number(), "n7", True), int)
        box = await client.create(SMALL, key="k")
        node = node_of(nodes, box)
        assert await admin.call(calls.Drain(admin.number(), node.prefix.rstrip("."), True), int) == 1
        for number in range(10):
            assert node_of(nodes, await client.create(SMALL, key=f"k{number}")) is not node
        assert (await client.create(SMALL, key="k")).sandbox_id == box.sandbox_id
        node.answer = lambda message: b"here"
        assert await box.read("/x") == b"here"


# --- backpressure ---------------------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_stops_the_node_and_nobody_else(nodes, gateway, client, tmp_path):
    box = await client.create(SMALL, key="k")
    node = node_of(nodes, box)
    node.answer = lambda message: b"x" * (1 << 20)
    async with connected(gateway.address) as slow:
        theirs = RemoteSandbox(slow, box.sandbox_id)
        slow._stream._transport.pause_reading()
        reading = [asyncio.create_task(theirs.read("/x")) for _ in range(64)]
        (front,) = [one for one in gateway._fronts if one.session.name == slow._session]
        await until(lambda: front.frames.is_full)
        await asyncio.sleep(0.3)
        assert front.frames._transport.get_write_buffer_size() < 4 << 20
        assert await box.read("/x") == b"x" * (1 << 20)
        slow._stream._transport.resume_reading()
        assert {len(await one) for one in reading} == {1 << 20}


async def test_a_node_that_does_not_read_stops_its_writers_who_hear_that_the_gateway_lives(nodes, gateway, client):
    box = await client.create(SMALL, key="k")
    node = node_of(nodes, box)
    node.answer = lambda message: None
    writing = [asyncio.create_task(box.write("/x", b""))]
    await until(lambda: any(isinstance(m, calls.Write) for m in node.heard))
    (stream,) = node.streams[1:]
    stream._transport.pause_reading()
    writing += [asyncio.create_task(box.write("/x", b"x" * (1 << 20))) for _ in range(32)]
    (front,) = gateway._fronts
    await until(lambda: front.frames.is_held)
    assert front._nodes[node.prefix].frames._transport.get_write_buffer_size() < 8 << 20
    await asyncio.sleep(2.5)  # longer than a client waits for a sign of life
    assert not client.is_lost
    stream._transport.resume_reading()
    await until(lambda: sum(isinstance(m, calls.Write) for m in node.heard) == 33)
    for one in writing:
        one.cancel()
    await asyncio.wait(writing)


async def test_addresses_of_one_node_count_once(nodes, tmp_path):
    twice = [parse_source(nodes[0].address), parse_source(f"unix:{tmp_path}/./n0")]
    async with Gateway(twice, f"unix:{tmp_path}/gateway") as gateway:
        assert len(gateway.nodes) == 1
        assert isinstance(next(iter(gateway.nodes.values())), Control)
