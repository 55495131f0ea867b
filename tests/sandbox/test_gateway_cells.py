"""Real nodes with cells behind a gateway: what a user does, over connections that break on either side."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys

import pytest

from hone.sandbox.client import Sandbox
from hone.sandbox.errors import SandboxError
from hone.sandbox.gateway.discovery import Fixed
from hone.sandbox.gateway.gateway import Gateway
from hone.sandbox.gateway.tenants import Grant, Scope, Tenants, digest_of
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.sandbox.wire.addresses import parse_address
from hone.sandbox.wire.remote import RemoteNode
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandboxes import Outcome, SandboxSpec
from proxies import Proxy
from scripted_node import until

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)
ME = Tenants({digest_of("mine"): Grant("me", frozenset({Scope.CREATE, Scope.USE, Scope.OBSERVE}))}, {})


class Cluster:
    """Two nodes, a proxy before each, a gateway, and a proxy before that."""

    def __init__(self, nodes, servers, inner, gateway, outer):
        self.nodes, self.servers, self.inner, self.gateway, self.outer = nodes, servers, inner, gateway, outer


@pytest.fixture
async def cluster(cells):
    async with contextlib.AsyncExitStack() as stack:
        nodes, servers, inner = [], [], []
        for number in range(2):
            node = await stack.enter_async_context(Node(f"n{number}", limits=Limits(max_warm=0)))
            server = await stack.enter_async_context(
                NodeServer(node, "tcp://127.0.0.1:0", tokens={"of the gateway": "gateway"}, gateways={"gateway"})
            )
            inner.append(await stack.enter_async_context(Proxy(int(server.address.rpartition(":")[2]))))
            nodes.append(node)
            servers.append(server)
        gateway = await stack.enter_async_context(
            Gateway(
                [Fixed(parse_address(one.address)) for one in inner],
                "tcp://127.0.0.1:0",
                tenants=ME,
                token="of the gateway",
            )
        )
        outer = await stack.enter_async_context(Proxy(int(gateway.address.rpartition(":")[2])))
        yield Cluster(nodes, servers, inner, gateway, outer)


@pytest.fixture
async def client(cluster):
    client = RemoteNode(cluster.outer.address, "mine")
    await client.connected()
    yield client
    await client.close()


async def test_the_same_code_runs_against_a_gateway(cluster):
    async with Sandbox(spec=SMALL, node=cluster.gateway.address, token="mine") as box:
        assert (await box.exec(["sh", "-c", "cat; exit 3"], stdin=b"in\n")).exit_code == 3
        await box.write("deep/a.bin", b"\0\xff" * 1000)
        assert await box.read("deep/a.bin") == b"\0\xff" * 1000
        await box.python("x = 6")
        assert (await box.python("x * 7")).text == "42\n"
        assert (await box.snippet("print('apart')")).stdout == "apart\n"
        process = await box.spawn(["cat"])
        await process.write(b"one\n")
        assert await process.read() == b"one\n"
        process.kill()
        assert await process.wait() == -signal.SIGKILL
        await process.close()
        with pytest.raises(ValueError, match="argv is empty"):
            await box.exec([])
        assert (await box.usage()).num_calls >= 6
    assert cluster.gateway.ledger.totals("me").num_sandboxes == 0


async def test_forks_of_a_sandbox_are_on_its_node_and_begin_with_its_files(cluster):
    async with Sandbox(spec=SMALL, node=cluster.gateway.address, token="mine") as box:
        await box.write("a", b"as it was")
        forks = await box.fork(3)
        async with contextlib.AsyncExitStack() as stack:
            for fork in forks:
                stack.push_async_callback(fork.close)
                assert await fork.read("a") == b"as it was"
                assert fork.sandbox_id.rpartition(".")[0] == box.sandbox_id.rpartition(".")[0]
            assert cluster.gateway.ledger.totals("me").num_sandboxes == 4
    assert cluster.gateway.ledger.totals("me").num_sandboxes == 0


@pytest.mark.parametrize("side", ["client", "node", "both"])
async def test_a_program_and_a_stream_go_on_over_broken_connections(cluster, client, side):
    def cut():
        for proxy in [cluster.outer] * (side != "node") + cluster.inner * (side != "client"):
            proxy.cut()

    box = await client.create(SMALL, key="k")
    await box.ready()
    call = asyncio.create_task(box.exec(["sh", "-c", "echo x >> ran; sleep 0.4; cat ran"]))
    for _ in range(2):
        await asyncio.sleep(0.1)
        cut()
    assert (await call).stdout == "x\n"
    sent = os.urandom(2 << 20)
    process = await box.spawn(["cat"])
    received, next_cut = bytearray(), 0

    async def feed():
        await process.write(sent)
        process.end_input()

    writing = asyncio.create_task(feed())
    async with asyncio.timeout(30):
        while data := await process.read():
            received += data
            if len(received) >= next_cut:
                cut()
                next_cut += len(sent) // 4
    await writing
    assert bytes(received) == sent
    assert await process.wait() == 0
    await process.close()
    await box.close()
    assert not client.is_lost


async def test_a_creation_under_way_when_connections_break_makes_one_sandbox(cluster, client):
    asked = [asyncio.create_task(client.create(SMALL, key=f"k{number}")) for number in range(8)]
    for proxy in (*cluster.inner, cluster.outer):
        await asyncio.sleep(0.005)
        proxy.cut()
    async with asyncio.timeout(20):
        made = await asyncio.gather(*asked)
    assert len({box.sandbox_id for box in made}) == 8
    assert sum(len(node.report().sandboxes) for node in cluster.nodes) == 8
    for box in made:
        await box.close()


async def test_the_sandboxes_of_a_client_that_is_gone_end_and_are_counted_no_more(cluster):
    for server in cluster.servers:
        server.grace_seconds = 0.2
    async with asyncio.timeout(20):
        client = RemoteNode(cluster.gateway.address, "mine")
        await client.connected()
        await client.create(SMALL, key="k")
        await client.close()
        while cluster.gateway.ledger.totals("me").num_sandboxes:
            await asyncio.sleep(0.05)
    assert not any(node.report().sandboxes for node in cluster.nodes)


async def test_a_client_that_comes_back_by_another_gateway_keeps_its_sandboxes(cluster, client):
    for server in cluster.servers:
        server.grace_seconds = 1.0
    boxes = [await client.create(SMALL, key=f"k{number}") for number in range(6)]
    for box in boxes:
        await box.exec(["touch", "here"])
    assert {box.sandbox_id[:2] for box in boxes} == {"n0", "n1"}
    async with Gateway(
        [Fixed(parse_address(one.address)) for one in cluster.inner],
        "tcp://127.0.0.1:0",
        tenants=ME,
        token="of the gateway",
    ) as second:
        fresh = RemoteNode(second.address, "mine")
        await fresh.connected()
        cluster.outer._target = int(second.address.rpartition(":")[2])
        cluster.outer.cut()
        await until(lambda: client.num_reconnections)
        await asyncio.sleep(2.5)  # nothing is asked of them meanwhile
        for box in boxes:
            assert (await box.exec(["test", "-e", "here"])).is_success
        # Who has nothing at the nodes is not connected to them.
        (front,) = [one for one in second._fronts if one.session.name == fresh._session]
        assert not front._nodes
        await fresh.close()
        for box in boxes:
            await box.close()


# --- processes ------------------------------------------------------------------------------------------------------

HONE = [sys.executable, "-m", "hone.cli.main", "sandbox"]
WAIT = "while [ ! -e go ]; do sleep 0.1; done; echo here"
TOKEN = "a token for the tests"


class Processes:
    """Nodes and a gateway as `hone sandbox` starts them, ended at the end whatever happened."""

    def __init__(self, folder):
        self.folder = folder
        self.running = []
        (folder / "tenants.toml").write_text(
            f'[tenants.me]\nmax_sandboxes = 20\n\n[[tenants.me.tokens]]\nsha256 = "{digest_of(TOKEN).hex()}"\n'
            f'scopes = ["admin", "create", "use", "observe"]\n'
        )
        (folder / "tokens").write_text("gateway the-token-of-the-gateway gateway\n")

    def start(self, *words, **variables):
        process = subprocess.Popen([*HONE, *words], stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
        self.running.append(process)
        return process

    async def node(self, name):
        listen = f"unix:{self.folder}/{name}"
        process = self.start(
            "serve", "--name", name, "--listen", listen, "--folder", str(self.folder / f"{name}-folder")
        )
        line = await asyncio.to_thread(process.stdout.readline)
        assert line.startswith(f"node {name} serves at"), line
        return process

    async def gateway(self, port="0"):
        process = self.start(
            "gateway", "--nodes", f"unix:{self.folder}/a,unix:{self.folder}/b", "--listen", f"tcp://127.0.0.1:{port}",
            "--tenants", str(self.folder / "tenants.toml"),
        )  # fmt: skip
        line = await asyncio.to_thread(process.stdout.readline)
        assert line.startswith("gateway at tcp://"), line
        return process, line.split()[2].rstrip(",")

    def end(self):
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self.running:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@pytest.fixture
async def processes(cells, tmp_path):
    processes = Processes(tmp_path)
    yield processes
    processes.end()


def hone(*words, token=TOKEN):
    return subprocess.run(
        [*HONE, *words], capture_output=True, timeout=60, check=False, text=True,
        env={**os.environ, "HONE_SANDBOX_TOKEN": token},
    )  # fmt: skip


async def test_a_gateway_and_a_node_that_are_killed(processes):
    """In one test, as starting them takes a second each."""
    nodes = {"a": await processes.node("a"), "b": await processes.node("b")}
    gateway, address = await processes.gateway()
    done = await asyncio.to_thread(hone, "run", "python", "--node", address, "--", "echo", "hello")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    done = await asyncio.to_thread(hone, "ls", "--node", address, token="wrong")
    assert done.returncode == 2
    assert "does not let you in" in done.stderr

    client = RemoteNode(address, TOKEN)
    await client.connected()
    boxes = [await client.create(SMALL, key=f"k{number}") for number in range(8)]
    waiting = {box: asyncio.create_task(box.exec(["sh", "-c", WAIT])) for box in boxes}
    await asyncio.sleep(0.5)
    assert "gateway/nodes" in (await asyncio.to_thread(hone, "stats", "--node", address)).stdout
    drained = await asyncio.to_thread(hone, "drain", "b", "--node", address)
    assert drained.stdout.startswith("b takes no new sandboxes; it has"), drained.stderr
    assert (await client.create(SMALL, key="after draining")).sandbox_id.startswith("a.")
    assert (await asyncio.to_thread(hone, "drain", "b", "--undo", "--node", address)).returncode == 0

    # The gateway: everything goes on at its successor.
    port = address.rpartition(":")[2]
    gateway.kill()
    await asyncio.to_thread(gateway.wait)
    gateway, _ = await processes.gateway(port)

    # A node: its calls are lost, all others have their answers.
    nodes["a"].kill()
    async with asyncio.timeout(20):
        for box, call in waiting.items():
            if box.sandbox_id.startswith("a."):
                with pytest.raises(SandboxError) as error:
                    await call
                assert error.value.outcome is Outcome.NODE_LOST
    for box in waiting:
        if box.sandbox_id.startswith("b."):
            await box.write("go", b"")
    assert {(await call).stdout for box, call in waiting.items() if box.sandbox_id.startswith("b.")} == {"here\n"}
    assert client.num_reconnections >= 1
    nodes["a"] = await processes.node("a")
    await until(lambda: "gateway/nodes" in hone("stats", "--node", address).stdout, 30)
    await client.close()


@pytest.mark.slow
async def test_a_client_that_is_killed_leaves_nothing_at_the_nodes(processes):
    await processes.node("a")
    await processes.node("b")
    _, address = await processes.gateway()
    program = f"""
import asyncio
from hone.sandbox.client import Sandbox
async def main():
    boxes = [Sandbox(memory_mb=64, disk_mb=16, node="{address}", token="{TOKEN}") for _ in range(4)]
    for box in boxes:
        await box.open()
        await box.exec(["sh", "-c", "setsid sleep 654321 &"])
    print("made", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    victim = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert await asyncio.to_thread(victim.stdout.readline) == "made\n"
    victim.kill()
    await asyncio.to_thread(victim.wait)
    victim.stdout.close()
    async with asyncio.timeout(30):
        while "654321" in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout:
            await asyncio.sleep(0.2)


async def test_what_begins_from_a_snapshot_is_on_its_node(cluster):
    async with (
        Sandbox(spec=SMALL, node=cluster.gateway.address, token="mine") as box,
        await box.snapshot() as snapshot,
    ):
        prefix = box.sandbox_id.rpartition(".")[0]
        forks = [Sandbox(spec=SMALL, snapshot=snapshot) for _ in range(8)]
        for fork in forks:
            await fork.open()
        assert {fork.sandbox_id.rpartition(".")[0] for fork in forks} == {prefix}
        for fork in forks:
            await fork.close()
        lost = snapshot.snapshot_id.replace("n", "x", 1)
        with pytest.raises(SandboxError, match="snapshot is gone") as caught:
            await snapshot.node.create(SMALL, key="other", snapshot_id=lost)
        assert caught.value.outcome is Outcome.NODE_LOST
    assert cluster.gateway.ledger.totals("me").num_sandboxes == 0


@pytest.mark.parametrize("side", ["client", "node", "both"])
async def test_trees_and_snapshots_go_on_over_broken_connections(cluster, client, side, tmp_path):
    (tmp_path / "source").mkdir()
    content = os.urandom(3 << 20)
    (tmp_path / "source/file").write_bytes(content)

    box = await client.create(SMALL, key="k")
    await box.ready()
    proxies = [cluster.outer] * (side != "node") + cluster.inner * (side != "client")

    async def asked_and_cut(call):
        """Its connections break when something of it has been carried."""
        num_carried = sum(proxy.num_carried for proxy in proxies)
        asked = asyncio.create_task(call)
        await until(lambda: sum(proxy.num_carried for proxy in proxies) > num_carried)
        for proxy in proxies:
            proxy.cut()
        return await asked

    for proxy in proxies:
        proxy.cut_every = 1 << 20
    async with asyncio.timeout(60):
        for number in range(2):
            assert (await box.upload(tmp_path / "source", f"t{number}")).num_bytes == len(content)
        snapshots = [await asked_and_cut(box.snapshot(ttl_seconds=60)) for _ in range(3)]
        await box.remove("t0", is_recursive=True)
        await asked_and_cut(box.reset(snapshots[1].snapshot_id))
        await box.download("t0", tmp_path / "back")
    assert (tmp_path / "back/file").read_bytes() == content
    assert sum(node.snapshots.count for node in cluster.nodes) == 3  # each was taken once
    for snapshot in snapshots:
        await client.hold_snapshot(snapshot.snapshot_id, 0)


@pytest.mark.slow
async def test_a_gateway_that_is_killed_over_and_over_makes_nothing_twice_and_loses_nothing(processes):
    await processes.node("a")
    await processes.node("b")
    gateway, address = await processes.gateway()
    port = address.rpartition(":")[2]
    clients = [RemoteNode(address, TOKEN) for _ in range(3)]
    for client in clients:
        await client.connected()
    is_over = asyncio.Event()

    async def work(index):
        num_done = 0
        while not is_over.is_set():
            num_done += 1
            key = f"{index}-{num_done}"
            asked = [clients[(index + other) % 3].create(SMALL, key=key) for other in range(2)]
            one, two = await asyncio.gather(*asked)
            assert one.sandbox_id == two.sandbox_id
            for box, times in ((one, 1), (two, 2)):
                assert (await box.exec(["sh", "-c", f"echo {key} >> log; cat log"])).stdout == f"{key}\n" * times
            await one.close()
        return num_done

    working = [asyncio.create_task(work(index)) for index in range(6)]
    chance = random.Random(1)
    for _ in range(5):
        await asyncio.sleep(chance.uniform(0.5, 1.5))
        gateway.kill()
        await asyncio.to_thread(gateway.wait)
        gateway, _ = await processes.gateway(port)
    is_over.set()
    assert sum(await asyncio.gather(*working)) > 6
    assert all(client.num_reconnections for client in clients)
    assert await clients[0].sandboxes() == []
    for client in clients:
        await client.close()
