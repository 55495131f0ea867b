"""Where a gateway's nodes are: addresses, names and files that change, and TLS to them."""

import asyncio
import contextlib
import socket

import pytest

from certificates import make_certificate
from hone.sandbox.gateway import gateway as gateways
from hone.sandbox.gateway.discovery import Fixed, Lines, Name, parse_source
from hone.sandbox.gateway.gateway import Gateway
from hone.sandbox.gateway.tenants import Grant, Scope, Tenants, digest_of
from hone.sandbox.wire.addresses import Address
from hone.sandbox.wire.remote import RemoteNode
from hone.schema.sandboxes import SandboxSpec
from scripted_node import ScriptedNode, until


async def test_a_file_of_addresses_is_what_it_says_now(tmp_path):
    path = tmp_path / "nodes"
    source = parse_source(f"file:{path}")
    assert await source.addresses() == set()
    path.write_text("# the job's machines\ntcp://10.0.0.1:7300\n\nunix:/run/node  # here\nnonsense\n")
    known = {Address("tcp", host="10.0.0.1", port=7300), Address("unix", path="/run/node")}
    assert await source.addresses() == known
    path.unlink()
    assert await source.addresses() == known  # a file that is being written anew is not the end of all nodes


async def test_a_name_is_all_its_addresses_and_certificates_are_for_the_name(monkeypatch):
    answers = [["10.0.0.1", "10.0.0.2"], socket.gaierror("no such name")]

    async def look_up(name, port, **_):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in answer]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    source = parse_source("dns+tls:nodes.example:7300")
    known = {Address("tls", host=f"10.0.0.{number}", port=7300, name="nodes.example") for number in (1, 2)}
    assert await source.addresses() == known
    assert await source.addresses() == known


@pytest.mark.parametrize("text", ["", "dns:nodes", "dns::7300", "file:", "http://a:1", "dns:a:b"])
def test_what_is_no_source_is_refused(text):
    with pytest.raises(ValueError, match=r"dns:NAME:PORT|is not dns"):
        parse_source(text)


def test_sources_are_what_they_look_like():
    assert isinstance(parse_source("unix:/a"), Fixed)
    assert isinstance(parse_source("dns:nodes:7300"), Name)
    assert isinstance(parse_source("file:/a"), Lines)


async def test_nodes_come_and_go_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gateways, "LOOK_SECONDS", 0.05)
    path = tmp_path / "nodes"
    async with contextlib.AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(ScriptedNode(f"n{number}", tmp_path)) for number in range(2)]
        path.write_text(nodes[0].address)
        gateway = await stack.enter_async_context(Gateway([Lines(path)], f"unix:{tmp_path}/gateway"))
        assert list(gateway.nodes) == [nodes[0].prefix]
        path.write_text("\n".join(one.address for one in nodes))
        await until(lambda: len(gateway.nodes) == 2)
        path.write_text(nodes[1].address)
        await asyncio.sleep(0.2)
        assert len(gateway.nodes) == 2  # it lives, and may have sandboxes
        nodes[0].die()
        await until(lambda: list(gateway.nodes) == [nodes[1].prefix])
        await until(lambda: len(gateway._controls) == 1)  # and is not looked for any more


async def test_tls_on_both_sides_of_a_gateway(tmp_path):
    certificate, key = make_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    other, _ = make_certificate(tmp_path / "other")
    tenants = Tenants({digest_of("mine"): Grant("me", frozenset({Scope.CREATE, Scope.USE}))}, {})
    async with (
        ScriptedNode("n0", tmp_path, address="tls://127.0.0.1:0", certificate=certificate, key=key) as node,
        Gateway(
            [parse_source(node.address)], "tls://127.0.0.1:0", tenants=tenants,
            ca_file=str(certificate), certificate=certificate, key=key,
        ) as gateway,
        Gateway([parse_source(node.address)], f"unix:{tmp_path}/gateway", ca_file=str(other)) as stranger,
    ):  # fmt: skip
        assert stranger.nodes == {}  # it does not believe that this is the node
        client = RemoteNode(gateway.address, "mine", ca_file=str(certificate))
        await client.connected()
        box = await client.create(SandboxSpec(), key="k")
        node.answer = lambda message: b"x" * (1 << 20)
        assert await box.read("/x") == b"x" * (1 << 20)
        await client.close()
