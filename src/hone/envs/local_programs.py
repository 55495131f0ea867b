"""One program of a local sandbox: its pipes, its end, and what is kept of its output."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hone.envs.failures import RolloutFailure, deadline
from hone.schema.sandboxes import ExecResult, Outcome, Usage
from hone.schema.traces import FailureClass

KILL_SECONDS = 10.0
DRAIN_SECONDS = 0.2
MAX_OUTPUT_BYTES = 64 << 20


class Guardian(Protocol):
    """Who starts and ends programs."""

    def send(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Ask for something; what becomes of the program comes to the program."""

    def forget(self, identity: int) -> None:
        """Nobody waits for this program any more."""


class LocalProcess:
    """A `Process` of a `LocalSandbox`, and the inside of its `exec`."""

    def __init__(self, guardian: Guardian, identity: int, memory_bytes: int, *, with_stderr: bool) -> None:
        self._guardian = guardian
        self._memory_bytes = memory_bytes
        self._identity = identity
        self._with_stderr = with_stderr
        self._ended: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._stdin = self._stdout = self._stderr = -1
        self._outcome: Outcome | None = None

    def open(self, request: dict[str, Any]) -> None:
        """Make the pipes and let the guardian start the program; called once, by the sandbox."""
        theirs: list[int] = []
        try:
            read_end, self._stdin = _pipe(theirs, 0)
            self._stdout, write_end = _pipe(theirs, 1)
            if self._with_stderr:
                self._stderr, error_end = _pipe(theirs, 1)
            else:
                error_end = os.open(os.devnull, os.O_WRONLY)
                theirs.append(error_end)
            self._guardian.send({"start": self._identity, **request}, [read_end, write_end, error_end])
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    async def write(self, data: bytes) -> None:
        """As `Process.write`."""
        loop = asyncio.get_running_loop()
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                await _until_ready(self._stdin, loop.add_writer, loop.remove_writer)

    async def read(self) -> bytes:
        """As `Process.read`."""
        return await _read_some(self._stdout)

    def interrupt(self) -> None:
        """As `Process.interrupt`."""
        if not self._ended.done():
            self._guardian.send({"signal": self._identity, "kill": False})

    def kill(self) -> None:
        """As `Process.kill`."""
        if not self._ended.done():
            self._guardian.send({"signal": self._identity, "kill": True})

    async def close(self) -> None:
        """As `Process.close`."""
        try:
            if not self._ended.done():
                self.kill()
                async with deadline(KILL_SECONDS):
                    await asyncio.shield(self._ended)
        except TimeoutError as error:
            raise sandbox_failure("kill", f"the program does not die ({error})") from error
        finally:
            self.let_go()

    async def complete(self, stdin: bytes, timeout_seconds: float, kept_bytes: int, started: float) -> ExecResult:
        """Feed and read the program until it ends or is late; what the sandbox's `exec` returns."""
        stdout, stderr = _Kept(kept_bytes // 2), _Kept(kept_bytes // 2)
        pumps = [
            asyncio.ensure_future(pump)
            for pump in (self._feed(stdin), self._keep(self._stdout, stdout), self._keep(self._stderr, stderr))
        ]
        try:
            ending = await self._ending(timeout_seconds)
            await asyncio.wait(pumps, timeout=DRAIN_SECONDS)  # something in the background may hold the pipes open
        finally:
            await _cancel(pumps)
        stdout.take(self._stdout)
        stderr.take(self._stderr)
        wall_seconds = time.perf_counter() - started
        usage = Usage(wall_seconds, ending["cpu_seconds"], ending["peak_memory_bytes"])
        code = -9 if ending["status"] is None else os.waitstatus_to_exitcode(ending["status"])
        outcome = self._outcome or _own_outcome(code, usage, self._memory_bytes)
        return ExecResult(outcome, code, stdout.text(), stderr.text(), usage)

    def end(self, ending: dict[str, Any]) -> None:
        """The guardian says how the program ended."""
        if not self._ended.done():
            self._ended.set_result(ending)

    def lose(self, failure: RolloutFailure) -> None:
        """The sandbox is gone, and with it the program."""
        if not self._ended.done():
            self._ended.set_exception(failure)
            self._ended.exception()  # nobody may be waiting for it

    def let_go(self) -> None:
        """Close the pipes."""
        self._guardian.forget(self._identity)
        self._close_pipes()

    def __del__(self) -> None:  # of a process that its owner forgot to close when the sandbox went
        self._close_pipes()

    def _close_pipes(self) -> None:
        for descriptor in {self._stdin, self._stdout, self._stderr} - {-1}:
            os.close(descriptor)
        self._stdin = self._stdout = self._stderr = -1

    async def _ending(self, timeout_seconds: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(self._ended)
        except TimeoutError:
            if self._ended.done():  # in time; it is this event loop that was late
                return self._ended.result()
            self._outcome = self._outcome or Outcome.TIMEOUT
            self.kill()
        try:
            async with deadline(KILL_SECONDS):
                return await asyncio.shield(self._ended)
        except TimeoutError as error:
            raise sandbox_failure("kill", f"the program does not die ({error})") from error

    async def _feed(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it does not want all of its input
            await self.write(data)
        descriptor, self._stdin = self._stdin, -1
        os.close(descriptor)

    async def _keep(self, descriptor: int, kept: "_Kept") -> None:
        while data := await _read_some(descriptor):
            kept.add(data)
            if kept.num_bytes > MAX_OUTPUT_BYTES and self._outcome is None:
                self._outcome = Outcome.OUTPUT_LIMIT
                self.kill()
            await asyncio.sleep(0)  # a program that writes without a pause may not stop the others


class _Kept:
    """Head and tail of a stream, so many bytes of each."""

    def __init__(self, part_bytes: int) -> None:
        self.num_bytes = 0
        self._part_bytes = part_bytes
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        self.num_bytes += len(data)
        room = self._part_bytes - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        del self._tail[: max(0, len(self._tail) - self._part_bytes)]

    def take(self, descriptor: int) -> None:
        """Add what waits in a pipe; a program that has ended wrote all of its output before."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                self.add(os.read(descriptor, 64 << 10))

    def text(self) -> str:
        missing = self.num_bytes - len(self._head) - len(self._tail)
        gap = f"\n[... {missing} bytes left out ...]\n".encode() if missing else b""
        return (self._head + gap + self._tail).decode(errors="replace")


def _own_outcome(code: int, usage: Usage, memory_bytes: int) -> Outcome:
    """How a program ended that nobody killed. One that fails close to its limit of memory has hit it."""
    if code != 0 and usage.peak_memory_bytes > 0.8 * memory_bytes:
        return Outcome.OUT_OF_MEMORY
    return Outcome.SIGNALLED if code < 0 else Outcome.EXITED


def sandbox_failure(where: str, message: str) -> RolloutFailure:
    """Trouble that is nobody's answer."""
    return RolloutFailure(FailureClass.SANDBOX, where, message)


def _pipe(theirs: list[int], their_end: int) -> tuple[int, int]:
    """A pipe whose one end goes to a program and whose other end is ours and does not block."""
    ends = os.pipe()
    theirs.append(ends[their_end])
    os.set_blocking(ends[1 - their_end], False)
    return ends


async def _read_some(descriptor: int) -> bytes:
    loop = asyncio.get_running_loop()
    while True:
        try:
            return os.read(descriptor, 64 << 10)
        except BlockingIOError:
            await _until_ready(descriptor, loop.add_reader, loop.remove_reader)


async def _until_ready(descriptor: int, watch: Callable[..., None], unwatch: Callable[[int], bool]) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    watch(descriptor, _settle, ready)
    try:
        await ready
    finally:
        unwatch(descriptor)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def _cancel(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
