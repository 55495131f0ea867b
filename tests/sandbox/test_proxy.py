"""The proxy of a sandbox, with clients that mean ill, and with hosts and a resolver that the test plays."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.sandbox.network import exchange, proxy
from hone.sandbox.network.egress import NetworkPolicy
from hone.sandbox.network.exchange import Peer
from hone.sandbox.network.http1 import BadMessage, Body
from hone.sandbox.network.network_log import NetworkLog
from hone.sandbox.network.proxy import Gate, Proxy
from hone.schema.sandbox_network import NetworkRecord, Verdict


class World:
    """A proxy, the names that it can look up, and a host that answers at every address."""

    def __init__(self, folder, host, **policy):
        self.records: deque[NetworkRecord] = deque()
        self.looked_up: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.addresses: dict[str, list[list[str]]] = {}
        """Answers to one look-up after the other by name; the last one stays."""
        self.gate = Gate(NetworkPolicy(**policy), NetworkLog(folder), resolve=self._resolve, connect=self._connect)
        self._host = host

    async def _resolve(self, name):
        self.looked_up.append(name)
        answers = self.addresses.get(name, [["93.184.216.34"]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def _connect(self, address, port):
        self.connected.append((address, port))
        return await asyncio.open_connection(*self._host, limit=32 << 10)


@contextlib.asynccontextmanager
async def serving(handle, allow, folder=None, **policy):
    """A proxy for this allow-list before a host that answers with `handle`; yields the world and the proxy's address."""
    answering = set()

    async def answer(reader, writer):
        answering.add(asyncio.current_task())
        try:
            await handle(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the proxy hung up
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    world = World(folder, server.sockets[0].getsockname(), **policy)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    address = listener.getsockname()
    world.proxy = Proxy(world.gate, "n.1", "me", tuple(allow), listener, world.records)
    try:
        yield world, address
    finally:
        await world.proxy.close()
        world.gate.close()
        server.close()
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)


async def echo_head(reader, writer):
    """Answers a request with its own head, and hangs up."""
    head = await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(head), head))


async def echo(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def ask(address, data: bytes, *, ends: bool = False) -> bytes:
    """All that the proxy answers until it hangs up."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(data)
        if ends:
            writer.write_eof()
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


def get(host: str, path: str = "/", *fields: str) -> bytes:
    lines = [f"GET http://{host}{path} HTTP/1.1", f"Host: {host}", "Connection: close", *fields, "", ""]
    return "\r\n".join(lines).encode()


def hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


async def test_a_request_to_a_host_on_the_list_is_carried(tmp_path):
    async with serving(echo_head, ["api.example.org"], tmp_path) as (world, address):
        answer = await ask(address, get("api.example.org", "/secret?token=1", "X: y"))
        assert b"GET /secret?token=1 HTTP/1.1\r\nHost: api.example.org\r\nX: y\r\nConnection: close" in answer
        assert world.connected == [("93.184.216.34", 80)]
    (record,) = world.records
    assert (record.verdict, record.host, record.port, record.method) == (Verdict.ALLOWED, "api.example.org", 80, "GET")
    assert (record.address, record.sandbox_id, record.owner) == ("93.184.216.34", "n.1", "me")
    assert record.bytes_up > 50
    assert record.bytes_down > 100
    (line,) = (tmp_path / "network.jsonl").read_text().splitlines()
    assert "secret" not in line
    assert json.loads(line)["verdict"] == "allowed"


DENIED = [
    (get("other.example"), b"403 other.example:80 is not on the allow-list", Verdict.NO_RULE),
    (b"CONNECT other.example:443 HTTP/1.1\r\n\r\n", b"it takes the rule other.example\n", Verdict.NO_RULE),
    (b"CONNECT ok.example:22 HTTP/1.1\r\n\r\n", b"it takes the rule ok.example:22\n", Verdict.NO_RULE),
    (b"CONNECT 127.0.0.1:443 HTTP/1.1\r\n\r\n", b"403 127.0.0.1:443 is not", Verdict.NO_RULE),
    (b"CONNECT 93.184.216.34:443 HTTP/1.1\r\n\r\n", b"403 93.184.216.34:443 is not", Verdict.NO_RULE),
    (b"CONNECT [::1]:443 HTTP/1.1\r\n\r\n", b"403 [::1]:443 is not", Verdict.NO_RULE),
    (b"CONNECT [::ffff:7f00:1]:80 HTTP/1.1\r\n\r\n", b"403 [::ffff:7f00:1]:80 is not", Verdict.NO_RULE),
    (b"CONNECT 169.254.169.254:80 HTTP/1.1\r\n\r\n", b"403 169.254.169.254:80 is not", Verdict.NO_RULE),
    (b"CONNECT 10.0.0.1:443 HTTP/1.1\r\n\r\n", b"10.0.0.1 leads to a private network", Verdict.BAD_ADDRESS),
    (get("localhost"), b"localhost:80 is not", Verdict.NO_RULE),
    (b"CONNECT 2130706433:80 HTTP/1.1\r\n\r\n", b"400 Bad Request", Verdict.BAD_REQUEST),
    (b"CONNECT 0177.0.0.1:80 HTTP/1.1\r\n\r\n", b"400 Bad Request", Verdict.BAD_REQUEST),
    (b"CONNECT 0x7f.0.0.1:80 HTTP/1.1\r\n\r\n", b"400 Bad Request", Verdict.BAD_REQUEST),
    (b"CONNECT 127.1:80 HTTP/1.1\r\n\r\n", b"400 Bad Request", Verdict.BAD_REQUEST),
    (b"CONNECT [fe80::1%25eth0]:80 HTTP/1.1\r\n\r\n", b"400 Bad Request", Verdict.BAD_REQUEST),
    (get("ok.example").replace(b"Host: ok.example", b"Host: other.example"), b"names another", Verdict.BAD_REQUEST),
    (b"GET / HTTP/1.1\r\nHost: ok.example\r\n\r\n", b"this is a proxy", Verdict.BAD_REQUEST),
    (b"GET http://ok.example/ HTTP/1.1\r\nX: " + b"y" * 50_000, b"431 ", Verdict.BAD_REQUEST),
    (b"\x16\x03\x01" + bytes(100) + b"\r\n\r\n", b"400 Bad Request", Verdict.BAD_REQUEST),
]


@pytest.mark.parametrize(("request_", "answer", "verdict"), DENIED)
async def test_what_is_denied_is_said_and_never_connected(request_, answer, verdict):
    async with serving(echo_head, ["ok.example", "*.ok.example", "10.0.0.1"]) as (world, address):
        said = await ask(address, request_)
        assert answer in said
        assert said.startswith(b"HTTP/1.1 4")
        assert (world.looked_up, world.connected) == ([], [])
    assert [record.verdict for record in world.records] == [verdict]
    assert world.gate.statistics()["sandbox/network_denied"] == 1


SPECIAL = [
    "127.0.0.1",
    "10.0.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "::1",
    "fe80::1",
    "fd00::1",
]
SPECIAL += ["::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::"]


@pytest.mark.parametrize("special", SPECIAL)
async def test_names_that_lead_inside_are_denied(special):
    async with serving(echo_head, ["ok.example"]) as (world, address):
        world.addresses["ok.example"] = [[special]]
        said = await ask(address, get("ok.example"))
        assert b"403" in said
        assert special.encode() not in said
        assert world.connected == []
    assert [record.verdict for record in world.records] == [Verdict.BAD_ADDRESS]


async def test_a_name_that_changes_its_address_gains_nothing():
    """Rebinding: looked up once for each request, and connected to what was checked."""
    async with serving(echo_head, ["ok.example"]) as (world, address):
        world.addresses["ok.example"] = [["93.184.216.34"], ["127.0.0.1"]]
        assert b"200 OK" in await ask(address, get("ok.example"))
        assert b"403" in await ask(address, get("ok.example"))
        assert world.looked_up == ["ok.example"] * 2
        assert world.connected == [("93.184.216.34", 80)]
        world.addresses["ok.example"] = [["127.0.0.1", "93.184.216.35", "::1"]]
        assert b"200 OK" in await ask(address, get("ok.example"))
        assert world.connected[1:] == [("93.184.216.35", 80)]


async def test_a_rule_may_allow_private_networks():
    async with serving(echo_head, ["in.example:8080+private", "10.0.0.1+private"]) as (world, address):
        world.addresses["in.example"] = [["192.168.0.7"]]
        assert b"200 OK" in await ask(address, get("in.example:8080"))
        assert b"200 OK" in await ask(address, get("10.0.0.1"))
        assert world.connected == [("192.168.0.7", 8080), ("10.0.0.1", 80)]
        assert world.looked_up == ["in.example"]


async def test_every_request_of_a_connection_is_checked():
    async def keep(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\nT: r\r\n\r\n")

    async with serving(keep, ["a.example", "b.example"]) as (world, address):
        reader, writer = await asyncio.open_connection(*address)
        for host in ("a.example", "b.example"):
            writer.write(f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answer = await reader.readuntil(b"0\r\n\r\n")
            assert answer == b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        writer.write(b"GET http://c.example/ HTTP/1.1\r\nHost: c.example\r\n\r\n")
        assert b"403 c.example:80" in await reader.read()
        writer.close()
        assert len(world.connected) == 2
    assert [record.verdict for record in world.records] == [Verdict.ALLOWED, Verdict.ALLOWED, Verdict.NO_RULE]


async def test_what_follows_a_body_is_a_request_and_never_goes_along():
    """The shape of a smuggled request: it is read as the next one, and checked."""
    seen = []

    async def host(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        rest = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                while data := await reader.read(1000):
                    rest += data
        seen.append(head + rest)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    hidden = b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    sized = b"POST http://ok.example/ HTTP/1.1\r\nHost: ok.example\r\nContent-Length: 3\r\n\r\nabc"
    chunked = b"POST http://ok.example/ HTTP/1.1\r\nHost: ok.example\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    async with serving(host, ["ok.example"]) as (_, address):
        for first in (sized, chunked):
            said = await ask(address, first + hidden)
            assert said.startswith(b"HTTP/1.1 200 OK")
            assert b"403 evil.example:80" in said
        assert len(seen) == 2
        assert not any(b"evil" in text for text in seen)


@pytest.mark.parametrize(
    "body", [b"3\nabc\r\n0\r\n\r\n", b"3\r\nabcd\r\n0\r\n\r\n", b"-1\r\n", b"0x3\r\nabc\r\n0\r\n\r\n"]
)
async def test_a_body_that_could_be_cut_in_two_ways_ends_the_connection(body):
    async def host(reader, writer):
        await reader.read(-1)
        writer.close()

    request = b"POST http://ok.example/ HTTP/1.1\r\nHost: ok.example\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    async with serving(host, ["ok.example"]) as (world, address):
        assert b"400 Bad Request" in await ask(address, request)
    assert world.records[0].verdict is Verdict.BAD_REQUEST


@given(st.lists(st.binary(max_size=300), max_size=5), st.binary(max_size=40), st.integers(1, 50))
def test_a_chunked_body_is_its_content_and_nothing_behind_it(pieces, behind, size):
    """However it is cut, and whatever follows: that is the next request."""

    async def read():
        reader = asyncio.StreamReader(limit=1 << 10)
        chunks = b"".join(exchange._framed(piece) for piece in pieces if piece)
        data = chunks + b"0\r\n\r\n" + behind
        for begin in range(0, len(data), size):
            reader.feed_data(data[begin : begin + size])
        reader.feed_eof()
        content = [piece async for piece in exchange._pieces(Peer(reader, None), Body(None, is_chunked=True))]
        assert content[-1] == b""
        assert b"".join(content) == b"".join(pieces)
        assert await reader.read() == behind

    asyncio.run(read())


@given(st.binary(max_size=200))
def test_bytes_are_a_chunked_body_or_bad(data):
    async def read():
        reader = asyncio.StreamReader(limit=1 << 10)
        reader.feed_data(data)
        reader.feed_eof()
        with contextlib.suppress(BadMessage):
            async for _ in exchange._pieces(Peer(reader, None), Body(None, is_chunked=True)):
                pass

    asyncio.run(read())


async def test_a_tunnel_carries_tls_both_ways():
    async with serving(echo, ["ok.example"]) as (world, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n")
        assert b"200" in await reader.readuntil(b"\r\n\r\n")
        first = hello("OK.example")
        for piece in (first[:3], first[3:50], first[50:], b"x" * 300_000):
            writer.write(piece)
        assert await reader.readexactly(len(first) + 300_000) == first + b"x" * 300_000
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
    (record,) = world.records
    assert (record.verdict, record.bytes_up, record.bytes_down) == (
        Verdict.ALLOWED,
        len(first) + 300_000,
        len(first) + 300_000,
    )


@pytest.mark.parametrize(
    ("first", "problem"),
    [
        (hello("evil.example"), "asks for 'evil.example'"),
        (hello("ok.example.evil.example"), "asks for"),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", "no TLS"),
        (b"SSH-2.0-x\r\n", "no TLS"),
    ],
)
async def test_a_tunnel_for_another_host_passes_no_byte(first, problem):
    received = []

    async def host(reader, writer):
        received.append(await reader.read(-1))

    async with serving(host, ["ok.example"]) as (world, address):
        said = await ask(address, b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n" + first)
        assert said.endswith(bytes([21, 3, 1, 0, 2, 2, 112]))
    assert received == [b""]
    (record,) = world.records
    assert record.verdict is Verdict.BAD_NAME
    assert problem in record.problem
    assert record.bytes_up == 0


async def test_a_hello_without_a_name_passes_and_a_rule_may_allow_anything():
    async with serving(echo, ["ok.example", "db.example:5432+tcp"]) as (world, address):
        for target, first in ((b"ok.example:443", hello(None)), (b"db.example:5432", b"anything")):
            said = await ask(address, b"CONNECT " + target + b" HTTP/1.1\r\n\r\n" + first, ends=True)
            assert said.endswith(first)
    assert {record.verdict for record in world.records} == {Verdict.ALLOWED}


async def test_hosts_that_fail_are_told_apart_from_those_that_are_denied(monkeypatch):
    async def rude(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/silent" in head:
            await asyncio.sleep(60)
        writer.write(b"" if b"/mute" in head else b"HTTP/1.1 101 Switching Protocols\r\n\r\n")

    async with serving(rude, ["*.example"], idle_seconds=1.0) as (world, address):
        assert b"502 Bad Gateway" in await ask(address, get("a.example", "/mute"))
        assert b"502 Bad Gateway" in await ask(address, get("a.example"))
        assert b"504 Gateway Timeout" in await ask(address, get("a.example", "/silent"))
        world.addresses["b.example"] = [[]]
        assert b"502 Bad Gateway" in await ask(address, get("b.example"))

        async def refuse(*_):
            raise ConnectionRefusedError("no")

        monkeypatch.setattr(world.gate.upstream, "_connect", refuse)
        assert b"502 Bad Gateway" in await ask(address, get("a.example"))

        async def never(*_):
            await asyncio.sleep(60)

        monkeypatch.setattr("hone.sandbox.network.upstream.CONNECT_SECONDS", 0.1)
        monkeypatch.setattr(world.gate.upstream, "_connect", never)
        assert b"504 Gateway Timeout" in await ask(address, get("a.example"))
    verdicts = [record.verdict for record in world.records]
    assert verdicts.count(Verdict.TIMEOUT) == 2
    assert verdicts.count(Verdict.UNREACHABLE) == 4
    assert world.gate.statistics()["sandbox/network_denied"] == 0


async def test_slow_look_ups_are_one_sandboxes_trouble(monkeypatch):
    """A few at a time of one sandbox, whoever has the name server."""
    monkeypatch.setattr("hone.sandbox.network.upstream.RESOLVE_SECONDS", 0.5)
    under_way = [0, 0]

    async def slow(_):
        under_way[0] += 1
        under_way[1] = max(under_way)
        try:
            await asyncio.sleep(60)
        finally:
            under_way[0] -= 1

    async with serving(echo_head, ["*.example"]) as (world, address):
        world.gate.upstream._resolve = slow
        said = await asyncio.gather(*(ask(address, get(f"a{number}.example")) for number in range(20)))
        assert all(b"504" in answer for answer in said)
        assert under_way == [0, proxy.MAX_LOOKUPS]
        assert world.connected == []


async def test_slow_and_silent_clients_are_given_up(monkeypatch):
    monkeypatch.setattr(proxy, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(exchange, "HELLO_SECONDS", 0.2)
    async with serving(echo, ["ok.example"], idle_seconds=1.0) as (world, address):
        assert await ask(address, b"") == b""
        assert b"408" in await ask(address, b"GET http://ok.exa")
        assert b"200" in await ask(address, b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n" + hello("ok.example")[:20])
        assert b"200" in await ask(address, b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n" + hello("ok.example"))
        assert world.gate.num_connections <= 1
    assert [record.verdict for record in world.records] == [Verdict.BAD_REQUEST, Verdict.BAD_NAME, Verdict.TIMEOUT]


async def test_a_client_that_does_not_read_holds_nobody_up():
    async def endless(reader, writer):
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()

    async with serving(endless, ["ok.example+tcp"], idle_seconds=0.3) as (world, address):
        _reader, writer = await asyncio.open_connection(*address, limit=1 << 10)
        writer.transport.pause_reading()
        writer.write(b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(10):
            while not world.records:
                await asyncio.sleep(0.05)
        writer.close()
        assert world.records[0].verdict is Verdict.TIMEOUT
        assert world.records[0].bytes_down < 32 << 20


async def test_a_flood_of_connections_waits_its_turn():
    """Of thousands some are served at a time; the next one is when they are gone."""
    async with serving(echo_head, ["ok.example"], max_sandbox_connections=8) as (world, address):
        flood = []
        for _ in range(300):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(address)
            flood.append(connection)
        async with asyncio.timeout(10):
            while world.gate.num_connections < 8:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert world.gate.num_connections == 8
        for connection in flood:
            connection.close()
        assert b"200 OK" in await ask(address, get("ok.example"))


async def test_requests_have_a_pace():
    async with serving(echo_head, ["ok.example"], max_requests_per_second=20) as (_, address):
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for _ in range(30):
            await ask(address, get("no.example"))
        assert loop.time() - begun > 0.4


async def test_bytes_have_a_pace():
    async with serving(echo, ["ok.example+tcp"], max_bytes_per_second=1 << 20) as (_, address):
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await ask(address, b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n" + bytes(300_000), ends=True)
        assert loop.time() - begun > 0.4


async def test_limits_of_node_and_bytes_are_kept():
    async with serving(echo_head, ["ok.example"], max_connections=0) as (world, address):
        assert b"503" in await ask(address, get("ok.example"))
        assert world.connected == []
    async with serving(echo, ["ok.example+tcp"], max_bytes=100_000) as (world, address):
        said = await ask(address, b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n" + bytes(90_000), ends=True)
        assert len(said) < 100_000
        assert b"403" in await ask(address, get("ok.example"))
    assert [record.verdict for record in world.records] == [Verdict.LIMIT, Verdict.LIMIT]


async def test_a_name_may_mean_something_to_the_node_alone(tmp_path):
    async def answer(reader, writer):
        await echo_head(reader, writer)
        writer.close()

    model = await asyncio.start_unix_server(answer, tmp_path / "model")
    maps = {"model.internal": f"unix:{tmp_path}/model", "gone.internal": f"unix:{tmp_path}/gone"}
    async with serving(echo, ["model.internal", "gone.internal"], maps=maps) as (world, address):
        assert b"POST" not in await ask(address, get("model.internal", "/v1/models"))
        said = await ask(address, get("gone.internal"))
        assert b"502" in said
        assert str(tmp_path).encode() not in said
        assert (world.looked_up, world.connected) == ([], [])
        assert world.records[0].address == "mapped"
    async with serving(echo, ["ok.example"], maps=maps) as (_, address):
        assert b"403" in await ask(address, get("model.internal"))
    async with serving(echo, ["*", "*.internal"], maps=maps) as (world, address):
        await ask(address, get("model.internal"))  # a host like any other
        assert (world.looked_up, world.records[0].address) == (["model.internal"], "93.184.216.34")
    model.close()


async def test_closing_hangs_up_on_everybody():
    async with serving(echo, ["ok.example+tcp"]) as (world, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        await world.proxy.close()
        assert await reader.read() == b""
        assert world.gate.num_connections == 0
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)
        writer.close()
    assert len(world.records) == 1


def test_the_log_has_an_end(tmp_path):
    log = NetworkLog(tmp_path, max_bytes=1000)
    record = NetworkRecord(1.0, "n.1", "me", "GET", "a.example", 80, Verdict.ALLOWED)
    for _ in range(20):
        log.add(record)
    log.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 1000
    unwritable = NetworkLog(tmp_path / "missing")
    unwritable.add(record)
    assert (unwritable.counts[Verdict.ALLOWED], unwritable.num_unwritten) == (1, 1)
