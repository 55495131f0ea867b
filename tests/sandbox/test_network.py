"""What programs in sandboxes reach, through their proxy and otherwise; and what of theirs is reached from outside."""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from hone.sandbox.client import Sandbox
from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.network.egress import PROXY_PORT, NetworkPolicy
from hone.sandbox.network.upstream import Upstream
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandbox_network import Verdict
from hone.schema.sandboxes import SandboxSpec

SMALL = {"memory_mb": 256, "disk_mb": 32, "max_processes": 64}
GET = """
import sys, urllib.error, urllib.request
for url in sys.argv[1:]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            print(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        print(error.code, error.read().decode())
    except OSError as error:
        print(error)
"""
TRY = """
import socket, sys
for text in sys.argv[1:]:
    host, _, port = text.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
        print("connected", text)
    except OSError as error:
        print(type(error).__name__, text)
"""


async def answer(reader, writer):
    """A host that says what it was asked for."""
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        head = await reader.readuntil(b"\r\n\r\n")
        content = b"you asked: " + head.split(b"\r\n")[0]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(content), content))
        await writer.drain()
    writer.close()


@pytest.fixture
async def host():
    """The port of a host on this machine."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
async def node(cells, host, tmp_path):
    """With a name for that host; `cells` skips where there can be none, and checks that nothing is left."""
    policy = NetworkPolicy(maps={"model.internal": f"127.0.0.1:{host}"})
    async with Node("n", folder=tmp_path / "node", limits=Limits(max_warm=4), network=policy) as node:
        yield node


@pytest.fixture(params=["embedded", "unix"])
async def box(request, node, tmp_path):
    """Here, and on a node behind an address."""
    if request.param == "embedded":
        async with Sandbox(node=node, allow=["model.internal", "in.example:8080"], **SMALL) as box:
            yield box
        return
    async with (
        NodeServer(node, f"unix:{tmp_path}/socket") as server,
        Sandbox(node=server.address, allow=["model.internal", "in.example:8080"], **SMALL) as box,
    ):
        yield box


async def python(box, code, *arguments):
    result = await box.exec(["python3", "-c", code, *arguments], timeout_seconds=30)
    assert result.is_success, result
    return result.stdout


async def test_programs_reach_what_is_on_the_list_and_nothing_else(box, host):
    urls = [
        "http://model.internal/v1?x=1",
        "http://other.example/",
        "https://other.example/",
        "http://in.example:8080/",
    ]
    said = (await python(box, GET, *urls)).splitlines()
    assert said[0] == "200 you asked: GET /v1?x=1 HTTP/1.1"
    assert said[1].startswith("403 other.example:80 is not on the allow-list of this sandbox")
    assert "Tunnel connection failed: 403 other.example:443 is not on the allow-list" in "".join(said)
    assert said[-2].startswith("502 in.example has no address")
    records = await box.network_log()
    assert [record.verdict for record in records] == [
        Verdict.ALLOWED,
        Verdict.NO_RULE,
        Verdict.NO_RULE,
        Verdict.UNREACHABLE,
    ]
    assert {record.sandbox_id for record in records} == {box.sandbox_id}


async def test_there_is_no_way_around_the_proxy(box, host):
    targets = [f"127.0.0.1:{host}", "1.1.1.1:443", "169.254.169.254:80", "10.0.0.1:80", "2606:4700::1111:443"]
    said = (await python(box, TRY, *targets, f"127.0.0.1:{PROXY_PORT}")).splitlines()
    assert [line.split()[0] for line in said[:-1]] == ["ConnectionRefusedError", *["OSError"] * 4]
    assert said[-1] == f"connected 127.0.0.1:{PROXY_PORT}"
    looked_up = (
        "import socket\ntry: print(socket.getaddrinfo('model.internal', 80))\nexcept OSError as error: print('none')"
    )
    assert await python(box, looked_up) == "none\n"


async def test_every_kind_of_program_is_told_of_the_proxy(box):
    shown = "print(__import__('os').environ['https_proxy'])"
    wanted = f"http://127.0.0.1:{PROXY_PORT}\n"
    assert (await box.python(shown)).text == (await box.snippet(shown)).stdout == wanted
    process = await box.spawn(["sh", "-c", "echo $ALL_PROXY"])
    assert await process.read() == wanted.encode()
    await process.close()
    assert (await box.exec(["sh", "-c", "echo $no_proxy"], env={"no_proxy": "mine"})).stdout == "mine\n"


async def test_curl_reads_why_it_may_not(box):
    if not shutil.which("curl"):
        pytest.skip("no curl")
    allowed = await box.exec(["curl", "-s", "-d", "x" * 100_000, "http://model.internal/up"])
    assert allowed.stdout == "you asked: POST /up HTTP/1.1"
    denied = await box.exec(["curl", "-s", "http://other.example/"])
    assert "it takes the rule other.example" in denied.stdout


async def test_sandboxes_do_not_meet(node, host):
    """Another's proxy is in another network, and its list another list."""
    async with (
        Sandbox(node=node, allow=["model.internal"], **SMALL),
        Sandbox(node=node, allow=["b.example"], **SMALL) as second,
        Sandbox(node=node, **SMALL) as third,
    ):
        assert "403 model.internal:80" in await python(second, GET, "http://model.internal/")
        assert (await python(third, TRY, f"127.0.0.1:{PROXY_PORT}")).startswith("ConnectionRefusedError")
        assert (await third.exec(["env"])).stdout.count("proxy") == 0
        assert await third.network_log() == ()


async def test_the_network_outlives_an_exchange_of_the_cell(node):
    """A reset and a snapshot give a sandbox another cell; what begins from a snapshot has a list of its own."""
    async with Sandbox(node=node, allow=["model.internal"], **SMALL) as box:
        assert (await python(box, GET, "http://model.internal/1")).startswith("200")
        async with await box.snapshot() as snapshot:
            assert (await python(box, GET, "http://model.internal/2")).startswith("200")
            await box.reset(snapshot)
            assert (await python(box, GET, "http://model.internal/3")).startswith("200")
            async with Sandbox(snapshot=snapshot, allow=["b.example"], node=node) as other:
                assert (await python(other, GET, "http://model.internal/")).startswith("403")
        assert [record.verdict for record in await box.network_log()] == [Verdict.ALLOWED] * 3
    assert node.gate.num_connections == 0


async def test_a_list_costs_no_warm_cell(node):
    spec = SandboxSpec(network="allow", allow=("model.internal",), **SMALL)
    await node.keep_warm(SandboxSpec(**SMALL), 1)
    async with asyncio.timeout(10):
        while not node.statistics()["sandbox/warm"]:
            await asyncio.sleep(0.01)
    created = node.statistics()["sandbox/created"]
    async with Sandbox(node=node, spec=spec) as box:
        await box.ready()
        assert node.sandbox(box.sandbox_id).cell.name == "cell-1"
        assert created == 1
        assert (await python(box, GET, "http://model.internal/")).startswith("200")


async def test_the_machine_itself_is_private(cells, host, tmp_path):
    """Names that lead to this machine, with a rule that allows them and with a node that allows no such rule."""

    async def here(_):
        return ["127.0.0.1"]

    async with Node("n") as node:
        node.gate.upstream = Upstream(node.gate.policy, resolve=here)
        rules = [f"a.example:{host}", f"b.example:{host}+private"]
        async with Sandbox(node=node, allow=rules, **SMALL) as box:
            said = (await python(box, GET, f"http://a.example:{host}/", f"http://b.example:{host}/")).splitlines()
            assert said[0] == "403 a.example leads to a private network; a rule with +private would allow private ones"
            assert said[-1] == "200 you asked: GET / HTTP/1.1"
    async with Node("m", network=NetworkPolicy(is_private_allowed=False)) as node:
        with pytest.raises(Unsupported, match=r"gives no sandbox private networks: allow \['b.example\+private'\]"):
            node.create(SandboxSpec(network="allow", allow=("a.example", "b.example+private")))
        with pytest.raises(Unsupported, match="gives no sandbox network='host'"):
            node.create(SandboxSpec(network="host"))


async def test_an_end_leaves_no_connection(cells):
    """Also with connections open and requests under way."""
    hold = (
        "import socket, time\n"
        "held = [socket.create_connection(('127.0.0.1', 3128)) for _ in range(20)]\n"
        "for one in held[:10]: one.sendall(b'GET http://a.example/ HTTP/1.1\\r\\nHost: a.example\\r\\n\\r\\n')\n"
        "print('held', flush=True); time.sleep(60)"
    )
    async with Node("n") as node:
        node.gate.upstream.open = _never
        counts = []
        for _ in range(2):
            box = Sandbox(node=node, allow=["a.example"], **SMALL)
            await box.open()
            process = await box.spawn(["python3", "-c", hold])
            assert await process.read() == b"held\n"
            async with asyncio.timeout(10):
                while node.gate.num_connections < 20:
                    await asyncio.sleep(0.01)
            await box.close()
            assert node.gate.num_connections == 0
            await process.close()
            counts.append(num_descriptors())
        assert counts[0] == counts[1]


def num_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


async def _never(*_):
    await asyncio.sleep(60)


async def test_a_flood_of_connections_is_its_own_sandboxes_trouble(node):
    """Ten thousand connections of one sandbox, half of which say nothing; its neighbour's requests go on."""
    flood = (
        "import socket\n"
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000))\n"
        "num, kept = 0, []\n"
        "while num < 10_000:\n"
        "    one = socket.socket(); one.setblocking(False)\n"
        "    one.connect_ex(('127.0.0.1', 3128)); num += 1\n"
        "    if num % 2:\n"
        "        try: one.send(b'GET http://x/ HTTP/1.1\\r\\n')\n"
        "        except OSError: pass\n"
        "    kept.append(one)\n"
        "    if len(kept) > 1000: kept.pop(0).close()\n"
        "print(num)"
    )
    async with (
        Sandbox(node=node, allow=["model.internal"], **SMALL) as hostile,
        Sandbox(node=node, allow=["model.internal"], **SMALL) as neighbour,
    ):
        flooding = asyncio.create_task(python(hostile, flood))
        for _ in range(5):
            assert (await python(neighbour, GET, "http://model.internal/")).startswith("200")
            assert node.gate.num_connections <= node.gate.policy.max_sandbox_connections + 1
        assert await flooding == "10000\n"


@pytest.fixture
def certificate(tmp_path):
    """For pypi.example, with its key; itself the authority."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=pypi.example"]
    command += ["-addext", "subjectAltName=DNS:pypi.example"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=30)
    return tmp_path / "cert.pem", tmp_path / "key.pem"


@pytest.fixture
async def index(certificate):
    """The port of a package index behind TLS."""
    wheel = await asyncio.to_thread(_wheel)
    pages = {
        "/simple/tiny/": b'<a href="/files/tiny-1.0-py3-none-any.whl">tiny-1.0-py3-none-any.whl</a>',
        "/files/tiny-1.0-py3-none-any.whl": wheel,
    }

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                content = pages.get(head.split(b" ")[1].decode())
                status, kind = (b"200 OK", b"text/html") if content else (b"404 Not Found", b"text/plain")
                lines = [b"HTTP/1.1 " + status, b"Content-Type: " + kind, b"Content-Length: %d" % len(content or b"")]
                writer.write(b"\r\n".join([*lines, b"", content or b""]))
                await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()


def _wheel() -> bytes:
    import io
    import zipfile

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr("tiny.py", "X = 42\n")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return content.getvalue()


async def test_tls_goes_through_to_the_host_that_was_asked_for(cells, certificate, index):
    """pip, curl and urllib against an index behind TLS; a hello for another host ends the tunnel."""
    policy = NetworkPolicy(maps={"pypi.example": f"127.0.0.1:{index}"})
    async with Node("n", network=policy) as node, Sandbox(node=node, allow=["pypi.example"], **SMALL) as box:
        await box.write("ca.pem", certificate[0].read_bytes())
        pip = ["-m", "pip", "install", "--target", "/work/site", "--no-cache-dir", "--cert", "ca.pem"]
        installed = await box.exec([sys.executable, *pip, "--index-url", "https://pypi.example/simple", "tiny"])
        if "No module named pip" not in installed.stderr:
            assert installed.is_success, installed
            assert await python(box, "import sys; sys.path.insert(0, 'site'); import tiny; print(tiny.X)") == "42\n"
        if shutil.which("curl"):
            page = await box.exec(["curl", "-sS", "--cacert", "ca.pem", "https://pypi.example/simple/tiny/"])
            assert "tiny-1.0" in page.stdout, page
        fronting = (
            "import socket, ssl\n"
            "raw = socket.create_connection(('127.0.0.1', 3128))\n"
            "raw.sendall(b'CONNECT pypi.example:443 HTTP/1.1\\r\\n\\r\\n'); raw.recv(1000)\n"
            "context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = 0\n"
            "try: context.wrap_socket(raw, server_hostname='evil.example')\n"
            "except ssl.SSLError as error: print(error.reason)"
        )
        assert await python(box, fronting) == "TLSV1_UNRECOGNIZED_NAME\n"
        records = await box.network_log()
        assert records[-1].verdict is Verdict.BAD_NAME
        assert all(record.verdict is Verdict.ALLOWED for record in records[:-1])


@pytest.mark.parametrize("runtime", ["bwrap", "process"])
async def test_other_runtimes_have_no_lists(node, runtime):
    with pytest.raises(Unsupported, match="has no allow-lists of hosts; take runtime='cell'"):
        node.create(SandboxSpec(network="allow", allow=("a.example",), runtime=runtime))


async def test_a_cell_that_is_gone_gets_no_network(node):
    sandbox = node.create(SandboxSpec(network="allow", allow=("model.internal",), **SMALL))
    await sandbox.ready()
    cell = sandbox.cell
    await sandbox.close()
    with pytest.raises(SandboxError):
        await cell.listen_at(PROXY_PORT, 1)
