"""What programs hoard, storm and hold open: paid for by their own cell, over at the timeout, and no trouble for the node."""

import asyncio
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hone.sandbox.cells import programs
from hone.sandbox.cells.cell import ENDED, REPORT, Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.plan import Bind, Image
from hone.sandbox.errors import SandboxError
from hone.sandbox.node.journal import Journal
from hone.sandbox.node.node import Node
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec

SMALL = SandboxSpec(memory_mb=64, disk_mb=16, max_processes=32)


async def python(cell: Cell, code: str, **options: float) -> ExecResult:
    return await cell.exec(["python3", "-c", textwrap.dedent(code)], **options)


async def assert_well(cell: Cell) -> None:
    assert (await cell.exec(["echo", "well"])).stdout == "well\n"


async def assert_well_or_out_of_memory(cell: Cell) -> None:
    """The kernel takes who uses most, which the agent does where programs hoard what is nobody's."""
    try:
        await assert_well(cell)
    except SandboxError as error:
        if error.outcome is not Outcome.OUT_OF_MEMORY:
            raise


HOARDS = {
    "buffers of sockets": """
        import socket
        kept = []
        while True:
            ends = socket.socketpair()
            kept.append(ends)
            ends[0].setblocking(False)
            try:
                while True:
                    ends[0].send(bytes(60_000))
            except BlockingIOError:
                pass
    """,
    "files in memory": """
        import os
        kept = []
        while True:
            kept.append(os.memfd_create("hoard"))
            os.ftruncate(kept[-1], 1 << 20)
            os.pwrite(kept[-1], b"x" * (1 << 20), 0)
    """,
    "shared memory": """
        import mmap
        kept = []
        while True:
            kept.append(mmap.mmap(-1, 1 << 20, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
            kept[-1].write(b"x" * (1 << 20))
    """,
    "descriptors": """
        import os
        while True:
            os.dup(1)
    """,
    "sparse files": """
        import mmap, os
        file = os.open("/work/sparse", os.O_RDWR | os.O_CREAT)
        os.ftruncate(file, 1 << 40)
        area = mmap.mmap(file, 1 << 34)
        for page in range(0, 1 << 34, 4096):
            area[page] = 1
    """,
}


@pytest.mark.parametrize("what", sorted(HOARDS))
async def test_a_hoard_ends_at_a_limit_and_the_agent_answers(cells: Cells, what: str) -> None:
    cell = await cells.create(SMALL)
    result = await python(cell, HOARDS[what], timeout_seconds=30)
    assert not result.is_success
    assert result.outcome is not Outcome.TIMEOUT, result
    await assert_well_or_out_of_memory(cell)


SMALLER_THAN_AGENTS = """
static long call(long number, long a, long b, long c, long d)
{
    long result;
    register long fourth __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth) : "rcx", "r11", "memory");
    return result;
}
void _start(void)
{
    for (;;) {
        long file = call(319, (long)"hoard", 0, 0, 0); /* memfd_create */
        if (file < 0 || call(285, file, 0, 0, 1 << 20)) /* fallocate */
            call(231, 3, 0, 0, 0);
    }
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("gcc") is None, reason="needs gcc and x86_64")
async def test_a_hoarder_smaller_than_the_agent_has_itself_run_out_of_memory(cells: Cells, tmp_path: Path) -> None:
    folders = cells.host.cgroups
    if "memory" not in folders.v1 and "memory" not in folders.unified_controllers:
        pytest.skip("no cgroup controller memory for this user")
    (tmp_path / "hoard.c").write_text(SMALLER_THAN_AGENTS)
    tmp_path.chmod(0o755)
    subprocess.run(["gcc", "-static", "-nostdlib", "-O2", "-o", "hoard", "hoard.c"], cwd=tmp_path, check=True)
    cell = await cells.create(SMALL, binds=[Bind(str(tmp_path), "/hoard")])
    waiting = asyncio.create_task(cell.exec(["sleep", "0.05"]))
    result = await cell.exec(["/hoard/hoard"], timeout_seconds=30)
    assert (result.outcome, result.exit_code) == (Outcome.OUT_OF_MEMORY, -signal.SIGKILL)
    assert not (await waiting).outcome.is_infra
    await assert_well_or_out_of_memory(cell)


async def test_an_agent_that_is_killed_without_a_lack_of_memory_is_infrastructure(cells: Cells) -> None:
    cell = await cells.create(SMALL)
    await python(cell, "x = bytearray(b'x') * (200 << 20)", timeout_seconds=30)  # long over by then
    await assert_well_or_out_of_memory(cell)
    waiting = asyncio.create_task(cell.exec(["sleep", "10"]))
    await asyncio.sleep(0)
    os.kill(cell.pid, signal.SIGKILL)
    with pytest.raises(SandboxError) as error:
        await waiting
    assert error.value.outcome is Outcome.AGENT_LOST


async def test_many_hogs_are_over_and_the_next_program_runs(cells: Cells) -> None:
    cell = await cells.create(SMALL)
    hogs = """
        import os, time
        for _ in range(20):
            if os.fork() == 0:
                hog = bytearray(b"x") * (30 << 20)
                time.sleep(60)
        os._exit(3)
    """
    await python(cell, hogs, timeout_seconds=20)
    assert (await cell.exec(["true"], timeout_seconds=20)).outcome in (Outcome.EXITED, Outcome.OUT_OF_MEMORY)
    await cell.destroy()


async def test_folders_below_folders_and_long_names_do_no_harm(cells: Cells) -> None:
    cell = await cells.create(SMALL)
    depths = """
        import os
        depth = 0
        try:
            while depth < 3000:
                os.mkdir("d" * 255)
                os.chdir("d" * 255)
                depth += 1
        except OSError as error:
            print(error.errno)
        print(depth)
    """
    result = await python(cell, depths)
    assert int(result.stdout.split()[-1]) > 100
    names = "import os\nfor n in range(500): os.close(os.open(f'{n:0255}', os.O_CREAT))"
    assert (await python(cell, names)).is_success
    await assert_well(cell)
    await cell.destroy()


async def test_a_storm_of_timers_ends_at_its_timeout(cells: Cells) -> None:
    cell = await cells.create(SMALL)
    storm = """
        import threading, time
        def storm():
            while True:
                time.sleep(0.00001)
        for _ in range(20):
            threading.Thread(target=storm).start()
    """
    assert (await python(cell, storm, timeout_seconds=0.5)).outcome is Outcome.TIMEOUT
    await assert_well(cell)


async def test_the_length_of_its_turns_on_a_core_is_not_its_own_to_choose(cells: Cells) -> None:
    cell = await cells.create(SMALL)
    code = """
        import ctypes, os, struct
        number = {"x86_64": 314, "aarch64": 274}[os.uname().machine]
        attributes = ctypes.create_string_buffer(struct.pack("=IIQiIQQQ", 48, 0, 0, 0, 0, 100_000_000, 0, 0))
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.syscall(number, 0, attributes, 0), ctypes.get_errno())
    """
    assert (await python(cell, code)).stdout == "-1 1\n"


async def test_a_crash_leaves_no_dump(cells: Cells) -> None:
    cell = await cells.create(SMALL)
    result = await cell.exec(["sh", "-c", "ulimit -c; kill -SEGV $$"])
    assert (result.outcome, result.stdout) == (Outcome.SIGNALLED, "0\n")
    assert "core" not in (await cell.exec(["ls", "-A"])).stdout


async def test_an_agent_that_never_answers_is_lost_and_typed(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "KILL_SECONDS", 0.3)
    cell, neighbour = await cells.create(SMALL), await cells.create(SMALL)
    os.kill(cell.pid, signal.SIGSTOP)
    with pytest.raises(SandboxError) as error:
        await cell.exec(["true"], timeout_seconds=0.1)
    assert error.value.outcome is Outcome.AGENT_LOST
    await assert_well(neighbour)
    await cell.destroy()


async def test_an_agent_that_floods_the_node_costs_nobody_else(cells: Cells, cell: Cell) -> None:
    liar = Cell("liar", SMALL, Image(), 0, 0, lambda _: asyncio.sleep(0))
    before = len(list(Path("/proc/self/fd").iterdir()))
    lie = REPORT.pack(ENDED, 7, 0, 0, 0, 0, 0)
    with liar.open() as theirs:
        theirs.setblocking(False)
        for number in range(200):
            with suppress(OSError):  # full, and soon nobody listens
                while True:
                    socket.send_fds(theirs, [lie], [0, 1, 2, 0, 1, 2])
            await asyncio.sleep(0)
            if number % 50 == 0:
                await assert_well(cell)
        with pytest.raises(SandboxError, match="nonsense"):
            await liar.until_ready([])
    await liar.destroy()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


async def test_the_clock_of_the_wall_may_jump(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Node() as node:
        sandbox = node.create(SMALL)
        assert (await sandbox.exec(["true"])).is_success
        now = time.time()
        for jump in (1e9, -1e8):
            monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
            assert (await sandbox.exec(["true"], timeout_seconds=5)).is_success
        await asyncio.sleep(0)
        assert sandbox.status().seconds_left > 500


def test_a_journal_that_cannot_be_written_refuses_what_begins_and_lets_end_what_runs(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from hone.sandbox.errors import SandboxError
from hone.sandbox.node.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.begin("a", "me")
resource.setrlimit(resource.RLIMIT_FSIZE, (4, resource.RLIM_INFINITY))
try:
    journal.begin("b", "me")
except SandboxError as error:
    print("refused", "journal" in str(error))
journal.end("a")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.begin("c", "me")
journal.close()
"""
    finished = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert finished.stdout == "refused True\n"
    assert Journal(tmp_path).lost == {"c": "me"}


async def test_a_node_whose_disk_is_full_refuses_new_sandboxes_and_keeps_the_old(cells: Cells, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with Node(folder=tmp_path) as node:
        sandbox = node.create(SMALL)
        await sandbox.ready()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            with pytest.raises(SandboxError, match="journal"):
                node.create(SMALL)
            assert (await sandbox.exec(["true"])).is_success
            await sandbox.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert node.statistics()["sandbox/leases"] == 0
        async with asyncio.timeout(5):
            while node.statistics()["sandbox/cells"]:
                await asyncio.sleep(0.01)
        again = node.create(SMALL)
        assert (await again.exec(["true"])).is_success
