"""A program as a local process in a process group of its own, ended with everything it started; the tail of its output."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 16 * 2**10
END_SECONDS = 2.0
"""So long a program has between the request to end and its end by force."""
DRAIN_SECONDS = 0.5
"""So long the last output may take to arrive."""
STDOUT, STDERR = 1, 2


@dataclass(slots=True)
class Output:
    """exit_code: negative for a signal, None before the end. stdout, stderr: the last 16 KiB of each."""

    exit_code: int | None = None
    stdout: str = ""
    stderr: str = ""


async def run_process(command: Sequence[str], folder: Path, variables: Mapping[str, str], output: Output) -> None:
    """Run `command` in `folder` with these environment variables and no others, until it exits.

    Cancelling ends it. `output` is filled in either case. `OSError` when it cannot be started.
    """
    loop = asyncio.get_running_loop()
    transport, watcher = await loop.subprocess_exec(
        _Watcher,
        *command,
        cwd=folder,
        env=dict(variables),
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        await watcher.exited.wait()
    finally:
        try:
            await _end(transport.get_pid(), watcher)
        finally:
            _signal_group(transport.get_pid(), signal.SIGKILL)
            transport.close()
            output.exit_code = transport.get_returncode()
            output.stdout, output.stderr = watcher.tail(STDOUT), watcher.tail(STDERR)


async def _end(group: int, watcher: "_Watcher") -> None:
    """Ask, then kill; children that outlive the program are killed with it."""
    if not watcher.exited.is_set():
        _signal_group(group, signal.SIGTERM)
        await _wait(watcher.exited, END_SECONDS)
    _signal_group(group, signal.SIGKILL)
    await _wait(watcher.exited, END_SECONDS)
    await _wait(watcher.closed, DRAIN_SECONDS)  # a process that left the group may hold the pipes open


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
        os.killpg(group, number)


class _Watcher(asyncio.SubprocessProtocol):
    """Keeps the tail of what is written. `exited` does not wait for pipes that a child holds open."""

    def __init__(self) -> None:
        self.exited = asyncio.Event()
        self.closed = asyncio.Event()
        self._tails = {STDOUT: bytearray(), STDERR: bytearray()}

    def tail(self, stream: int) -> str:
        return self._tails[stream].decode(errors="replace")

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        tail = self._tails[fd]
        tail += data
        del tail[:-TAIL_BYTES]

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
