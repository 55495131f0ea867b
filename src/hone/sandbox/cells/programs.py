"""A program in a cell: its streams, its end, and what is made of them."""

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hone.sandbox.cells.cgroups import ProgramCgroup
from hone.sandbox.cells.forks import keep_from_forks
from hone.sandbox.errors import SandboxError
from hone.sandbox.readiness import until_ready
from hone.schema.sandboxes import ExecResult, Outcome, Usage

if TYPE_CHECKING:
    from hone.sandbox.cells.cell import Cell

KILL_SECONDS = 10.0
DRAIN_SECONDS = 0.2
MAX_OUTPUT_BYTES = 64 << 20
MAX_REQUEST_BYTES = 160 << 10
MAX_STRINGS = 32 << 10
MAX_ERROR_NUMBER = 4096
MAX_USAGE = 1 << 50
READ_BYTES = 1 << 16
REQUEST = struct.Struct("=IIIIII")
START, SIGNAL, KILL_TREE = 1, 2, 3
HAS_TERMINAL = 1
DEFAULT_ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}


class Channel(Protocol):
    """Who starts programs in a cell and says how they ended: its agent, or a warm Python in it."""

    @property
    def takes_cgroups(self) -> bool:
        """Whether it can have a program enter a cgroup, and nothing that ran in the cell gets hold of the descriptor:
        from a folder of cgroups there is a way to all other files of the machine.
        """

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Ask for something; raises `SandboxError`."""

    def register(self, identity: int, program: "Process") -> None:
        """A program is about to be started."""

    def unregister(self, identity: int) -> None:
        """Nobody waits for this program any more."""

    def abandon(self) -> None:
        """It does not say of a program that was killed that it ended: nobody is to wait for it any more."""


class Process:
    """A program in a cell, with its streams. It dies with the cell; background processes that it left do, too.

    channel: who starts it; by default the cell's agent.
    """

    def __init__(
        self,
        cell: "Cell",
        identity: int,
        *,
        kept_bytes: int = 0,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        channel: Channel | None = None,
    ) -> None:
        self._cell = cell
        self._channel: Channel = channel or cell
        self.began = time.perf_counter()
        self._identity = identity
        self._max_output_bytes = max_output_bytes
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ending] = self._loop.create_future()
        self._stdin = self._stdout = self._stderr = -1
        self._kept = (_Kept(kept_bytes // 2), _Kept(kept_bytes // 2))
        keep_from_forks(self)
        self._cgroup: ProgramCgroup | None = None
        self._outcome: Outcome | None = None
        self._is_started = False

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        cwd: str | None,
        *,
        has_stdin: bool,
        terminal: tuple[int, int] | None = None,
        stdin_descriptor: int | None = None,
    ) -> None:
        """Make its streams and let the agent start it; called once, by the cell."""
        self._cell.require_alive()
        request = self._request(argv, env, cwd, has_terminal=terminal is not None)
        theirs: list[int] = []
        try:
            if terminal is not None:
                stdio = self._open_terminal(theirs, terminal)
            else:
                stdio = self._open_pipes(theirs, has_stdin, stdin_descriptor)
            if self._cell.cgroup is not None and self._channel.takes_cgroups:
                self._cgroup = self._cell.cgroup.enter()
            if self._cgroup is not None:
                stdio.append(self._cgroup.open(joins=self._cell.joins_cgroups))
                theirs.append(stdio[-1])
            self._channel.register(self._identity, self)
            self._channel.send(request, stdio)
            self._is_started = True
        except OSError as error:
            raise SandboxError(f"{self._cell.name}: a program cannot be started: {error}") from error
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    async def write(self, data: bytes) -> None:
        """Give it input; returns when its pipe has taken all of it. `BrokenPipeError` if nobody reads."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                await until_ready(self._stdin, self._loop.add_writer, self._loop.remove_writer)

    def end_input(self) -> None:
        """It will read the end of its input; with a terminal, that takes a Control-D instead."""
        if self._stdin != self._stdout and self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        """The next piece of its stdout, or of what its terminal shows; empty at the end."""
        return await self._read(self._stdout, max_bytes)

    async def read_error(self, max_bytes: int = READ_BYTES) -> bytes:
        """The next piece of its stderr; empty at the end, and with a terminal."""
        return await self._read(self._stderr, max_bytes) if self._stderr >= 0 else b""

    async def wait(self) -> int:
        """Its exit code, minus the signal's number if one ended it, when it has ended."""
        return (await asyncio.shield(self._ended)).code

    def signal(self, number: int) -> None:
        """Send a signal to its process group."""
        if not self._ended.done():
            self._channel.send(REQUEST.pack(SIGNAL, self._identity, number, 0, 0, 0))

    def interrupt(self) -> None:
        """Send SIGINT to its process group."""
        self.signal(signal.SIGINT)

    def kill(self) -> None:
        """Kill it and all that it started."""
        if not self._is_started:
            return
        if self._cgroup is not None:
            self._cgroup.kill()
        if not self._ended.done() and (self._cgroup is None or self._cell.joins_cgroups):  # it may not be in there yet
            self._channel.send(REQUEST.pack(KILL_TREE, self._identity, 0, 0, 0, 0))

    def resize(self, rows: int, columns: int) -> None:
        """Tell it that its terminal has another size."""
        fcntl.ioctl(self._stdin, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def close(self) -> None:
        """Kill it if it runs, and let go of its streams."""
        try:
            if self._is_started and not self._ended.done():
                self.kill()
                async with asyncio.timeout(KILL_SECONDS):
                    await asyncio.shield(self._ended)
        except TimeoutError:
            self._channel.abandon()
            self._ended.result()  # raises where it is the cell that is lost
        except SandboxError:
            pass  # it is gone with its cell
        finally:
            self._let_go()

    async def complete(self, stdin: bytes, timeout_seconds: float, started: float) -> ExecResult:
        """Feed and read it until it ends or is late; what `Cell.exec` returns."""
        feeding = self._loop.create_task(self._feed(stdin)) if stdin else None
        outputs = [
            _Output(self._loop, descriptor, kept, self._cell.tally, self._overflow, self._max_output_bytes)
            for descriptor, kept in zip((self._stdout, self._stderr), self._kept, strict=True)
        ]
        late = self._loop.call_later(timeout_seconds, self._expire)
        try:
            ending = await asyncio.shield(self._ended)
            for output in outputs:
                output.take()
            if not all(output.is_over for output in outputs):  # something in the background holds them open
                await _first_of(outputs, DRAIN_SECONDS)
        finally:
            late.cancel()
            for output in outputs:
                output.close()
            if feeding is not None:
                feeding.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await feeding
        if ending.error:
            self._kept[1].add(f"{os.strerror(ending.error)}: the program could not be started\n".encode())
        usage = Usage(time.perf_counter() - started, ending.cpu_seconds, ending.peak_memory_bytes)
        stdout, stderr = (kept.text() for kept in self._kept)
        return ExecResult(self._own_outcome(ending, started), ending.code, stdout, stderr, usage)

    def end(self, ending: "Ending") -> None:
        """The agent says how it ended."""
        if not self._ended.done():
            self._cell.tally.add(ending)
            self._ended.set_result(ending)

    def lose(self, error: SandboxError) -> None:
        """The cell is gone, and with it the program."""
        if not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # nobody may be waiting for it

    def _request(
        self, argv: Sequence[str], env: Mapping[str, str] | None, cwd: str | None, *, has_terminal: bool
    ) -> bytes:
        if not argv or not argv[0]:
            raise ValueError("a program without a name; argv is empty")
        folder = os.path.join(self._cell.image.working_folder, cwd or "")  # noqa: PTH118 - a path of the cell's
        variables = {**DEFAULT_ENV, **self._cell.image.env, **self._cell.spec.env, **(env or {})}
        parts = [folder, *argv, *(f"{key}={value}" for key, value in variables.items())]
        strings = b"".join([part.encode(errors="surrogateescape") + b"\0" for part in parts])
        if strings.count(b"\0") != len(parts):
            raise ValueError("an argument, a variable or a folder has a zero byte")
        if len(strings) > MAX_REQUEST_BYTES or len(parts) > MAX_STRINGS:
            raise ValueError(f"arguments and environment of more than {MAX_REQUEST_BYTES} bytes; write them to a file")
        flags = self._cell.program_flags | (HAS_TERMINAL if has_terminal else 0)
        return REQUEST.pack(START, self._identity, flags, len(argv), len(variables), len(strings)) + strings

    def _open_pipes(self, theirs: list[int], has_stdin: bool, stdin_descriptor: int | None) -> list[int]:
        stdio = []
        if stdin_descriptor is not None:
            stdio.append(stdin_descriptor)
        elif has_stdin:
            read_end, self._stdin = _pipe(theirs, 0)
            stdio.append(read_end)
        else:
            stdio.append(self._cell._nothing)
        self._stdout, write_end = _pipe(theirs, 1)
        self._stderr, error_end = _pipe(theirs, 1)
        return [*stdio, write_end, error_end]

    def _open_terminal(self, theirs: list[int], size: tuple[int, int]) -> list[int]:
        ours, terminal = os.openpty()
        theirs.append(terminal)
        os.set_blocking(ours, False)
        self._stdin = self._stdout = ours
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        os.fchown(terminal, self._cell.uid_base, -1)
        return [terminal, terminal, terminal]

    async def _read(self, descriptor: int, max_bytes: int) -> bytes:
        while True:
            try:
                data = os.read(descriptor, max_bytes)
                self._cell.tally.output_bytes += len(data)
                return data
            except BlockingIOError:
                await until_ready(descriptor, self._loop.add_reader, self._loop.remove_reader)
            except OSError:  # how a terminal says that nobody is left on it
                return b""

    async def _feed(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it does not want all of its input
            await self.write(data)
        self.end_input()

    def _expire(self) -> None:
        if not self._ended.done():
            self._outcome = self._outcome or Outcome.TIMEOUT
            self._kill_or_lose()

    def _overflow(self) -> None:
        if not self._ended.done() and self._outcome is None:  # once: it writes on until it is dead
            self._outcome = Outcome.OUTPUT_LIMIT
            self._kill_or_lose()

    def _kill_or_lose(self) -> None:
        try:
            self.kill()
        except SandboxError as error:
            self.lose(error)
        self._loop.call_later(KILL_SECONDS, self._require_dead)

    def _require_dead(self) -> None:
        if not self._ended.done():
            self._channel.abandon()

    def _own_outcome(self, ending: "Ending", started: float) -> Outcome:
        """How it ended; one that failed when a limit was hit failed at that limit."""
        if self._outcome is not None:
            return self._outcome
        if ending.code == 0:
            return Outcome.EXITED
        hits = self._cell.limits_hit_since(started)
        memory_bytes = self._cell.spec.memory_mb << 20
        if Outcome.OUT_OF_MEMORY in hits or ending.peak_memory_bytes > 0.8 * memory_bytes:
            return Outcome.OUT_OF_MEMORY
        if Outcome.PIDS_LIMIT in hits or ending.error == errno.EAGAIN:
            return Outcome.PIDS_LIMIT
        if self._cell.is_disk_full():
            return Outcome.DISK_FULL
        return Outcome.SIGNALLED if ending.code < 0 else Outcome.EXITED

    def _let_go(self) -> None:
        self._channel.unregister(self._identity)
        if self._cgroup is not None:
            self._cgroup.leave()
            self._cgroup = None
        self._close_streams()

    def close_in_child(self) -> None:
        """As `Holder`."""
        self._close_streams()

    def _close_streams(self) -> None:
        descriptors = {self._stdin, self._stdout, self._stderr} - {-1}
        self._stdin = self._stdout = self._stderr = -1
        for descriptor in descriptors:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Ending:
    status: int
    error: int
    cpu_seconds: float
    peak_memory_bytes: int

    @property
    def code(self) -> int:
        return 126 if self.error else os.waitstatus_to_exitcode(self.status)


def ending_of(status: int, error: int, usage: Sequence[int]) -> Ending | None:
    """What an agent reports; None if it cannot be so. usage: microseconds for itself, in the kernel, and peak kilobytes."""
    has_ended = os.WIFEXITED(status) or os.WIFSIGNALED(status)
    if not has_ended or not 0 <= error < MAX_ERROR_NUMBER or max(usage) >= MAX_USAGE:
        return None
    user, system, peak = usage
    return Ending(status, error, (user + system) / 1e6, peak << 10)


@dataclass(slots=True)
class Tally:
    """What the programs of a cell that have ended used, and what was read from all of them."""

    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    output_bytes: int = 0

    def add(self, ending: Ending) -> None:
        """A program has ended."""
        self.cpu_seconds += ending.cpu_seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, ending.peak_memory_bytes)


class _Output:
    """Keeps what a program writes to one of its streams, as it comes."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        descriptor: int,
        kept: "_Kept",
        tally: Tally,
        overflow: Callable[[], None],
        max_bytes: int,
    ) -> None:
        self.is_over = False
        self.over: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._descriptor = descriptor
        self._kept = kept
        self._tally = tally
        self._overflow = overflow
        self._max_bytes = max_bytes
        loop.add_reader(descriptor, self._read)

    def take(self) -> None:
        """Take what is there; a program that has ended wrote all of its output before."""
        for _ in range(64):
            if self.is_over or not self._read():
                return

    def close(self) -> None:
        """Stop reading."""
        if not self.is_over:
            self.is_over = True
            self._loop.remove_reader(self._descriptor)
            self.over.cancel()

    def _read(self) -> bool:
        try:
            data = os.read(self._descriptor, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.is_over = True
            self._loop.remove_reader(self._descriptor)
            self.over.set_result(None)
            return False
        self._kept.add(data)
        self._tally.output_bytes += len(data)
        if self._kept.num_bytes > self._max_bytes:
            self._overflow()
        return True


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
        if len(data) > room:
            self._tail += data[room:]
            del self._tail[: max(0, len(self._tail) - self._part_bytes)]

    def text(self) -> str:
        missing = self.num_bytes - len(self._head) - len(self._tail)
        gap = f"\n[... {missing} bytes left out ...]\n".encode() if missing else b""
        return (self._head + gap + self._tail).decode(errors="replace")


def _pipe(theirs: list[int], their_end: int) -> tuple[int, int]:
    """A pipe whose one end goes to a program and whose other end is ours and does not block."""
    ends = os.pipe()
    theirs.append(ends[their_end])
    os.set_blocking(ends[1 - their_end], False)
    return ends


async def _first_of(outputs: Sequence[_Output], seconds: float) -> None:
    await asyncio.wait([output.over for output in outputs], timeout=seconds)
