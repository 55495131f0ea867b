"""Cells for tests, and the check that nothing of them is left afterwards."""

import asyncio
import contextlib
import ctypes
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.cgroups import PREFIX
from hone.sandbox.cells.host import look
from hone.sandbox.errors import Unsupported
from hone.schema.sandboxes import SandboxSpec

PR_SET_CHILD_SUBREAPER = 36
DYING_SECONDS = 20.0


@pytest.fixture(scope="session")
def adopts_orphans() -> Iterator[None]:
    """Whatever outlives its parent becomes a child of this process, and is seen."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture(params=["C", pytest.param("Python", marks=pytest.mark.slow)])
async def cells(request: pytest.FixtureRequest, adopts_orphans: None) -> AsyncIterator[Cells]:
    """By the programs in C and, in the slow run, by those in Python, which keep the same promises."""
    async with leaving_nothing(Cells(host=replace(look(), can_build=request.param == "C"))) as cells:
        yield cells


@pytest.fixture
def leaving_nothing_behind(adopts_orphans: None) -> Callable[[Cells], AbstractAsyncContextManager[Cells]]:
    return leaving_nothing


@contextlib.asynccontextmanager
async def leaving_nothing(cells: Cells) -> AsyncIterator[Cells]:
    """Skip where this machine has none; at the end, nothing is left of them."""
    before = leftovers()
    try:
        async with cells:
            yield cells
    except Unsupported as error:
        pytest.skip(str(error))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DYING_SECONDS):
            while leftovers() - before:
                await asyncio.sleep(0.01)
    assert leftovers() - before == set()


@pytest.fixture
async def cell(cells: Cells) -> Cell:
    return await cells.create(SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64))


def leftovers() -> set[str]:
    """This process's children, cgroups and folders."""
    children = set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            children |= set(path.read_text().split())
    own = f"{PREFIX}{os.getpid()}-"
    folders = {path for path, _, _ in os.walk("/sys/fs/cgroup") if Path(path).name.startswith(own)}
    folders |= {str(path) for path in Path(tempfile.gettempdir()).glob(f"{own}*")}
    return {pid for pid in children if not _is_over(pid)} | folders


def _is_over(pid: str) -> bool:
    """An orphan that this process was given when it had ended already: elsewhere the machine's first process gets it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
