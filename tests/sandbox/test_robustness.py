"""What goes wrong once on a node, and must not go on being wrong."""

import asyncio
import errno
import math
import os
import signal
import threading
from pathlib import Path

import msgspec
import pytest

from hone.sandbox.cells import cells as cells_module
from hone.sandbox.cells import spawner as spawner_module
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.cgroups import Cgroups
from hone.sandbox.cells.host import CgroupFolders
from hone.sandbox.client import Sandbox
from hone.sandbox.errors import ImageError, SandboxError, Unsupported
from hone.sandbox.files.files import Tree
from hone.sandbox.gateway.discovery import Lines
from hone.sandbox.images.registries import explain
from hone.sandbox.images.store import ImageStore
from hone.sandbox.native import build as build_module
from hone.sandbox.native.build import BuildError, build
from hone.sandbox.node import accounts
from hone.sandbox.node.accounts import Accounts, EndedSandbox
from hone.sandbox.node.journal import Journal
from hone.sandbox.node.lifecycle import End, Lifecycle, Limits
from hone.sandbox.node.node import Node
from hone.sandbox.wire.remote import RemoteNode
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandboxes import Outcome, SandboxSpec, SandboxUsage

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)


@pytest.fixture
async def node(cells, tmp_path):
    async with Node("n", folder=tmp_path / "node", limits=Limits(max_starting=2)) as node:
        yield node


@pytest.mark.parametrize("name", ["memory_mb", "cpus", "disk_mb", "max_processes", "ttl_seconds", "idle_seconds"])
@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, -1.0])
def test_numbers_of_a_sandbox_are_finite(name, value):
    with pytest.raises(ValueError, match=name):
        SandboxSpec(**{name: value})


async def test_what_nobody_foresaw_costs_one_sandbox_and_no_place(node, monkeypatch, caplog):
    def find(name):
        raise KeyError("a surprise")

    monkeypatch.setattr(node._images, "find", find)
    for _ in range(3):
        with pytest.raises(SandboxError, match="a surprise") as error:
            await node.create(msgspec.structs.replace(SMALL, image="x:1")).ready()
        assert error.value.outcome is Outcome.AGENT_LOST
    assert "KeyError" in caplog.text
    box = node.create(SMALL)
    await box.ready()
    await box.close()


async def test_an_image_that_a_full_disk_has_no_room_for_is_not_refused(node, monkeypatch):
    def find(name):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ImageError("no room") from error

    monkeypatch.setattr(node._images, "find", find)
    with pytest.raises(SandboxError, match="no room") as error:
        await node.create(msgspec.structs.replace(SMALL, image="x:1")).ready()
    assert error.value.outcome is Outcome.AGENT_LOST


async def test_the_node_looks_after_its_sandboxes_also_after_a_surprise(node, monkeypatch, caplog):
    look = node._lifecycle.tick
    failures = iter([ValueError("a surprise")])

    def tick(now):
        for failure in failures:
            raise failure
        look(now)

    monkeypatch.setattr(node._lifecycle, "tick", tick)
    box = node.create(msgspec.structs.replace(SMALL, ttl_seconds=0.1))
    await box.ready()
    async with asyncio.timeout(30):
        await box.over
    assert "a surprise" in caplog.text


async def test_snapshots_that_cannot_be_let_go_of_do_not_hold_up_the_node(node, monkeypatch):
    async def hang():
        await asyncio.sleep(3600)

    monkeypatch.setattr(node.snapshots, "let_go_of_old", hang)
    await asyncio.sleep(1.2)  # for a look
    box = node.create(msgspec.structs.replace(SMALL, ttl_seconds=0.1))
    await box.ready()
    async with asyncio.timeout(30):
        await box.over
    assert node._forgetting is not None
    node._forgetting.cancel()


def ended(number):
    return EndedSandbox(f"n.1.{number}", "", "", "python", 0.0, 1.0, None, End.CLOSED, "", SandboxUsage())


def test_accounts_go_on_after_no_new_file_could_be_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(accounts, "MAX_BYTES", 100)
    lines = accounts.JsonLines
    book = Accounts(tmp_path)

    def refuse(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(accounts, "JsonLines", refuse)
    for number in range(2):
        with pytest.raises(OSError, match="Too many"):
            book.add(ended(number))
    monkeypatch.setattr(accounts, "JsonLines", lines)
    book.add(ended(2))
    book.add(ended(3))
    book.close()
    written = "".join(path.read_text() for path in sorted(tmp_path.glob("sandboxes.jsonl*")))
    assert "n.1.3" in written


def test_a_journal_goes_on_after_it_could_not_be_shortened(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.begin("n.1.1", "a")
    opened = os.open

    def refuse(*arguments, **more):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("hone.sandbox.node.journal.os.open", refuse)
    with pytest.raises(OSError, match="Too many"):
        journal._shorten()
    monkeypatch.setattr("hone.sandbox.node.journal.os.open", opened)
    journal.begin("n.1.2", "b")
    journal.close()
    after = Journal(tmp_path)
    assert after.lost == {"n.1.1": "a", "n.1.2": "b"}
    after.close()


async def test_a_file_of_nodes_that_is_no_text_is_told(tmp_path, caplog):
    path = tmp_path / "nodes"
    path.write_text("unix:/run/a\n")
    lines = Lines(path)
    known = await lines.addresses()
    path.write_bytes(b"\xff\xfe\xff")
    assert await lines.addresses() == known
    assert "not to be had" in caplog.text


async def test_a_spawner_that_did_not_start_is_tried_again(cells, monkeypatch):
    native = spawner_module._native

    def refuse():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spawner_module, "_native", refuse)
    monkeypatch.setattr(spawner_module, "_in_python", refuse)
    async with Cells() as own:
        with pytest.raises(SandboxError, match="No space") as error:
            await own.create(SMALL)
        assert error.value.outcome is Outcome.AGENT_LOST
        monkeypatch.setattr(spawner_module, "_native", native)
        if own.host.can_build:
            await (await own.create(SMALL)).destroy()


async def test_all_who_find_a_spawner_lost_share_the_next_one(cells, monkeypatch):
    made = []

    class Counted(cells_module.Spawner):
        def __init__(self, *arguments, **more):
            made.append(self)
            super().__init__(*arguments, **more)

    monkeypatch.setattr(cells_module, "Spawner", Counted)
    async with Cells() as own:
        await (await own.create(SMALL)).destroy()
        (first,) = made
        os.kill(first._process.pid, signal.SIGKILL)
        while not first.is_lost:
            await asyncio.sleep(0.01)
        both = await asyncio.gather(*(own.create(SMALL) for _ in range(5)))
        assert len(made) == 2
        for cell in both:
            await cell.destroy()


async def test_one_cell_that_does_not_die_does_not_keep_the_others_alive(cells, monkeypatch):
    own = Cells()
    await own.__aenter__()
    stuck, slow = [await own.create(SMALL) for _ in range(2)]
    destroy_stuck, destroy_slow = stuck.destroy, slow.destroy

    async def refuse():
        await destroy_stuck()
        raise SandboxError("it does not die")

    async def later():
        await asyncio.sleep(0.1)
        await destroy_slow()

    monkeypatch.setattr(stuck, "destroy", refuse)
    monkeypatch.setattr(slow, "destroy", later)
    with pytest.raises(SandboxError, match="does not die"):
        await own.__aexit__(None, None, None)
    assert own.living() == set()


async def test_a_spawner_that_does_not_answer_is_not_waited_for_for_ever(cells, monkeypatch):
    async with Cells() as own:
        if not own.host.can_build:
            pytest.skip("no C compiler: the spawner in Python takes no steps for others")
        cell = await own.create(SMALL)
        os.kill(cell.spawner._process.pid, signal.SIGSTOP)
        monkeypatch.setattr(spawner_module, "ANSWER_SECONDS", 0.1)
        try:
            with pytest.raises(SandboxError, match="has not answered"):
                await cell.spawner.carry_out(())
        finally:
            os.kill(cell.spawner._process.pid, signal.SIGCONT)
        await cell.destroy()


def test_a_compiler_without_room_is_no_machine_without_cells(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build_module, "prebuilt_folder", lambda: None)
    for name, said, is_passing in (
        ("full", "cc1: error: error writing to x.s: No space left on device", True),
        ("broken", "spawner.c:1: error: unknown type name", False),
    ):
        compiler = tmp_path / name
        compiler.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        compiler.chmod(0o755)
        with pytest.raises(BuildError, match="does not compile") as error:
            build([str(compiler)])
        assert error.value.is_passing is is_passing


@pytest.mark.parametrize("is_passing", [True, False])
async def test_only_a_machine_that_cannot_have_cells_is_unsupported(cells, monkeypatch, is_passing):
    def refuse():
        raise BuildError("it does not compile", is_passing=is_passing)

    monkeypatch.setattr(spawner_module, "_native", refuse)
    monkeypatch.setattr(spawner_module, "_in_python", refuse)
    async with Cells() as own:
        with pytest.raises(SandboxError, match="does not compile") as error:
            await own.create(SMALL)
    assert isinstance(error.value, Unsupported) is not is_passing


async def test_a_sandbox_that_ends_during_its_snapshot_is_accounted_once(node, monkeypatch):
    box = node.create(SMALL)
    await box.ready()
    accounted = []
    settled = node.records.ended
    monkeypatch.setattr(node.records, "ended", lambda *all: (accounted.append(all[0].sandbox_id), settled(*all)))
    taken, goes_on = asyncio.Event(), asyncio.Event()
    take_over = node.snapshots.take_over

    async def slowly(cell, base):
        taken.set()
        await goes_on.wait()
        return await take_over(cell, base)

    if not node.snapshots.can_hold:
        pytest.skip("no cell can lie over another's files here")
    monkeypatch.setattr(node.snapshots, "take_over", slowly)
    taking = asyncio.create_task(box.snapshot())
    await taken.wait()
    closing = asyncio.create_task(box.close())
    await asyncio.sleep(0)
    goes_on.set()
    await asyncio.wait([taking, closing])
    while node._by_number:
        await asyncio.sleep(0.01)
    assert accounted == [box.sandbox_id]


def test_deadlines_of_what_is_over_are_forgotten():
    lifecycle = Lifecycle("n.1.")
    busy = lifecycle.ask(SandboxSpec(ttl_seconds=50.0, idle_seconds=5.0), 0.0)
    (make,) = lifecycle.take()
    lifecycle.made(make.number, 0.0)
    for _ in range(5000):
        lease = lifecycle.ask(SandboxSpec(ttl_seconds=3600), 0.0)
        lifecycle.end(lease.sandbox_id, 0.0, "closed")
    for number in range(5000):
        lifecycle.begin_use(busy)
        lifecycle.end_use(busy, number / 5000)
    assert len(lifecycle._deadlines) <= 1100
    assert lifecycle.next_deadline() <= busy.deadline()
    lifecycle.tick(7.0)
    assert busy.sandbox_id not in lifecycle.leases


async def test_a_python_that_came_too_late_is_not_the_one_of_the_next_cell(node, monkeypatch):
    box = node.create(SMALL)
    await box.ready()
    if not node.snapshots.can_hold:
        pytest.skip("no cell can lie over another's files here")
    snapshot = await box.snapshot()
    await box.ready()
    python_of, waits, goes_on = node.python_of, asyncio.Event(), asyncio.Event()

    async def slowly(cell):
        python = await python_of(cell)
        waits.set()
        await goes_on.wait()
        return python

    monkeypatch.setattr(node, "python_of", slowly)
    early = asyncio.create_task(box.snippet("print(1)"))
    await waits.wait()
    await box.reset(snapshot.snapshot_id)
    goes_on.set()
    with pytest.raises(SandboxError):
        await early
    assert (await box.snippet("print(2)")).stdout == "2\n"
    assert (await box.python("print(3)")).text == "3\n"
    await box.close()


@pytest.mark.parametrize("key", ["", "mine"])
async def test_a_sandbox_whose_asking_was_cancelled_is_gone_unless_it_may_be_asked_for_again(node, tmp_path, key):
    async with NodeServer(node, f"unix:{tmp_path}/socket") as server:
        client = RemoteNode(server.address)
        await client.connected()
        for _ in range(5):
            asking = asyncio.create_task(client.create(SMALL, key=key))
            async with asyncio.timeout(30):
                while not node.sandboxes():
                    await asyncio.sleep(0)
                asking.cancel()  # the answer is on its way
                with pytest.raises(asyncio.CancelledError):
                    await asking
                if key:
                    break
                while node.sandboxes():
                    await asyncio.sleep(0.01)
        if key:
            await client.sandboxes()  # its answer comes after that one
            assert (await client.create(SMALL, key=key)).sandbox_id == node.sandboxes()[0].sandbox_id
        await client.close()


async def test_a_snapshot_whose_taking_was_cancelled_returns_at_once_and_is_gone(node, tmp_path):
    async with (
        NodeServer(node, f"unix:{tmp_path}/socket") as server,
        Sandbox(spec=SMALL, node=server.address) as box,
    ):
        await box.ready()
        taking = asyncio.create_task(box.snapshot())
        async with asyncio.timeout(30):
            while not node.snapshots.count:
                await asyncio.sleep(0)
            taking.cancel()
            for _ in range(2):  # no answer is waited for
                await asyncio.sleep(0)
            assert taking.cancelled()
            while node.snapshots.count:
                await asyncio.sleep(0.01)


async def test_an_image_is_looked_for_once_and_holds_up_nobody_who_does_not_want_it(node, monkeypatch):
    wanted, goes_on = [], threading.Event()
    images = node._images

    def find(name):
        wanted.append(name)
        goes_on.wait(30)
        return type(images).find(images, "python")

    monkeypatch.setattr(images, "find", find)
    boxes = [node.create(msgspec.structs.replace(SMALL, image="x:1")) for _ in range(5)]
    async with asyncio.timeout(30):
        other = node.create(SMALL)
        await other.ready()  # two may start at once, and five wait for the image
        hurried = node.create(msgspec.structs.replace(SMALL, image="x:1"))
        await hurried.close()
        assert node._lifecycle.num_making >= 5
        goes_on.set()
        for box in (*boxes, other):
            await box.ready()
            await box.close()
        while node._lifecycle.num_making:
            await asyncio.sleep(0.01)
    assert wanted == ["x:1"]
    assert node.num_unmatched == 0


async def test_who_waits_for_an_image_waits_no_longer_than_its_lease(node, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(node._images, "find", lambda name: goes_on.wait(30))
    box = node.create(msgspec.structs.replace(SMALL, image="x:1"))
    await asyncio.sleep(0.05)
    await box.close()
    async with asyncio.timeout(10):
        while node._lifecycle.num_making:
            await asyncio.sleep(0.01)
    goes_on.set()


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_node_that_stops_takes_what_fetches_images_along(cells, tmp_path, monkeypatch):
    program = tmp_path / "skopeo"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nsleep 600 & wait\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with Node("n", images=ImageStore(tmp_path / "images")) as own:
        own.create(msgspec.structs.replace(SMALL, image="somewhere.test/x:1"))
        async with asyncio.timeout(30):
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
                await asyncio.sleep(0.01)
        child = (tmp_path / "pid").read_text().strip()
        assert _is_running(child)
    async with asyncio.timeout(10):
        while _is_running(child):
            await asyncio.sleep(0.01)  # what it started is seen to by `cells`


@pytest.mark.parametrize("said", [r'msg="odd \x00 quoting"', "\udcff", "plain"])
def test_whatever_a_program_complains_of_is_a_line(said):
    assert "\n" not in explain("skopeo", said)


async def test_letting_go_of_a_snapshot_goes_on_when_nobody_waits_for_it(node, monkeypatch):
    if not node.snapshots.can_hold:
        pytest.skip("no cell can lie over another's files here")
    box = node.create(SMALL)
    await box.ready()
    status = await box.snapshot()
    await box.close()
    layers = node.snapshots.layers
    release = layers.release

    async def slowly(layer):
        await asyncio.sleep(0.05)
        await release(layer)

    monkeypatch.setattr(layers, "release", slowly)
    letting = asyncio.create_task(node.hold_snapshot(status.snapshot_id, 0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    letting.cancel()
    await asyncio.wait([letting])
    async with asyncio.timeout(10):
        while layers.held:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_the_node_lacks_is_no_answer_to_whoever_works_in_a_sandbox(tmp_path, monkeypatch, number):
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    tree = Tree(root)

    def refuse(*arguments, **more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("hone.sandbox.files.files.open_beneath", refuse)
    with pytest.raises(SandboxError, match="the node has not enough"):
        tree.list("/")
    tree.close()
    os.close(root)


async def test_a_forked_child_holds_nothing_of_the_cells(cells):
    async with Cells() as own:
        cell = await own.create(SMALL)
        program = await cell.spawn(["cat"])
        ours = {Path(f"/proc/self/fd/{one.fileno()}").readlink() for one in (cell._control, cell.spawner._socket)}
        ours |= {Path(f"/proc/self/fd/{one}").readlink() for one in (program._stdin, program._stdout)}
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writes, b"x")
            signal.pause()
            os._exit(0)
        try:
            os.read(reads, 1)
            theirs = {path.readlink() for path in Path(f"/proc/{child}/fd").iterdir()}
            assert not ours & theirs
            program.end_input()
            async with asyncio.timeout(10):
                assert await program.wait() == 0
            await program.close()
            assert (await cell.exec(["cat"], stdin=b"in", timeout_seconds=10)).stdout == "in"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reads)
            os.close(writes)
        await cell.destroy()


def test_a_process_that_moved_into_a_folder_of_its_own_does_not_go_deeper_the_next_time(tmp_path):
    leaf = tmp_path / "hone-cells-1-2-0-owner"
    leaf.mkdir()
    cgroups = Cgroups(CgroupFolders(unified=leaf))
    assert cgroups.unified is not None
    assert cgroups.unified.parent == tmp_path
    cgroups.close()
