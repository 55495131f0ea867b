"""Warm Python in cells: what snippets and sessions do, and what they cannot take with them."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.host import host_image
from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.files.beneath import Owner, file_threads
from hone.sandbox.files.files import Files, Tree
from hone.sandbox.images.store import ImageStore
from hone.sandbox.native.build import BuildError
from hone.sandbox.python import WarmPython, Zygotes
from hone.schema.sandboxes import Outcome, SandboxSpec


@pytest.fixture
async def cell_and_python() -> AsyncIterator[tuple[Cell, WarmPython]]:
    before = children()
    try:
        async with Zygotes() as zygotes, Cells() as cells:
            cell = await cells.create(SandboxSpec())
            yield cell, await zygotes.warm(cell)
    except Unsupported as error:
        pytest.skip(str(error))
    assert children() == before


def children() -> set[str]:
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.fixture
def python(cell_and_python: tuple[Cell, WarmPython]) -> WarmPython:
    return cell_and_python[1]


async def test_a_snippet_does_what_a_program_does(python: WarmPython) -> None:
    result = await python.run(
        "import os, sys; print(sys.stdin.read(), os.environ['A'], os.getcwd())", stdin=b"in", env={"A": "1"}
    )
    assert result.stdout == "in 1 /work\n"
    assert (await python.run("import sys; sys.exit(3)")).exit_code == 3
    result = await python.run("def f():\n  raise ValueError('no')\nf()")
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback")
    assert "warm.py" not in result.stderr


async def test_snippets_know_nothing_of_one_another(python: WarmPython) -> None:
    await python.run("x = 1; import builtins; builtins.y = 2")
    assert (await python.run("print('x' in globals(), hasattr(__builtins__, 'y'))")).stdout == "False False\n"


async def test_signals_do_what_they_do_in_any_python_also_below_a_node_that_ignores_them(cells: Cells) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        async with Zygotes() as zygotes:
            python = await zygotes.warm(await cells.create(SandboxSpec()))
            show = (
                "import signal; print(*(signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)))"
            )
            shown = (await python.run(show)).stdout
            assert shown == f"{signal.default_int_handler} {signal.SIG_DFL} {signal.SIG_DFL}\n"
            result = await python.run("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
            assert "KeyboardInterrupt" in result.stderr
            await python.close()
    finally:
        signal.signal(signal.SIGINT, before)


async def test_snippets_draw_different_numbers(python: WarmPython) -> None:
    drawn = {(await python.run("import random; print(random.random())")).stdout for _ in range(3)}
    assert len(drawn) == 3


async def test_a_late_snippet_is_killed_with_what_it_started(python: WarmPython) -> None:
    result = await python.run("import os\nif os.fork(): os.wait()\nwhile True: pass", timeout_seconds=0.3)
    assert result.outcome is Outcome.TIMEOUT
    assert (await python.run("print(1)")).stdout == "1\n"


@pytest.mark.parametrize("is_compiled", [True, False])
async def test_a_snippet_that_has_only_just_been_asked_for_can_be_killed(
    cell_and_python: tuple[Cell, WarmPython], is_compiled: bool
) -> None:
    cell, compiled = cell_and_python
    python = compiled if is_compiled else WarmPython(cell, None)
    await python.run("1")
    for _ in range(20):
        process = await python.spawn("import time; time.sleep(60)")
        process.kill()
        async with asyncio.timeout(10):
            assert await process.wait() == -signal.SIGKILL
        await process.close()
    await python.close()


async def test_a_snippet_has_no_powers_and_is_behind_the_same_filter(cell_and_python: tuple[Cell, WarmPython]) -> None:
    cell, python = cell_and_python
    show = "print(*[l for l in open('/proc/self/status') if l[:3] in ('Cap','NoN','Sec','Uid')])"
    warm = (await python.run(show)).stdout
    cold = (await cell.exec(["python3", "-c", show])).stdout
    assert warm == cold != ""
    assert (await python.run("import os; print(os.listdir('/proc/self/fd'))")).stdout == "['0', '1', '2', '3']\n"


async def test_the_warm_python_shows_nothing_of_the_node(python: WarmPython) -> None:
    code = """
import os
for name in ('environ', 'mem', 'maps', 'fd', 'root'):
    try:
        path = f'/proc/{os.getppid()}/{name}'
        (os.listdir if name in ('fd', 'root') else lambda p: open(p).read(1))(path)
        print('read', name)
    except PermissionError:
        pass
"""
    assert (await python.run(code)).stdout == ""


async def test_killing_the_warm_python_is_a_result_and_the_next_call_goes_on(python: WarmPython) -> None:
    result = await python.run("import os, time; os.kill(os.getppid(), 9); time.sleep(60)", timeout_seconds=20)
    assert result.outcome is Outcome.SIGNALLED
    assert (await python.run("print(1)")).stdout == "1\n"


async def test_a_session_keeps_its_variables_through_errors_and_timeouts(python: WarmPython) -> None:
    session = await python.session()
    assert (await session.run("x = 41")).text == ""
    assert (await session.run("x + 1")).text == "42\n"
    answer = await session.run("1 / 0")
    assert not answer.is_fine
    assert "ZeroDivisionError" in answer.text
    answer = await session.run("while True: pass", timeout_seconds=0.3)
    assert answer.is_late
    assert not answer.is_over
    assert (await session.run("import os; os.system('echo child'); x")).text == "child\n41\n"
    assert (await session.run("os._exit(0)")).is_over
    assert (await session.run("x")).is_over
    await session.close()


async def test_a_cell_full_of_processes_is_its_programs_doing(cells: Cells) -> None:
    async with Zygotes() as zygotes:
        cell = await cells.create(SandboxSpec(memory_mb=128, max_processes=16))
        bomb = "import os, time\ntry:\n  while os.fork(): pass\nexcept OSError: print(1, flush=True)\ntime.sleep(60)"
        process = await cell.spawn(["python3", "-c", bomb])
        assert await process.read() == b"1\n"
        python = await zygotes.warm(cell)
        session = await python.session()
        answer = await session.run("1")
        assert answer.is_over
        assert "no session" in answer.text
        await session.close()
        assert (await python.run("1")).exit_code == 126
        await process.close()
        await python.close()


async def test_a_session_that_ignores_the_interrupt_is_over(python: WarmPython) -> None:
    session = await python.session()
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    answer = await session.run(code, timeout_seconds=0.1)
    assert answer.is_late
    assert answer.is_over
    await session.close()


async def test_a_fork_of_a_session_goes_on_apart(python: WarmPython) -> None:
    session = await python.session()
    await session.run("x = [1]")
    other = await session.fork()
    await session.run("x.append(2)")
    await other.run("x.append(3)")
    third = await other.fork()
    await other.close()
    assert [(await one.run("x")).text for one in (session, third)] == ["[1, 2]\n", "[1, 3]\n"]
    for one in (session, third):
        await one.close()


async def test_a_fork_of_a_session_outlives_it_however_soon_that_ends(python: WarmPython) -> None:
    session = await python.session()
    await session.run("x = 1")
    for _ in range(30):
        other = await session.fork()
        await session.close()
        session = other
        assert (await session.run("x")).text == "1\n"
    await session.close()


async def test_preloads_are_there_and_missing_ones_are_told() -> None:
    async with Zygotes() as zygotes, Cells() as cells:
        cell = await cells.create(SandboxSpec())
        python = await zygotes.warm(cell, ["decimal"])
        assert (await python.run("import sys; print('decimal' in sys.modules)")).stdout == "True\n"
        with pytest.raises(SandboxError, match="no_such_module"):
            await zygotes.prepare(["no_such_module"])


async def test_in_a_cell_with_another_image_its_own_python_is_warmed_up() -> None:
    host = host_image()
    image = replace(
        host, binds=tuple(bind for bind in host.binds if not Path(sys.base_prefix).is_relative_to(bind.source))
    )
    if (
        image.binds == host.binds
        or not any(bind.source == "/usr" for bind in image.binds)
        or not Path("/usr/bin/python3").exists()
    ):
        pytest.skip("this Python is the one of /usr")
    async with Zygotes() as zygotes, Cells() as cells:
        python = await zygotes.warm(await cells.create(SandboxSpec(), image))
        assert (await python.run("import sys; print(sys.base_prefix)")).stdout == "/usr\n"
        session = await python.session()
        await session.run("x = 1")
        raised = await session.run("def f():\n    1 / 0\nf()")
        assert raised.text.startswith('Traceback (most recent call last):\n  File "<snippet 2>", line 3, in <module>')
        assert not raised.is_over
        other = await session.fork()
        assert (await other.run("x")).text == "1\n"
        failed = await python.run("1 / 0")
        assert failed.stderr == (
            'Traceback (most recent call last):\n  File "<string>", line 1, in <module>\n'
            "ZeroDivisionError: division by zero\n"
        )
        await python.close()


async def test_without_a_compiled_library_the_cells_own_python_is_warmed_up(
    cell_and_python: tuple[Cell, WarmPython], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> NoReturn:
        raise BuildError("no C compiler found")

    monkeypatch.setattr("hone.sandbox.python.build", refuse)
    async with Zygotes() as zygotes:
        python = await zygotes.warm(cell_and_python[0])
        assert (await python.run("print(6 * 7)")).stdout == "42\n"
        with pytest.raises(Unsupported, match="compiled"):
            await zygotes.warm(cell_and_python[0], ["decimal"])
        await python.close()


async def test_files_of_an_image_belong_to_the_cell(tmp_path: Path) -> None:
    (tmp_path / "image" / "private").mkdir(parents=True, mode=0o700)
    (tmp_path / "image" / "private" / "file").write_text("from the image")
    host = host_image()
    image = replace(ImageStore(tmp_path / "store").find(f"dir:{tmp_path}/image"), binds=host.binds, links=host.links)
    async with Cells() as cells:
        cell = await cells.create(SandboxSpec(), image)
        result = await cell.exec(
            ["sh", "-c", "cat /private/file && echo changed > /private/file && mkdir /private/sub"]
        )
        assert (result.stdout, result.stderr) == ("from the image", "")
        owner = Owner(cell.uid_base, cell.uid_base) if os.geteuid() == 0 else None
        with file_threads() as threads:
            files = Files(Tree(cell.root_descriptor, owner, "/work"), threads)
            assert await files.read("/private/file") == b"changed\n"
            await files.write("made/outside", b"1")
            assert (await cell.exec(["sh", "-c", "rm -r made/outside && ls made"])).is_success
            files.tree.close()
    assert (tmp_path / "image" / "private" / "file").read_text() == "from the image"


async def test_many_cells_are_warmed_up_at_once() -> None:
    async with Zygotes() as zygotes, Cells() as cells:

        async def play(number: int) -> str:
            cell = await cells.create(SandboxSpec(disk_mb=16))
            result = await (await zygotes.warm(cell)).run(f"print({number})")
            await cell.destroy()
            return result.stdout

        assert await asyncio.gather(*map(play, range(24))) == [f"{number}\n" for number in range(24)]


async def test_a_cell_can_end_when_its_zygote_is_gone_and_nobody_outside_reaps(cells: Cells) -> None:
    cell = await cells.create(SandboxSpec())  # this process adopts what outlives its parent, and does not wait for it
    async with Zygotes() as zygotes:
        python = await zygotes.warm(cell)
        session = await python.session()
    assert (await session.run("1 + 1")).text == "2\n"
    async with asyncio.timeout(5):
        await cell.destroy()


async def test_a_destroyed_cell_is_told(cell_and_python: tuple[Cell, WarmPython]) -> None:
    cell, python = cell_and_python
    session = await python.session()
    await cell.destroy()
    with pytest.raises(SandboxError):
        await python.run("1")
    with pytest.raises(SandboxError):
        await session.run("1")
