"""What this process holds, to see whether rollouts leave something behind: tasks, threads, processes, files."""

import asyncio
import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LINGER_SECONDS = 2.0
"""What ends by itself within so long (a thread on its last line) is not left behind."""
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Holdings:
    """Counts of what is open now; files are those of the private temporary folder."""

    tasks: int
    threads: int
    processes: int
    descriptors: int
    temporary_files: int


NAMES = {
    "tasks": "asyncio tasks that still run",
    "threads": "threads",
    "processes": "child processes",
    "descriptors": "open files or sockets",
    "temporary_files": "temporary files",
}


def holdings() -> Holdings:
    """What this process holds now. Processes and descriptors are counted where /proc tells them."""
    return Holdings(
        tasks=len(asyncio.all_tasks()),
        threads=threading.active_count(),
        processes=_num_children(),
        descriptors=_num_descriptors(),
        temporary_files=sum(1 for _ in Path(tempfile.gettempdir()).iterdir()),
    )


async def growth_since(before: Holdings) -> list[str]:
    """What is held in addition, in words, after waiting for what is about to end."""
    deadline = asyncio.get_running_loop().time() + LINGER_SECONDS
    while found := _growth(before, holdings()):
        if asyncio.get_running_loop().time() >= deadline:
            return found
        await asyncio.sleep(POLL_SECONDS)  # threads and processes that end tell nobody
    return []


@contextlib.contextmanager
def private_temporary_folder() -> Iterator[None]:
    """Temporary files of this process and its children go to a folder of their own while the body runs."""
    variable, chosen = os.environ.get("TMPDIR"), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="hone-validate-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = chosen
            if variable is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = variable


def _growth(before: Holdings, now: Holdings) -> list[str]:
    more = {name: getattr(now, name) - getattr(before, name) for name in NAMES}
    return [f"{count} {NAMES[name]}" for name, count in more.items() if count > 0]


def _num_children() -> int:
    lists = Path("/proc/self/task").glob("*/children")
    count = 0
    for path in lists:
        with contextlib.suppress(OSError):  # the thread has just ended
            count += len(path.read_text().split())
    return count


def _num_descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0
