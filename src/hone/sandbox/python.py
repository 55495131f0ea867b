"""Python in cells without its start: snippets in forks of a warm interpreter, and sessions that keep their variables."""

import asyncio
import contextlib
import errno
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hone.sandbox.cells.cell import ENDED, FAILED, READY, REPORT, Cell
from hone.sandbox.cells.host import Host, host_image, look
from hone.sandbox.cells.plan import Image
from hone.sandbox.cells.programs import DEFAULT_ENV, Ending, Process, ending_of
from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.native.build import BuildError, build
from hone.sandbox.readiness import until_ready
from hone.schema.sandboxes import ExecResult

GUEST = Path(__file__).parent / "guest"
START_SECONDS = 60.0
INTERRUPT_SECONDS = 2.0
ROOM_SECONDS = 10.0
LOOK_SECONDS = 0.01
MAX_ANSWER_BYTES = 1 << 20
MAX_CODE_BYTES = 64 << 20
ORDER = struct.Struct("=III")  # of native/warm.c


def session_program() -> str:
    """The code of a session that needs no node: what `Session` of guest/warm.py takes and gives, on stdin and stdout."""
    return f"{_warm('warm')}\nmodule['serve_alone']()"


def _warm(name: str) -> str:
    """Code that runs guest/warm.py as a module of this name, in a file of its own: its frames are not a snippet's."""
    source = (GUEST / "warm.py").read_text()
    return f"module = {{'__name__': {name!r}}}\nexec(compile({source!r}, '<warm>', 'exec'), module)"


class Zygotes:
    """Warms Python up for cells; an async context manager, to be left after that of the cells.

    A cell whose image has this machine's Python gets a fork of a zygote: a process per set of preloads, outside of all
    cells, which has imported them. In a cell with another image its own `python3` is started with the first call.

    What all forks of a zygote share, and a fresh interpreter would draw anew: the layout of memory, and the seed of
    hashes. `random` and numpy are seeded anew in every fork.

    host: what the cells were told about the machine, by default how it is.
    """

    def __init__(self, *, host: Host | None = None) -> None:
        known = host or look()
        self._has_ranges = known.has_id_ranges
        self._can_build = known.can_build
        self._zygotes: dict[tuple[str, ...], _Zygote] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for zygote in self._zygotes.values():
            await zygote.close()

    @property
    def count(self) -> int:
        """Zygotes that are there."""
        return sum(not zygote.is_lost for zygote in self._zygotes.values())

    async def warm(self, cell: Cell, preloads: Sequence[str] = ()) -> "WarmPython":
        """The Python of a cell. preloads: modules that its snippets find imported, where the image is the machine's.

        The first call for a set of preloads waits for their import; `prepare` does that ahead of time. Importing runs
        these modules outside of any cell: name only what is trusted. Raises `SandboxError`.
        """
        if cell.spec.runtime != "cell" or not self._can_build or not _has_this_python(cell.image):
            return WarmPython(cell, None)
        try:
            return WarmPython(cell, await self.prepare(preloads))
        except Unsupported:  # its library cannot be compiled here; the cell's own Python needs none
            if preloads:
                raise
            return WarmPython(cell, None)

    async def prepare(self, preloads: Sequence[str] = ()) -> "_Zygote":
        """Have the zygote of these preloads ready."""
        key = tuple(sorted(preloads))
        if key not in self._zygotes or self._zygotes[key].is_lost:
            self._zygotes[key] = _Zygote(key, self._has_ranges)
        await self._zygotes[key].until_ready()
        return self._zygotes[key]


class WarmPython:
    """The warm Python of one cell: a process in it that runs nothing itself and forks for each snippet and session.

    Programs in the cell may kill or stop it, as they may one another. Then what was running ends as killed, and the next
    call warms another one up.
    """

    def __init__(self, cell: Cell, zygote: "_Zygote | None") -> None:
        self._cell = cell
        self._zygote = zygote
        self._line: _Line | None = None
        self._turn = asyncio.Lock()
        self._numbers = itertools.count(1)

    async def run(
        self,
        code: str,
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_seconds: float = 60.0,
        kept_bytes: int = 64 << 10,
    ) -> ExecResult:
        """What `python -c CODE` does, in a fork. As `Cell.exec`."""
        started = time.perf_counter()
        line = await self._ready()
        program = Process(self._cell, next(self._numbers), kept_bytes=kept_bytes, channel=line)
        try:
            program.start(["snippet", code], env, cwd, has_stdin=bool(stdin))
            return await program.complete(stdin, timeout_seconds, started)
        finally:
            await program.close()

    async def spawn(self, code: str, *, env: Mapping[str, str] | None = None, cwd: str | None = None) -> Process:
        """What `python -c CODE` does, in a fork, to talk with; `Process.close` it."""
        program = Process(self._cell, next(self._numbers), channel=await self._ready())
        try:
            program.start(["snippet", code], env, cwd, has_stdin=True)
        except BaseException:  # a cancellation too: undo, then pass it on
            await program.close()
            raise
        return program

    async def session(self, *, env: Mapping[str, str] | None = None, cwd: str | None = None) -> "PythonSession":
        """A session of its own; `PythonSession.close` it. It ends with the cell.

        One that the cell's programs keep from beginning, by being as many as may be, is over from the beginning.
        """
        return await self._begin(["session"], env, cwd)

    async def fork(self, session: "PythonSession") -> "PythonSession":
        """As `PythonSession.fork`."""
        return await self._begin(["fork", str(session.identity)], None, None)

    async def close(self) -> None:
        """End it. Snippets and sessions end with it."""
        if self._line is not None:
            await self._line.close()
            self._line = None

    async def _begin(self, argv: list[str], env: Mapping[str, str] | None, cwd: str | None) -> "PythonSession":
        line = await self._ready()
        identity = next(self._numbers)
        program = Process(self._cell, identity, channel=line)
        session = PythonSession(self, program, identity)
        try:
            program.start(argv, env, cwd, has_stdin=True)
            await session.greet()
        except BaseException:  # a cancellation too: undo, then pass it on
            await program.close()
            raise
        return session

    async def _ready(self) -> "_Line":
        async with self._turn:
            while True:
                self._cell.require_alive()
                if self._line is None or self._line.is_lost:
                    if self._line is not None:
                        await self._line.close()
                    self._line = _Line(self._cell, self._zygote)
                    await self._line.open()
                if await self._line.has_room():
                    return self._line


@dataclass(frozen=True, slots=True)
class Answer:
    """What a snippet of a session did.

    text: what it and its children printed, the value of its last line if that is an expression, and its traceback; of
    long ones head and tail. is_fine: it raised nothing. is_late: it was interrupted at its timeout. is_over: its process
    is gone, and with it the session.
    """

    text: str
    is_fine: bool
    is_late: bool = False
    is_over: bool = False


class PythonSession:
    """Snippets that run one after another in one process: what one defines, the next one finds."""

    def __init__(self, python: WarmPython, program: Process, identity: int) -> None:
        self.identity = identity
        self._python = python
        self._program = program
        self._turn = asyncio.Lock()
        self._read = bytearray()
        self._is_over = False
        self._reason = ""

    @property
    def is_over(self) -> bool:
        """Whether its process is gone."""
        return self._is_over

    async def greet(self) -> None:
        """Wait until it is there; called once, by `WarmPython`."""
        try:
            async with asyncio.timeout(START_SECONDS):
                if await self._first_word() is None:
                    code = (
                        await self._program.wait()
                    )  # raises where it is not the programs of the cell that are to blame
                    self._fail(f"exit code {code}")
        except TimeoutError as error:
            if not self._python._cell.has_run:
                raise SandboxError(f"a session of Python is not there within {START_SECONDS:g} s") from error
            self._fail(f"none within {START_SECONDS:g} s")
            await self._program.close()
        except ValueError as error:  # in the place of the session something else speaks
            self._fail(str(error))
            await self._program.close()

    async def run(self, code: str, timeout_seconds: float = 60.0) -> Answer:
        """Run a snippet. One that is late is interrupted, and killed with its session if it does not heed that.

        Raises `SandboxError` for trouble that is not the snippet's, `ValueError` for more code than 64 MB.
        """
        data = code.encode("utf-8", "surrogatepass")
        if len(data) > MAX_CODE_BYTES:
            raise ValueError(f"{len(data)} bytes of code in one snippet; write them to a file")
        async with self._turn:
            if self._is_over:
                return Answer(self._reason, is_fine=False, is_over=True)
            try:
                return await self._exchange(len(data).to_bytes(4, "big") + data, timeout_seconds)
            except BaseException:  # a cancellation too: undo, then pass it on
                await self._end()
                raise

    async def fork(self) -> "PythonSession":
        """Another session that begins with everything this one has in memory; both go on apart, in the same cell.

        Threads of the session's programs are not in the other one. Waits for the snippet under way.
        """
        async with self._turn:
            if self._is_over:
                raise SandboxError("a session that is over cannot be forked")
            return await self._python.fork(self)

    async def close(self) -> None:
        """End it, and what it started."""
        async with self._turn:
            await self._end()

    async def _first_word(self) -> bytes | None:
        """Its first message; None when it ended before, whoever holds its streams open."""
        reading, ending = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._program.wait())
        try:
            await asyncio.wait((reading, ending), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else None
        finally:
            for one in (reading, ending):
                one.cancel()
            await asyncio.gather(reading, ending, return_exceptions=True)

    async def _exchange(self, message: bytes, timeout_seconds: float) -> Answer:
        is_late = False
        try:
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._program.write(message)
                    answer = await self._receive()
            except TimeoutError:
                is_late = True
                self._program.interrupt()
                async with asyncio.timeout(INTERRUPT_SECONDS):
                    answer = await self._receive()
        except (TimeoutError, BrokenPipeError, ValueError):
            answer = None
        if answer is None:
            await self._end()
            self._python._cell.require_alive()  # or it is the cell that is gone
            return Answer("", is_fine=False, is_late=is_late, is_over=True)
        return Answer(answer[1:].decode(errors="replace"), is_fine=answer[:1] == b"o", is_late=is_late)

    async def _receive(self) -> bytes | None:
        """The next message; None at the end of the stream, `ValueError` when it is no answer of a session's."""
        while len(self._read) < 4 or len(self._read) < 4 + int.from_bytes(self._read[:4], "big"):
            if int.from_bytes(self._read[:4], "big") > MAX_ANSWER_BYTES:
                raise ValueError("the session answers with more than it may")
            data = await self._program.read()
            if not data:
                return None
            self._read += data
        size = 4 + int.from_bytes(self._read[:4], "big")
        message = bytes(self._read[4:size])
        del self._read[:size]
        return message

    def _fail(self, why: str) -> None:
        self._is_over = True
        self._reason = f"no session of Python can begin beside what runs in the sandbox ({why})\n"

    async def _end(self) -> None:
        self._is_over = True
        await self._program.close()


class _Line:
    """The socket to a warm Python: starts programs there and hears how they end.

    Without a zygote the other end is the cell's own Python, which may be whatever programs in the cell made of it.
    """

    def __init__(self, cell: Cell, zygote: "_Zygote | None") -> None:
        self._cell = cell
        self._zygote = zygote
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._programs: dict[int, Process] = {}
        self._num_owed = 0
        self._server: Process | None = None
        self._is_ready = False

    @property
    def is_lost(self) -> bool:
        """Whether nobody listens any more."""
        return self._socket is None

    @property
    def takes_cgroups(self) -> bool:
        """Whether a fork of a zygote listens, which runs nothing; one starts programs in cgroups by their folders only."""
        return self._zygote is not None and not self._cell.joins_cgroups

    async def open(self) -> None:
        """Have a warm Python at the other end. It need not be there yet: what is sent waits for it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        self._loop.add_reader(ours.fileno(), self._receive)
        try:
            if self._zygote is not None:
                await self._zygote.enter(self._cell, theirs.fileno())
            else:
                command, ran_before = ["python3", "-I", "-c", _warm("__main__")], self._cell.has_run
                self._server = await self._cell.spawn(command, stdin_descriptor=theirs.fileno())
                self._cell.has_run = ran_before  # this one does what it was told to
        finally:
            theirs.close()

    async def has_room(self) -> bool:
        """Whether it can be asked for something; one that has not listened for long is abandoned."""
        deadline = self._loop.time() + ROOM_SECONDS
        while self._socket is not None and not _is_writable(self._socket):
            if self._loop.time() > deadline:
                self.abandon()
            else:
                await asyncio.sleep(LOOK_SECONDS)
        return self._socket is not None

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Ask the warm Python for something."""
        if self._socket is None:
            return  # whoever waits for an end of something has heard of it
        try:
            socket.send_fds(self._socket, [data], descriptors)
        except (BrokenPipeError, ConnectionResetError):
            self._lose(None)
        except BlockingIOError:  # whoever waits in vain for what comes of it abandons this line
            return
        except OSError as error:
            raise SandboxError(f"{self._cell.name}: its Python does not listen ({error})") from error

    def register(self, identity: int, program: Process) -> None:
        """A program is about to be started."""
        self._programs[identity] = program
        self._num_owed += 1

    def unregister(self, identity: int) -> None:
        """Nobody waits for this program any more."""
        self._programs.pop(identity, None)

    def abandon(self) -> None:
        """Hang up; the warm Python ends then, unless it was stopped, and its children are ended here."""
        for program in [*self._programs.values(), *([self._server] if self._server is not None else [])]:
            with contextlib.suppress(SandboxError):
                program.kill()
        self._lose(None)

    async def close(self) -> None:
        """Hang up and end what is there."""
        self.abandon()
        if self._server is not None:
            await self._server.close()

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            message = self._socket.recv(REPORT.size)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if len(message) != REPORT.size:
            self._lose(None if self._is_programs_doing() else f"{self._cell.name}: Python does not start in it")
            return
        kind, identity, status, error, *usage = REPORT.unpack(message)
        if kind == READY and not self._is_ready:
            self._is_ready = self._cell.has_run = True
        elif kind == FAILED and not self._is_ready:
            self._fail(error)
        elif kind == ENDED and self._num_owed and (ending := ending_of(status, error, usage)) is not None:
            self._num_owed -= 1
            if (program := self._programs.get(identity)) is not None:
                program.end(ending)
        else:  # somebody else speaks in its place
            self._lose(None)

    def _is_programs_doing(self) -> bool:
        """Whether programs of the cell may be why no warm Python is at the other end: some have run, with all they could
        kill, take up or remove, and the zygote is well.
        """
        return self._cell.has_run and not (self._zygote is not None and self._zygote.is_lost)

    def _fail(self, error: int) -> None:
        """A zygote's fork has not come into the cell; with EAGAIN there are as many processes as may be."""
        if error != errno.EAGAIN and not self._is_programs_doing():
            self._lose(f"{self._cell.name}: Python cannot enter it: {os.strerror(error)}")
            return
        for waiting in list(self._programs.values()):
            waiting.end(Ending(0, error, 0.0, 0))
        self._lose(None)

    def _lose(self, problem: str | None) -> None:
        """Nobody is at the other end. Without a problem of ours it was a program's doing: what ran was killed."""
        if self._socket is None:
            return
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        for program in list(self._programs.values()):
            if problem is not None:
                program.lose(SandboxError(problem))
            else:
                program.end(Ending(signal.SIGKILL, 0, 0.0, 0))


class _Zygote:
    """One zygote process."""

    def __init__(self, preloads: tuple[str, ...], has_ranges: bool) -> None:
        self._preloads = preloads
        self._has_ranges = has_ranges
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._sending = asyncio.Lock()
        self._ready = asyncio.get_running_loop().create_task(self._start())

    @property
    def is_lost(self) -> bool:
        """Whether it is dead, or never came to life."""
        return self._ready.done() and (self._process is None or self._process.poll() is not None)

    async def until_ready(self) -> None:
        """Wait until it has imported everything; `SandboxError` if it cannot."""
        await asyncio.shield(self._ready)

    async def enter(self, cell: Cell, control: int) -> None:
        """Have it fork itself into a cell, to listen on `control`; what comes of it, the other end of that hears."""
        assert cell.cgroup is not None
        assert self._socket is not None
        with cell.cgroup.entrances() as (unified, tasks):
            descriptors = [cell.process_descriptor, control, *([unified] if unified is not None else []), *tasks]
            order = ORDER.pack(self._has_ranges, unified is not None, len(tasks)) + cell.confinement()
            try:
                await self._send(order, descriptors)
            except OSError as error:
                raise SandboxError(f"{cell.name}: the zygote does not listen ({error})") from error

    async def _send(self, order: bytes, descriptors: Sequence[int]) -> None:
        """In a burst of cells it is slower than those who ask."""
        loop = asyncio.get_running_loop()
        async with self._sending:
            while self._socket is not None:
                try:
                    socket.send_fds(self._socket, [order], descriptors)
                    return
                except BlockingIOError:
                    await until_ready(self._socket.fileno(), loop.add_writer, loop.remove_writer)

    async def close(self) -> None:
        """End it. What it forked into cells lives on."""
        self._ready.cancel()
        await asyncio.wait([self._ready])
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def _start(self) -> None:
        try:
            library = (await asyncio.to_thread(build)).warm
        except BuildError as error:
            raise Unsupported(f"a warm Python needs its library compiled once: {error}") from error
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        with theirs:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a vfork; all waiting is done elsewhere
                [sys.executable, "-I", str(GUEST / "zygote.py"), str(theirs.fileno()), str(library), *self._preloads],
                pass_fds=[theirs.fileno()],
                env={**DEFAULT_ENV, **host_image().env},  # what most programs want: they need not set it again
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(START_SECONDS):
                heard = await asyncio.get_running_loop().sock_recv(ours, 16)
        except (TimeoutError, OSError):
            heard = b""
        if heard != b"ready":
            self._process.kill()
            wanted = f"with {', '.join(self._preloads)}" if self._preloads else "without preloads"
            raise SandboxError(f"a Python {wanted} does not start; see whether {sys.executable} can import them")


def _is_writable(control: socket.socket) -> bool:
    poll = select.poll()
    poll.register(control, select.POLLOUT)
    return bool(poll.poll(0))


def _has_this_python(image: Image) -> bool:
    """Whether the interpreter and library of this process are in an image, where they are here."""
    wanted = {Path(sys.base_prefix), Path(sys.prefix), Path(sys.executable).resolve()}
    folders = [Path(bind.source) for bind in image.binds if bind.source == bind.target]
    return all(any(path.is_relative_to(folder) for folder in folders) for path in wanted)
