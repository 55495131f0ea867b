"""Sandboxes as users have them: on a node in this process, and on one behind a socket, with the same calls."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hone.sandbox.cache import cache_folder
from hone.sandbox.cells.cells import Cells
from hone.sandbox.client import Sandbox, embedded_node
from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.images.store import ImageStore
from hone.sandbox.node.journal import Journal
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.sandbox.wire.remote import RemoteNode
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandbox_calls import Destroy
from hone.schema.sandboxes import Outcome, SandboxSpec

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)
MARK = f"{os.getpid()}.876543"
"""How long programs sleep, so that they are told from those of other tests that run at the same time."""


@pytest.fixture
async def node(cells, tmp_path):
    """Of its own; `cells` skips where there can be none, and checks that nothing is left."""
    async with Node("n", folder=tmp_path / "node", limits=Limits(max_warm=4)) as node:
        yield node


@pytest.fixture
async def server(node, tmp_path):
    async with NodeServer(node, f"unix:{tmp_path}/socket", grace_seconds=0.2) as server:
        yield server


@pytest.fixture(params=["embedded", "unix", "tcp"])
async def box(request, node, tmp_path):
    if request.param == "embedded":
        async with Sandbox(spec=SMALL, node=node) as box:
            yield box
        return
    address = f"unix:{tmp_path}/socket" if request.param == "unix" else "tcp://127.0.0.1:0"
    async with (
        NodeServer(node, address, tokens={"secret": "me"}) as server,
        Sandbox(spec=SMALL, node=server.address, token="secret") as box,
    ):
        yield box


async def test_a_program_runs(box):
    result = await box.exec(["sh", "-c", "cat; echo $A; echo no >&2; exit 3"], stdin=b"in\n", env={"A": "b"})
    assert (result.outcome, result.exit_code, result.stdout, result.stderr) == (Outcome.EXITED, 3, "in\nb\n", "no\n")
    late = await box.exec(["sleep", "60"], timeout_seconds=0.1)
    assert late.outcome is Outcome.TIMEOUT


async def test_files_come_and_go(box):
    await box.write("deep/a.bin", b"\0\xff" * 1000)
    assert await box.read("deep/a.bin") == b"\0\xff" * 1000
    assert [entry.name for entry in await box.list("deep")] == ["a.bin"]
    with pytest.raises(OSError, match="longer than 10"):
        await box.read("deep/a.bin", max_bytes=10)
    await box.remove("deep", is_recursive=True)
    with pytest.raises(FileNotFoundError):
        await box.read("deep/a.bin")


async def test_python_keeps_its_variables(box):
    await box.python("x = 6")
    assert (await box.python("x * 7")).text == "42\n"
    assert "ZeroDivisionError" in (await box.python("1 / 0")).text
    assert (await box.python("import os; os._exit(1)")).is_over
    assert "NameError" in (await box.python("x")).text
    assert (await box.snippet("print('apart')")).stdout == "apart\n"


async def test_a_conversation_with_a_program(box):
    process = await box.spawn(["sh", "-c", "while read line; do echo got $line; echo e >&2; done; exit 4"])
    for word in (b"one", b"two"):
        await process.write(word + b"\n")
        assert await process.read() == b"got " + word + b"\n"
    errors = b""
    while len(errors) < 4:
        errors += await process.read_error()
    assert errors == b"e\ne\n"
    process.end_input()
    assert await process.wait() == 4
    assert await process.read() == b""
    await process.close()


async def test_a_conversation_with_python_that_did_not_have_to_start(box):
    code = "import os, sys\nfor line in sys.stdin: print(os.environ['A'], line.strip(), flush=True)\nsys.exit(4)"
    process = await box.spawn_python(code, env={"A": "got"})
    for word in (b"one", b"two"):
        await process.write(word + b"\n")
        assert await process.read() == b"got " + word + b"\n"
    process.end_input()
    assert await process.wait() == 4
    await process.close()
    sleeping = await box.spawn_python("import time; time.sleep(60)")
    sleeping.kill()
    assert await sleeping.wait() == -9
    await sleeping.close()


async def test_much_output_and_input_flow_with_a_slow_reader(box):
    process = await box.spawn(["cat"])
    sent = os.urandom(1 << 20)
    writing = asyncio.create_task(process.write(sent))
    received = b""
    while len(received) < len(sent):
        received += await process.read()
        await asyncio.sleep(0)
    await writing
    assert received == sent
    await process.close()


async def test_a_program_that_does_not_read_says_so(box):
    process = await box.spawn(["sh", "-c", "exec <&-; sleep 60"])
    with pytest.raises(BrokenPipeError):
        await process.write(b"x" * 1_000_000)
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    await process.close()


async def test_a_terminal_and_signals(box):
    process = await box.spawn(["sh", "-c", "stty size; sleep 60"], terminal=(10, 40))
    assert await process.read() == b"10 40\r\n"
    process.interrupt()
    assert await process.wait() != 0
    await process.close()


async def test_the_token_of_an_address_is_that_of_the_environment_where_none_is_given(node, monkeypatch):
    monkeypatch.setenv("HONE_SANDBOX_TOKEN", "secret")
    async with NodeServer(node, "tcp://127.0.0.1:0", tokens={"secret": "me"}) as server:
        async with Sandbox(spec=SMALL, node=server.address) as box:
            assert (await box.exec(["true"])).is_success
        with pytest.raises(ValueError, match="does not let you in"):  # who showed none to us has not this one
            await Sandbox(spec=SMALL, node=server.address, token="").open()


def test_the_cache_is_elsewhere_where_there_is_no_home_to_write_to(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "wanted"))
    assert cache_folder("images") == tmp_path / "wanted/hone/images"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ImageStore().folder == tmp_path / f"hone-cache-{os.getuid()}/images"
    (tmp_path / f"hone-cache-{os.getuid()}").chmod(0o777)
    with pytest.raises(ValueError, match="not this user's alone"):
        cache_folder("images")


def test_what_is_given_beside_a_spec_is_refused():
    with pytest.raises(ValueError, match="given memory_mb, env beside a spec"):
        Sandbox(spec=SMALL, memory_mb=64, env={"A": "b"})


async def test_the_callers_mistakes_are_the_callers(box):
    with pytest.raises(ValueError, match="argv is empty"):
        await box.exec([])


async def test_a_cancelled_call_takes_its_program_along(box):
    call = asyncio.create_task(box.exec(["sleep", "987654"]))
    look = ["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]
    async with asyncio.timeout(20):
        while "987654" not in (await box.exec(look)).stdout:
            await asyncio.sleep(0.02)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(20):
        while "987654" in (await box.exec(look)).stdout:
            await asyncio.sleep(0.02)


async def test_after_the_end_every_call_says_why(box):
    await box.exec(["true"])
    await box.close()
    with pytest.raises(SandboxError, match="it is closed"):
        await box.exec(["true"])


async def test_a_lease_ends_while_a_program_runs(node):
    async with Sandbox(spec=SandboxSpec(ttl_seconds=0.3), node=node) as box:
        with pytest.raises(SandboxError, match="its lease is over"):
            await box.exec(["sleep", "60"])


async def test_a_sandbox_that_dies_is_noticed_and_typed(node):
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.ready()
        os.kill(node.sandbox(box.sandbox_id).cell.pid, signal.SIGKILL)
        with pytest.raises(SandboxError) as error:
            await box.exec(["sleep", "60"])
        assert error.value.outcome is Outcome.AGENT_LOST


async def test_the_same_key_is_the_same_sandbox_and_a_full_node_is_busy(cells):
    async with Node(limits=Limits(max_sandboxes=1, max_queued=1)) as node:
        first = node.create(SMALL, key="k")
        assert node.create(SMALL, key="k") is first
        node.create(SMALL)
        with pytest.raises(Busy):
            node.create(SMALL)
        await first.ready()


async def test_warm_cells_are_there_at_once_and_used_once(node):
    await node.keep_warm(SMALL, 2)
    async with asyncio.timeout(10):
        while node.statistics()["sandbox/warm"] < 2:
            await asyncio.sleep(0.01)
    box = node.create(SMALL)
    assert box.lease.stage == "ready"
    await box.exec(["touch", "mark"])
    await box.close()
    other = node.create(SMALL)
    assert (await other.exec(["ls", "mark"])).exit_code != 0


async def test_an_image_that_is_not_there_is_told_at_the_first_call(node):
    async with Sandbox("dir:/no/such", node=node) as box:
        with pytest.raises(SandboxError, match="no/such"):
            await box.exec(["true"])


def test_the_embedded_node_is_one_for_all_and_ends_with_its_loop():
    async def main():
        assert await embedded_node() is await embedded_node()
        box = Sandbox(memory_mb=128)
        await box.open()
        await box.ready()  # and never closed
        return (await embedded_node()).sandbox(box.sandbox_id).cell.pid

    try:
        pid = asyncio.run(main())
    except SandboxError as error:
        pytest.skip(str(error))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# --- behind a socket ------------------------------------------------------------------------------------------------


async def test_the_sandboxes_of_a_client_that_is_gone_end_soon_after(server, node):
    client = RemoteNode(server.address)
    await client.connected()
    await (await client.create(SMALL, key="k")).ready()
    await client.close()
    async with asyncio.timeout(5):
        while node.statistics()["sandbox/cells"]:
            await asyncio.sleep(0.02)


async def test_a_node_that_is_gone_is_node_lost_for_whoever_waits(node, tmp_path):
    async with NodeServer(node, f"unix:{tmp_path}/other") as server:
        box = Sandbox(spec=SMALL, node=server.address)
        await box.open()
        call = asyncio.create_task(box.exec(["sleep", "60"]))
        await asyncio.sleep(0.2)
    with pytest.raises(SandboxError) as error:
        await call
    assert error.value.outcome is Outcome.NODE_LOST


async def test_all_who_come_at_once_after_a_node_was_lost_share_one_new_connection(cells, tmp_path):
    address = f"unix:{tmp_path}/socket"
    box = Sandbox(spec=SMALL, node=address, reconnect_seconds=0.1)
    async with Node("one") as node, NodeServer(node, address):
        await box.open()
    with pytest.raises(SandboxError):
        await box.exec(["true"])
    async with Node("two") as node, NodeServer(node, address):
        boxes = [Sandbox(spec=SMALL, node=address, reconnect_seconds=0.1) for _ in range(4)]
        await asyncio.gather(*(one.open() for one in boxes))
        for one in boxes:
            assert (await one.exec(["true"])).is_success
            await one.close()


async def test_who_has_no_token_stays_outside(node):
    with pytest.raises(ValueError, match="give tokens"):
        NodeServer(node, "tcp://127.0.0.1:0")
    async with NodeServer(node, "tcp://127.0.0.1:0", tokens={"secret": "me", "other": "you"}) as server:
        with pytest.raises(ValueError, match="does not let you in"):
            await Sandbox(node=server.address, token="wrong").open()
        async with Sandbox(spec=SMALL, node=server.address, token="secret") as mine:
            you = RemoteNode(server.address, "other")
            await you.connected()
            assert await you.sandboxes() == []
            with pytest.raises(SandboxError, match="no such sandbox"):
                await you.call(_destroy(you, mine.sandbox_id), type(None))
            await you.close()


def _destroy(client, sandbox_id):
    return Destroy(client.number(), sandbox_id)


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\4\0\0\0nope", b"\1\0\0\0\xc0"])
async def test_nonsense_costs_the_connection_only(server, tmp_path, data):
    reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/socket")
    writer.write(data)
    async with asyncio.timeout(5):
        await reader.read()
    writer.close()
    async with Sandbox(spec=SMALL, node=server.address) as box:
        assert (await box.exec(["true"])).is_success


# --- crashes --------------------------------------------------------------------------------------------------------

SERVE = """
import asyncio, sys
from pathlib import Path
from hone.sandbox.node.node import Node
from hone.sandbox.wire.serve import NodeServer
async def main():
    async with Node("n", folder=Path(sys.argv[1])) as node, NodeServer(node, "unix:" + sys.argv[1] + "/socket"):
        print(len(node.lost), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def serve(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SERVE, str(folder)], stdout=subprocess.PIPE, text=True)


async def test_a_killed_node_leaves_nothing_and_the_next_one_knows_what_was_lost(cells, tmp_path):
    node = serve(tmp_path)
    assert await asyncio.to_thread(node.stdout.readline) == "0\n"
    boxes = [Sandbox(spec=SMALL, node=f"unix:{tmp_path}/socket") for _ in range(3)]
    for box in boxes:
        await box.open()
        await box.exec(["sh", "-c", f"sleep {MARK} & setsid sleep {MARK} &"])
    call = asyncio.create_task(boxes[0].exec(["sleep", MARK]))
    await asyncio.sleep(0.1)
    node.kill()
    with pytest.raises(SandboxError) as error:
        await call
    assert error.value.outcome is Outcome.NODE_LOST
    await asyncio.to_thread(node.wait)
    node.stdout.close()
    await until_none(MARK)
    again = serve(tmp_path)
    assert await asyncio.to_thread(again.stdout.readline) == "3\n"
    assert cgroups_of([node.pid]) == []
    again.kill()
    await asyncio.to_thread(again.wait)
    again.stdout.close()


async def until_none(mark: str) -> None:
    async with asyncio.timeout(10):
        while any(mark in command for command in _commands()):
            await asyncio.sleep(0.02)


def _commands():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if int(path.parent.name) != os.getpid():
                yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


EMBEDDED = f"""
import asyncio
from hone.sandbox.client import Sandbox
async def one():
    while True:
        async with Sandbox(memory_mb=64, disk_mb=16) as box:
            await box.exec(["sh", "-c", "setsid sleep {MARK} & sleep 0.01"])
            print("x", flush=True)
async def main():
    await asyncio.gather(*(one() for _ in range(4)))
asyncio.run(main())
"""


@pytest.mark.parametrize("num_kills", [2, pytest.param(40, marks=pytest.mark.slow)])
async def test_a_process_that_is_killed_at_any_moment_leaves_nothing_after_the_next_sweep(cells, num_kills):
    chance = random.Random(num_kills)
    pids = []
    for _ in range(num_kills):
        program = subprocess.Popen([sys.executable, "-c", EMBEDDED], stdout=subprocess.PIPE)
        await asyncio.to_thread(program.stdout.readline)
        await asyncio.sleep(chance.uniform(0, 0.05))
        program.kill()
        await asyncio.to_thread(program.wait)
        program.stdout.close()
        pids.append(program.pid)
    await until_none(MARK)
    async with asyncio.timeout(20), Cells():  # sweeps
        pass
    assert not cgroups_of(pids)


def cgroups_of(pids):
    return [path for path, _, _ in os.walk("/sys/fs/cgroup") for pid in pids if f"/hone-cells-{pid}-" in path]


async def test_a_sandbox_with_a_program_in_conversation_is_not_idle(node):
    async with Sandbox(spec=SandboxSpec(idle_seconds=1), node=node) as box:
        process = await box.spawn(["cat"])
        await asyncio.sleep(2.5)
        await process.write(b"here")
        assert await process.read() == b"here"
        await process.close()
        async with asyncio.timeout(20):
            while node.report().sandboxes:
                await asyncio.sleep(0.05)
        with pytest.raises(SandboxError, match="nothing was asked of it"):
            await box.exec(["true"])


def test_a_journal_survives_a_torn_line_and_belongs_to_one(tmp_path):
    journal = Journal(tmp_path)
    journal.begin("a", "me")
    journal.begin("b", "me")
    journal.end("a")
    with pytest.raises(SandboxError, match="belongs to a node that runs"):
        Journal(tmp_path)
    journal.close()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"begin": "c", "ow')
    again = Journal(tmp_path)
    assert again.lost == {"b": "me"}
    again.close()


async def test_a_call_of_a_session_that_is_given_up_costs_the_session_and_not_the_next_call(node):
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.python("x = 1")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await box.python("import time; time.sleep(60)")
        assert (await box.python("'x' in globals()")).text == "False\n"
