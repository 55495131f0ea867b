"""Snapshots of sandboxes, what begins from them, and trees of files in and out; on a node here and behind an address."""

import asyncio
import contextlib
import dataclasses
import os
import stat
from pathlib import Path

import pytest

from hone.sandbox.client import Busy, Outcome, Sandbox, SandboxError, SandboxSpec
from hone.sandbox.gateway.discovery import parse_source
from hone.sandbox.gateway.gateway import Gateway
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.sandbox.wire.remote import RemoteNode
from hone.sandbox.wire.serve import NodeServer

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)


@pytest.fixture
async def node(cells, tmp_path):
    """Of its own; `cells` skips where there can be none, and checks that nothing is left."""
    async with Node("n", folder=tmp_path / "node", limits=Limits(max_warm=4, max_snapshots=8)) as node:
        yield node
    assert not node.snapshots.layers.held


@pytest.fixture(params=["embedded", "remote", "gateway"])
async def box(request, node, tmp_path):
    if request.param == "embedded":
        async with Sandbox(spec=SMALL, node=node) as box:
            yield box
        return
    async with contextlib.AsyncExitStack() as stack:
        address = (await stack.enter_async_context(NodeServer(node, f"unix:{tmp_path}/socket"))).address
        if request.param == "gateway":
            gateway = Gateway([parse_source(address)], f"unix:{tmp_path}/gateway")
            address = (await stack.enter_async_context(gateway)).address
        yield await stack.enter_async_context(Sandbox(spec=SMALL, node=address))


async def sh(box: Sandbox, script: str) -> str:
    result = await box.exec(["sh", "-c", script])
    assert result.is_success, (script, result)
    return result.stdout


async def test_a_sandbox_goes_on_after_its_snapshot_and_others_begin_from_it(box):
    await sh(box, "echo 1 > a; mkdir -p /opt/tool; echo 2 > /opt/tool/b")
    async with await box.snapshot() as snapshot:
        assert snapshot.size_bytes > 0
        assert await sh(box, "echo changed > a; rm -r /opt/tool; cat a") == "changed\n"
        async with Sandbox(spec=SMALL, snapshot=snapshot) as one, Sandbox(spec=SMALL, snapshot=snapshot) as other:
            for fork in (one, other):
                assert await sh(fork, "cat a /opt/tool/b; echo mine > a") == "1\n2\n"
            assert await sh(one, "cat a; python3 -c 'print(3)'") == "mine\n3\n"
    assert await sh(box, "cat a") == "changed\n"


async def test_what_runs_in_a_sandbox_goes_on_while_its_files_are_copied(box):
    await box.python("x = [1]")
    await sh(box, "echo 1 > a; setsid sleep 60 > /dev/null 2>&1 &")
    async with await box.snapshot() as snapshot:
        await box.write("a", b"2\n")
        assert (await box.python("x.append(2); x")).text == "[1, 2]\n"
        assert "sleep" in await sh(box, "cat /proc/[0-9]*/comm")
        async with Sandbox(spec=SMALL, snapshot=snapshot) as fork:
            assert await sh(fork, "cat a /proc/[0-9]*/comm | grep -v sleep | head -1") == "1\n"
            assert "NameError" in (await fork.python("x")).text


async def test_what_hides_among_the_children_of_the_warm_python_is_not_overlooked(box):
    """A child that a snippet makes a sibling of its own is no child of the cell's first process."""
    hiding = """
import ctypes, signal, time
CLONE_PARENT, CLONE = 0x8000, {"x86_64": 56, "aarch64": 220}[__import__("os").uname().machine]
if ctypes.CDLL(None).syscall(CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0) == 0:
    for descriptor in range(3):
        __import__("os").close(descriptor)
    while True:
        open("a", "w").write(str(time.time()))
        time.sleep(0.001)
"""
    assert (await box.snippet(hiding)).is_success
    await box.stat("a")
    async with await box.snapshot() as snapshot, Sandbox(spec=SMALL, snapshot=snapshot) as fork:
        before = await fork.read("a")
        await asyncio.sleep(0.05)
        assert await fork.read("a") == before
        async with Sandbox(spec=SMALL, snapshot=snapshot) as later:
            assert await later.read("a") == before
    seen = await box.read("a")
    assert seen != before


async def test_forks_are_apart(box):
    await box.write("a", b"1")
    forks = await box.fork(3)
    for number, fork in enumerate(forks):
        assert await fork.read("a") == b"1"
        await fork.write("a", str(number).encode())
    assert [await fork.read("a") for fork in forks] == [b"0", b"1", b"2"]
    assert await box.read("a") == b"1"
    assert len({fork.sandbox_id for fork in (box, *forks)}) == 4
    for fork in forks:
        await fork.close()


async def test_a_reset_is_a_new_beginning(box):
    await box.write("a", b"1")
    async with await box.snapshot() as snapshot:
        before = box.sandbox_id
        for _ in range(2):
            await box.python("x = 1")
            await sh(box, "echo 2 > a; echo 3 > b; setsid sleep 60 > /dev/null 2>&1 &")
            await box.reset(snapshot)
            running = await sh(box, "cat a; ls b 2> /dev/null || echo none; cat /proc/[0-9]*/comm")
            assert running.startswith("1none\n")
            assert "sleep" not in running
            assert "NameError" in (await box.python("x")).text
        assert box.sandbox_id == before


async def test_calls_under_way_are_not_lost_to_a_snapshot(box):
    calls = [
        asyncio.create_task(sh(box, f"sleep 0.05; echo {number} > f{number}; echo {number}")) for number in range(8)
    ]
    snapshots = []
    for _ in range(3):
        await asyncio.sleep(0.01)
        snapshots.append(await box.snapshot())
    assert await asyncio.gather(*calls) == [f"{number}\n" for number in range(8)]
    assert len(await box.list()) >= 8
    for snapshot in snapshots:
        await snapshot.close()


async def test_many_snapshots_of_one_sandbox_stay_right(box):
    """More than may lie over one another: they are made one on the way."""
    last = None
    for number in range(40):
        await sh(box, f"echo {number} > f{number % 7}; rm -f f{(number + 3) % 7}")
        if last is not None:
            await last.close()
        last = await box.snapshot()
    assert last is not None
    async with Sandbox(spec=SMALL, snapshot=last) as fork:
        seen = "for file in f*; do echo $file; cat $file; done"
        assert await sh(fork, seen) == await sh(box, seen)
    await last.close()


async def test_a_snapshot_ends_with_its_time_and_sandboxes_from_it_live_on(box, node):
    await box.write("a", b"1")
    snapshot = await box.snapshot(ttl_seconds=0.2)
    async with Sandbox(spec=SMALL, snapshot=snapshot) as fork:
        async with asyncio.timeout(5):
            while node.snapshots.count:
                await asyncio.sleep(0.02)
        assert await fork.read("a") == b"1"
        again = await fork.snapshot()
        async with Sandbox(spec=SMALL, snapshot=again) as second:
            assert await second.read("a") == b"1"
        with pytest.raises(SandboxError, match="no such snapshot"):
            await box.reset(snapshot)
        with pytest.raises(SandboxError, match="no such snapshot"):
            await Sandbox(spec=SMALL, snapshot=snapshot).open()
        await snapshot.close()
        await again.close()


async def test_more_snapshots_than_may_be_are_refused(box):
    held = [await box.snapshot() for _ in range(8)]
    with pytest.raises(Busy):
        await box.snapshot()
    await held.pop().close()
    held.append(await box.snapshot())
    await held[0].renew(60)
    for snapshot in held:
        await snapshot.close()


async def test_what_a_snapshot_cannot_be_is_said(box, node):
    with pytest.raises(ValueError, match="no time"):
        await box.snapshot(ttl_seconds=0)
    async with await box.snapshot() as snapshot:
        with pytest.raises(SandboxError, match="network"):
            await Sandbox(spec=SandboxSpec(network="host"), snapshot=snapshot).open()
        with pytest.raises(ValueError, match="leave node out"):
            Sandbox(snapshot=snapshot, node="unix:/elsewhere")
    with pytest.raises(ValueError, match="at least"):
        await box.fork(0)


async def test_a_sandbox_from_a_snapshot_is_not_from_a_pool(box, node):
    await node.keep_warm(SMALL, 2)
    await box.write("a", b"1")
    async with await box.snapshot() as snapshot, Sandbox(spec=SMALL, snapshot=snapshot) as fork:
        assert await fork.read("a") == b"1"
    async with Sandbox(spec=SMALL, node=node) as fresh:
        with pytest.raises(FileNotFoundError):
            await fresh.read("a")


async def test_asking_twice_for_a_sandbox_from_a_snapshot_gives_the_same(box):
    async with await box.snapshot() as snapshot, Sandbox(spec=SMALL, snapshot=snapshot, key="k") as one:
        same = Sandbox(spec=SMALL, snapshot=snapshot, key="k")
        await same.open()
        assert one.sandbox_id == same.sandbox_id


async def test_a_cancelled_snapshot_leaves_nothing_behind(box, node):
    for seconds in (0.0, 0.0005, 0.002):
        taking = asyncio.create_task(box.snapshot())
        await asyncio.sleep(seconds)
        taking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await taking).close()
        async with asyncio.timeout(5):
            while node.snapshots.count:
                await asyncio.sleep(0.01)
        assert await sh(box, "echo here") == "here\n"


@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.002, 0.005])
@pytest.mark.parametrize("is_busy", [True, False])
async def test_a_sandbox_that_ends_during_its_snapshot_leaves_nothing(node, seconds, is_busy):
    box = Sandbox(spec=SMALL, node=node)
    await box.open()
    first = await box.snapshot()
    daemon = "setsid sleep 60 > /dev/null 2>&1 &" if is_busy else ""
    await sh(box, f"{daemon} for i in $(seq 300); do echo $i > f$i; done")
    await first.close()
    taking = asyncio.create_task(box.snapshot())
    await asyncio.sleep(seconds)
    await box.close()
    with contextlib.suppress(SandboxError, OSError):
        await (await taking).close()
    await asyncio.sleep(0)
    assert node.num_unmatched == 0


async def test_owners_have_their_own_snapshots(node, tmp_path):
    async with (
        NodeServer(node, "tcp://127.0.0.1:0", tokens={"one": "a", "two": "b"}) as server,
        Sandbox(spec=SMALL, node=server.address, token="one") as box,
        await box.snapshot() as snapshot,
    ):
        other = RemoteNode(server.address, "two")
        await other.connected()
        with pytest.raises(SandboxError, match="no such snapshot"):
            await other.create(SMALL, key="x", snapshot_id=snapshot.snapshot_id)
        with pytest.raises(SandboxError, match="no such snapshot"):
            await other.hold_snapshot(snapshot.snapshot_id, 0)
        await other.close()
        await box.reset(snapshot)


async def test_grading_in_a_sandbox_from_a_snapshot_sees_nothing_of_what_happened_after_it(box):
    """Edited tests, shims in PATH, modules that Python imports by itself, and processes that wait for the grader."""
    tests = "import solution; assert solution.f() == 1; print('passed')"
    await box.write("tests/check.py", tests.encode())
    await box.write("solution.py", b"def f(): return 0")
    command = "cd tests && PYTHONPATH=.. python3 -B check.py"
    snapshot = await box.snapshot()
    await sh(
        box,
        """echo "print('passed')" > tests/check.py
        mkdir -p /usr/local/bin 2> /dev/null; printf '#!/bin/sh\\necho passed' > python3; chmod +x python3; ln -s $PWD/python3 /tmp/python3
        echo "import os; os.write(1, b'passed'); os._exit(0)" > sitecustomize.py; cp sitecustomize.py tests/; cp sitecustomize.py usercustomize.py
        echo "import builtins" > tests/solution.py
        (while true; do echo "def f(): return 1" > /work/solution.py; sleep 0.01; done) > /dev/null 2>&1 &""",
    )
    assert "passed" in (await box.exec(["sh", "-c", command])).stdout
    async with Sandbox(spec=SMALL, snapshot=snapshot) as grader:
        await grader.write("solution.py", b"def f(): return 0")  # the patch that was handed in
        failed = await grader.exec(["sh", "-c", command])
        assert "passed" not in failed.stdout
        assert "AssertionError" in failed.stderr
        await grader.write("solution.py", b"def f(): return 1")
        assert (await grader.exec(["sh", "-c", command])).stdout == "passed\n"
    await snapshot.close()


async def test_runtimes_without_a_root_of_their_own_have_no_snapshots(cells):
    spec = SandboxSpec(runtime="process", network="host")
    async with Node("n", runtimes=("process",)) as node, Sandbox(spec=spec, node=node) as box:
        try:
            await box.exec(["true"])
        except SandboxError as error:
            pytest.skip(str(error))
        with pytest.raises(SandboxError, match="no snapshots of the whole root") as caught:
            await box.snapshot()
        assert caught.value.outcome is Outcome.POLICY_DENIED


async def test_without_layers_files_are_copied_into_each(cells, tmp_path):
    async with Node("n", folder=tmp_path / "node") as node:
        host = dataclasses.replace(node._cells.host, has_overlay=False)
        node.snapshots._host = host
        async with Sandbox(spec=SMALL, node=node) as box:
            await sh(box, "echo 1 > a; mkdir -p /opt/b; ln -s a link; chmod 700 a; rmdir /tmp")
            forks = await box.fork(2)
            for fork in (box, *forks):
                assert (
                    await sh(fork, "cat link; stat -c %a a; ls -d /opt/b; python3 -c 'print(1)'")
                    == "1\n700\n/opt/b\n1\n"
                )
            await box.write("a", b"2")
            async with await forks[0].snapshot() as snapshot:
                await box.reset(snapshot)
                assert await box.read("a") == b"1\n"
            for fork in forks:
                await fork.close()
        assert not node.snapshots._archives


# --- trees -----------------------------------------------------------------------------------------------------------


async def test_trees_go_up_and_come_down(box, tmp_path):
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "deep/er/a.bin").write_bytes(os.urandom(700_000))
    (source / "run.sh").write_text("echo ran")
    (source / "run.sh").chmod(0o755)
    (source / "link").symlink_to("run.sh")
    os.mkfifo(source / "fifo")
    sent = await box.upload(source, "project")
    assert (sent.num_files, sent.left_out) == (2, ("fifo",))
    assert await sh(box, "cd project; ./run.sh; readlink link; wc -c < deep/er/a.bin") == "ran\nrun.sh\n700000\n"
    received = await box.download("project", tmp_path / "back")
    assert received.num_files == 2
    assert (tmp_path / "back/deep/er/a.bin").read_bytes() == (source / "deep/er/a.bin").read_bytes()
    assert stat.S_IMODE((tmp_path / "back/run.sh").stat().st_mode) == 0o755
    await box.upload(source / "run.sh", "/opt")
    assert await box.read("/opt/run.sh") == b"echo ran"
    await box.download("project/run.sh", tmp_path / "one")
    assert (tmp_path / "one/run.sh").read_text() == "echo ran"


async def test_nothing_that_comes_down_leads_out_or_keeps_anybody_waiting(box, tmp_path):
    await sh(
        box,
        "mkdir t; cd t; ln -s /etc/passwd absolute; ln -s ../../../secret up; mkfifo fifo; truncate -s 5M sparse; echo 1 > fine",
    )
    async with asyncio.timeout(20):
        received = await box.download("t", tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["fine", "sparse"]
    assert set(received.left_out) == {"absolute", "up", "fifo"}
    await sh(box, "truncate -s 1T t/sparse")
    with pytest.raises(OSError, match="more than"):
        await box.download("t", tmp_path / "too_much")


async def test_what_there_is_no_room_for_or_no_such_thing_is_said(box, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "large/file").write_bytes(bytes(40 << 20))
    with pytest.raises(OSError, match="full"):
        await box.upload(tmp_path / "large", "large")
    with pytest.raises(FileNotFoundError):
        await box.download("nowhere", tmp_path / "back")
    with pytest.raises(FileNotFoundError):
        await box.upload(tmp_path / "nowhere")


async def test_a_folder_is_made_and_looked_at(box):
    await box.make_folder("a/b")
    assert (await box.stat("a/b")).kind == "folder"
    await sh(box, "ln -s b a/link")
    assert (await box.stat("a/link", follows_links=False)).kind == "link"
    assert (await box.stat("a/link")).kind == "folder"
    with pytest.raises(FileNotFoundError):
        await box.stat("a/c")


async def test_a_cancelled_upload_ends(box, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "large/file").write_bytes(os.urandom(8 << 20))
    going = asyncio.create_task(box.upload(tmp_path / "large", "large"))
    await asyncio.sleep(0.02)
    going.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await going
    assert await sh(box, "echo here") == "here\n"


HOLDS_LEASES = """
import fcntl, os, signal, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
kept = []
for name in ('held/a', 'held/b'):
    kept.append(os.open(name, os.O_RDWR | os.O_CREAT))
    os.write(kept[-1], b'content')
    fcntl.fcntl(kept[-1], fcntl.F_SETLEASE, fcntl.F_WRLCK)
print('held', flush=True)
time.sleep(100)
"""


async def test_a_lease_on_a_file_keeps_nobody_waiting(box, tmp_path):
    await sh(box, "mkdir held; echo free > held/c")
    holder = await box.spawn(["python3", "-c", HOLDS_LEASES])
    try:
        assert await holder.read() == b"held\n"
        async with asyncio.timeout(20):  # the kernel would wait for 45 seconds
            with pytest.raises(OSError, match="lease"):
                await box.read("held/a")
            assert (await box.download("held", tmp_path / "down")).left_out == ("a", "b")
            assert [path.name for path in (tmp_path / "down").iterdir()] == ["c"]
            with pytest.raises(OSError, match="lease"):
                await box.snapshot()
            assert await box.read("held/c") == b"free\n"
    finally:
        await holder.close()


async def test_what_only_an_overlay_may_mark_means_nothing_in_a_snapshot(box):
    code = """
import os
os.makedirs('real/inner')
open('real/inner/file', 'w').write('content')
for path, name in (('real', 'redirect'), ('real/inner', 'opaque'), ('real/inner/file', 'metacopy'), ('/work', 'origin')):
    os.setxattr(path, f'user.overlay.{name}', b'y')
os.setxattr('real', 'user.kept', b'1')
"""
    made = await box.exec(["python3", "-c", code])
    if "not supported" in made.stderr:
        pytest.skip("files in memory have no attributes of programs here: Linux before 6.6")
    assert made.is_success, made
    async with await box.snapshot() as snapshot, Sandbox(spec=SMALL, snapshot=snapshot) as fork:
        for one in (box, fork):
            assert await sh(one, "cat real/inner/file") == "content"
            assert await sh(one, "python3 -c 'import os; print(os.listxattr(\"real\"))'") == "['user.kept']\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root acts as others")
async def test_file_threads_are_in_no_group_of_the_nodes(node):
    loop, before = asyncio.get_running_loop(), os.getgroups()
    os.setgroups([0, 4242])
    try:
        status = await loop.run_in_executor(node._threads, Path("/proc/thread-self/status").read_text)
    finally:
        os.setgroups(before)
    assert next(line for line in status.splitlines() if line.startswith("Groups:")).split() == ["Groups:"]
