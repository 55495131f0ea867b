"""A warm Python that programs of the cell stop, keep from beginning, or are: they gain nothing, and no result is lost."""

import asyncio
import signal
import sys
import textwrap
from collections.abc import AsyncIterator

import pytest

from hone.sandbox import python as warm
from hone.sandbox.cells import programs
from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.python import WarmPython, Zygotes
from hone.schema.sandboxes import Outcome, SandboxSpec

OWN_PATH = {"PATH": "/work/bin:/usr/local/bin:/usr/bin:/bin"}
SPEC = SandboxSpec(memory_mb=128, max_processes=32, env=OWN_PATH)
STOPS_ITS_PARENT = "import os, signal; os.kill(os.getppid(), signal.SIGSTOP)"
READY, FAILED = (f"report.pack({kind}, 0, 0, 12, 0, 0, 0)" for kind in (1, 2))


@pytest.fixture(params=["zygote", "own"])
async def python(request: pytest.FixtureRequest, cell: Cell) -> AsyncIterator[WarmPython]:
    """The warm Python of a cell: a fork of a zygote, or what the cell finds as its `python3`."""
    async with Zygotes() as zygotes:
        python = await zygotes.warm(cell) if request.param == "zygote" else WarmPython(cell, None)
        yield python
        await python.close()


@pytest.fixture
async def cell(cells: Cells) -> Cell:
    return await cells.create(SPEC)


async def replace_python(cell: Cell, code: str) -> None:
    """Have the cell find a program of ours as its `python3`: it has its warm Python's socket as `line`."""
    begin = """
        import os, socket, stat, struct, time
        report = struct.Struct("=IIiiQQQ")
        line = socket.socket(fileno=0)
    """
    script = f"#!{sys.executable}\n{textwrap.dedent(begin)}\n{textwrap.dedent(code)}"
    put = "mkdir -p /work/bin && cat > /work/bin/python3 && chmod +x /work/bin/python3"
    assert (await cell.exec(["sh", "-c", put], stdin=script.encode())).is_success


def has_cgroups(cell: Cell) -> bool:
    """Whether what a fork of a zygote starts has a cgroup, and is killed with its daemons whatever the warm Python does."""
    return cell.can_pause and not cell.joins_cgroups


async def assert_well(cell: Cell) -> None:
    assert (await cell.exec(["echo", "well"])).stdout == "well\n"


async def test_what_takes_the_place_of_the_cells_python_is_given_no_folder(cell: Cell) -> None:
    hear = f"""
        line.send({READY})
        descriptors = socket.recv_fds(line, 1 << 18, 16)[1]
        kinds = [stat.S_IFMT(os.fstat(one).st_mode) for one in descriptors]
        open("/work/seen", "w").write(f"{{len(kinds)}} {{stat.S_IFDIR in kinds}}")
    """
    await replace_python(cell, hear)
    python = WarmPython(cell, None)
    assert (await python.run("1")).outcome is Outcome.SIGNALLED
    assert (await cell.exec(["cat", "/work/seen"])).stdout == "3 False"
    await python.close()


async def test_a_session_that_is_forked_is_given_no_folder(python: WarmPython) -> None:
    session = await python.session()
    spy = """
        import os, socket, stat
        seen, receive = [], socket.recv_fds
        def spy(*arguments):
            received = receive(*arguments)
            seen.extend(stat.S_ISDIR(os.fstat(one).st_mode) for one in received[1])
            return received
        socket.recv_fds = spy
    """
    assert (await session.run(textwrap.dedent(spy))).is_fine
    other = await session.fork()
    assert (await session.run("seen")).text == "[False, False, False, False]\n"
    for one in (session, other):
        await one.close()


async def test_a_fork_of_a_session_dies_with_the_daemons_it_started_and_the_session_lives(
    cell: Cell,
) -> None:
    async with Zygotes() as zygotes:
        python = await zygotes.warm(cell)
        session = await python.session()
        other = await session.fork()
        daemon = "import os, time\nif not os.fork():\n  os.setsid()\n  while True: time.sleep(1)"
        assert (await other.run(daemon)).is_fine
        await other.close()
        assert (await session.run("1 + 1")).text == "2\n"
        await session.close()
        await python.close()
    if has_cgroups(cell):
        async with asyncio.timeout(5):
            while not cell.is_quiet():
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("pid", ["1", "os.getppid()", "os.getpid()", "-1", "1 << 30"])
async def test_a_session_that_names_another_process_as_its_fork_ends_nothing(cell: Cell, pid: str) -> None:
    async with Zygotes() as zygotes:
        python = await zygotes.warm(cell)
        session = await python.session()
        lie = f"""
            import os, socket, struct, sys
            def hear(session):
                socket.recv_fds(session.line, 16, 8)
                session.line.send(struct.pack("=ii", {pid}, 0))
            sys.modules["warm"].Session.hear = hear
        """
        assert (await session.run(textwrap.dedent(lie))).is_fine
        other = await session.fork()
        assert (await other.run("1")).is_over
        await other.close()
        assert (await session.run("2")).text == "2\n"
        await session.close()
        await python.close()
    await assert_well(cell)


async def test_a_program_that_stops_the_warm_python_is_late_and_the_next_call_goes_on(
    python: WarmPython, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "KILL_SECONDS", 0.5)
    result = await python.run(STOPS_ITS_PARENT, timeout_seconds=0.3)
    assert result.outcome is Outcome.TIMEOUT
    assert (await python.run("print(1)")).stdout == "1\n"
    await assert_well(cell)


async def test_a_session_that_stops_the_warm_python_ends_and_so_does_what_else_ran_there(
    python: WarmPython, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "KILL_SECONDS", 0.5)
    session, other = await python.session(), await python.session()
    assert (await session.run(STOPS_ITS_PARENT)).is_fine
    await session.close()
    if has_cgroups(cell):  # or what the stopped one would have to kill lives on, as a daemon does
        assert (await other.run("1")).is_over
    assert (await python.run("print(1)")).stdout == "1\n"
    await assert_well(cell)


async def test_a_session_that_never_begins_because_the_warm_python_was_stopped_is_over(
    python: WarmPython, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "KILL_SECONDS", 0.5)
    stopping = await python.spawn(STOPS_ITS_PARENT)
    assert await stopping.read() == b""
    monkeypatch.setattr(warm, "START_SECONDS", 0.5)
    session = await python.session()
    assert (await session.run("1")).is_over
    await stopping.close()
    await assert_well(cell)


async def test_a_warm_python_that_does_not_listen_is_left_for_another_one(
    python: WarmPython, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "KILL_SECONDS", 0.5)
    monkeypatch.setattr(warm, "ROOM_SECONDS", 0.5)
    stopping = await python.spawn(STOPS_ITS_PARENT)
    assert await stopping.read() == b""
    waiting = [await python.spawn("1", env={"LONG": "x" * 100_000}) for _ in range(6)]
    assert await waiting[0].wait() == -signal.SIGKILL
    for one in (stopping, *waiting):
        await one.close()
    await assert_well(cell)


async def test_programs_that_keep_the_warm_python_from_beginning_get_a_result(python: WarmPython, cell: Cell) -> None:
    killing = "import os\nprint(1, flush=True)\nwhile True:\n  try: os.kill(-1, 9)\n  except OSError: pass"
    daemon = await cell.spawn([sys.executable, "-c", killing])
    assert await daemon.read() == b"1\n"
    for _ in range(5):
        result = await python.run("import time; time.sleep(0.05)")
        assert result.exit_code != 0
        session = await python.session()
        assert (await session.run("import time; time.sleep(0.05)")).is_over
        await session.close()
    await daemon.close()
    assert (await python.run("print(1)")).stdout == "1\n"


async def test_a_cell_without_its_python_any_more_gets_a_result(cell: Cell) -> None:
    await replace_python(cell, "")
    assert (await cell.exec(["sh", "-c", "echo gone > /work/bin/python3"])).is_success
    python = WarmPython(cell, None)
    assert (await python.run("1")).exit_code != 0
    session = await python.session()
    assert (await session.run("1")).is_over
    await python.close()


@pytest.mark.parametrize("lie", [f"line.send({FAILED})", f"line.send({READY}); line.send({FAILED})", "line.send(b'x')"])
async def test_what_takes_the_place_of_the_cells_python_has_no_trouble_of_ours_to_tell(cell: Cell, lie: str) -> None:
    await replace_python(cell, f"{lie}\ntime.sleep(60)")
    python = WarmPython(cell, None)
    result = await python.run("1")
    assert (result.outcome, result.exit_code) in [(Outcome.SIGNALLED, -signal.SIGKILL), (Outcome.EXITED, 126)]
    session = await python.session()
    assert (await session.run("1")).is_over
    await python.close()
    await assert_well(cell)
