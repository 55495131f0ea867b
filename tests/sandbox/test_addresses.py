"""Addresses, and TLS at them: who is not who the certificate says is not talked to."""

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certificates import make_certificate
from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.node.node import Node
from hone.sandbox.wire.addresses import Address, Listener, parse_address
from hone.sandbox.wire.remote import RemoteNode
from hone.sandbox.wire.serve import NodeServer
from hone.schema import sandbox_calls as calls
from hone.schema.sandbox_nodes import NodeReport
from hone.schema.sandboxes import SandboxSpec


@given(
    st.sampled_from(["tcp", "tls"]),
    st.from_regex(r"[a-z0-9.-]{1,20}|[0-9a-f:]{2,20}", fullmatch=True),
    st.integers(0, 65535),
)
def test_an_address_is_what_it_says(kind, host, port):
    address = Address(kind, host=host, port=port)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "unix:", "tcp://a", "tcp://a:b", "tls://:1", "tcp://a:65536", "http://a:1", "7300"]
)
def test_what_is_no_address_is_refused_with_what_would_be(text):
    with pytest.raises(ValueError, match="none of unix:/path, tcp://host:port, tls://host:port"):
        parse_address(text)


def test_a_certificate_belongs_to_a_tls_address_and_the_other_way_round(tmp_path):
    certificate, key = make_certificate(tmp_path)
    with pytest.raises(ValueError, match="certificate"):
        Listener(parse_address("tcp://127.0.0.1:0"), certificate=certificate, key=key)
    with pytest.raises(ValueError, match="certificate"):
        Listener(parse_address("tls://127.0.0.1:0"))
    with pytest.raises(ValueError, match="do not do"):
        Listener(parse_address("tls://127.0.0.1:0"), certificate=key, key=certificate)


async def test_a_node_at_a_tls_address_is_verified(cells, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    certificate, key = make_certificate(tmp_path)
    elsewhere, elsewhere_key = make_certificate(tmp_path / "other", "DNS:elsewhere")
    async with Node("n") as node:
        async with NodeServer(
            node, "tls://127.0.0.1:0", tokens={"secret": "me"}, certificate=certificate, key=key
        ) as server:
            client = RemoteNode(server.address, "secret", ca_file=str(certificate))
            await client.connected()
            assert await client.sandboxes() == []
            await client.close()
            with pytest.raises(SandboxError, match="certificate verify failed"):
                await RemoteNode(server.address, "secret").connected()
            monkeypatch.setenv("HONE_SANDBOX_CA", str(certificate))
            client = RemoteNode(server.address, "secret")
            await client.connected()
            await client.close()
        async with NodeServer(
            node, "tls://127.0.0.1:0", tokens={"secret": "me"}, certificate=elsewhere, key=elsewhere_key
        ) as server:
            with pytest.raises(SandboxError, match="IP address mismatch"):
                await RemoteNode(server.address, "secret", ca_file=str(elsewhere)).connected()


SESSION = "s" * calls.MIN_SESSION_LENGTH


async def say(address: str, *messages: msgspec.Struct) -> list[object]:
    """The answers to messages that are said one after the other on one connection."""
    _, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    answers = []
    for message in messages:
        data = msgspec.msgpack.encode(message)
        writer.write(len(data).to_bytes(4, "little") + data)
        async with asyncio.timeout(10):
            size = int.from_bytes(await reader.readexactly(4), "little")
            answers.append(msgspec.msgpack.decode(await reader.readexactly(size), type=calls.ToClient))
    writer.close()
    return answers


async def test_only_a_gateways_token_speaks_for_others_and_then_sees_only_theirs(cells):
    tokens = {"secret": "me", "of the gateway": "gateway"}
    async with (
        Node("n") as node,
        NodeServer(node, "tcp://127.0.0.1:0", tokens=tokens, gateways={"gateway"}) as server,
    ):
        refused = await say(server.address, calls.Hello(calls.VERSION, SESSION, "secret", "you"))
        assert "does not let you in" in refused[0].message
        mine = node.create(SandboxSpec(memory_mb=64, disk_mb=16), owner="me")
        asked = [calls.Status(1), calls.Pause(2, mine.sandbox_id, False), calls.Report(3)]
        welcome, status, pause, report = await say(
            server.address, calls.Hello(calls.VERSION, SESSION, "of the gateway", "you"), *asked
        )
        assert welcome.prefix == node.prefix
        assert msgspec.msgpack.decode(status.result) == []
        assert "no such sandbox" in pause.message
        assert "gateway's token" in report.message
        _, status, _, _ = await say(server.address, calls.Hello(calls.VERSION, SESSION, "of the gateway", "me"), *asked)
        assert len(msgspec.msgpack.decode(status.result)) == 1


async def test_a_drained_node_takes_nothing_new_until_it_is_told_to(cells):
    async with Node("n") as node:
        kept = node.create(SandboxSpec(memory_mb=64, disk_mb=16), key="k")
        assert node.drain(True) == 1
        assert node.create(kept.lease.spec, key="k") is kept
        with pytest.raises(Busy, match="no new sandboxes"):
            node.create(kept.lease.spec)
        assert node.report().is_draining
        node.drain(False)
        node.create(kept.lease.spec)


async def test_only_a_gateways_token_sees_and_drains_a_node(cells):
    tokens = {"secret": "me", "of the gateway": "gateway"}
    async with (
        Node("n") as node,
        NodeServer(node, "tcp://127.0.0.1:0", tokens=tokens, gateways={"gateway"}) as server,
    ):
        mine, gateway = RemoteNode(server.address, "secret"), RemoteNode(server.address, "of the gateway")
        await mine.connected()
        await gateway.connected()
        with pytest.raises(ValueError, match="gateway's token"):
            await mine.call(calls.Report(mine.number()), NodeReport)
        with pytest.raises(ValueError, match="gateway's token"):
            await mine.call(calls.Drain(mine.number(), "n", True), int)
        report = await gateway.call(calls.Report(gateway.number()), NodeReport)
        assert report.sandboxes == ()
        assert report.memory_mb >= report.free_memory_mb > 0
        with pytest.raises(ValueError, match="not other"):
            await gateway.call(calls.Drain(gateway.number(), "other", True), int)
        await mine.close()
        await gateway.close()
