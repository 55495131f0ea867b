"""One cell: its programs, its agent at the other end of a socket, its limits and its end."""

import asyncio
import contextlib
import errno
import itertools
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from hone.sandbox.cells.cgroups import CellCgroup, Counters
from hone.sandbox.cells.forks import keep_from_forks
from hone.sandbox.cells.messages import MAX_DESCRIPTORS, Message, ask_for_sender, close_all, receive
from hone.sandbox.cells.plan import (
    CONFINING,
    Image,
    Operation,
    encode_operations,
)
from hone.sandbox.cells.programs import KILL_SECONDS, MAX_OUTPUT_BYTES, Ending, Process, Tally, ending_of
from hone.sandbox.cells.runtimes.known import features
from hone.sandbox.cells.runtimes.runtime import Feature, Launch
from hone.sandbox.cells.spawner import Born, Spawner
from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.files.beneath import FOLDER, PROC, closing, file_system, open_beneath
from hone.sandbox.readiness import until_ready
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec, SandboxUsage

CONNECT_SECONDS = 10.0
SAID_BYTES = 2000
REPORT = struct.Struct("=IIiiQQQ")
READY, FAILED, ENDED = 1, 2, 3


class Cell:
    """One sandbox. Nothing in it can name, see or signal anything outside.

    root_descriptor: its root folder, for reading and writing files beneath (never by a path without RESOLVE_IN_ROOT).
    files_folder: the working folder as seen from there. layer_descriptor: its writable layer, where it has one. uid_base:
    the outside's id of its root. operations: the steps of its plan. is_layer_held: whether others go on with its layer, and
    its cgroup, which counts that, is nobody's after it.
    """

    def __init__(
        self,
        name: str,
        spec: SandboxSpec,
        image: Image,
        uid_base: int,
        nothing: int,
        forget: Callable[["Cell"], Awaitable[None]],
    ) -> None:
        self.name = name
        self.spec = spec
        self.image = image
        self.uid_base = uid_base
        self.pid = 0
        self.root_descriptor = -1
        self.layer_descriptor = -1
        self.files_folder = image.working_folder
        self.program_flags = 0
        self.is_launched = spec.runtime != "cell"
        self.joins_cgroups = self.is_launched
        self.launch: Launch | None = None
        self.cgroup: CellCgroup | None = None
        self.cores: frozenset[int] = frozenset()
        self.spawner: Spawner | None = None
        self.is_layer_held = False
        self.has_run = False
        """Whether programs have run in it, or in a cell whose files it began with: what fails now may be their doing."""
        self.operations: tuple[Operation, ...] = ()
        self.tally = Tally()
        self._final: SandboxUsage | None = None
        self._nothing = nothing
        self._forget = forget
        keep_from_forks(self)
        self._control: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._has_called = False
        self._first_pid = 0
        self._pidfd = self._agent = self._disk = self._said = -1
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._failure: tuple[int, int] | None = None
        self._over: str | None = None
        self._loss_outcome = Outcome.AGENT_LOST
        self._programs: dict[int, Process] = {}
        self._num_owed = 0
        """How many programs were started of whose end the agent has not told: it cannot tell of more."""
        self._numbers = itertools.count(1)
        self._counters = Counters()
        self._hits: dict[Outcome, float] = {}
        self._is_paused = False
        self._destruction: asyncio.Task[None] | None = None

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_seconds: float = 60.0,
        kept_bytes: int = 64 << 10,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> ExecResult:
        """Run a program to its end. At the timeout it is killed with all that it started.

        kept_bytes: of each of stdout and stderr, half of it from the beginning and half from the end.
        max_output_bytes: a program that writes more to one of them is killed (`Outcome.OUTPUT_LIMIT`).
        Background processes of a program that ended by itself live on until the cell is destroyed.
        Raises `SandboxError` when the cell is or goes lost, `ValueError` for what cannot be asked.
        """
        started = time.perf_counter()
        program = Process(self, next(self._numbers), kept_bytes=kept_bytes, max_output_bytes=max_output_bytes)
        try:
            program.start(argv, env, cwd, has_stdin=bool(stdin))
            return await program.complete(stdin, timeout_seconds, started)
        finally:
            await program.close()

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        terminal: tuple[int, int] | None = None,
        stdin_descriptor: int | None = None,
    ) -> "Process":
        """Start a program to talk with; `Process.close` it.

        terminal: rows and columns of one for it to have. stdin_descriptor: instead of a pipe; the caller's to close.
        """
        if terminal is not None and Feature.TERMINAL not in features(self.spec.runtime):
            raise Unsupported(f"runtime {self.spec.runtime!r} has no terminals; start the program without one")
        program = Process(self, next(self._numbers))
        try:
            program.start(argv, env, cwd, has_stdin=True, terminal=terminal, stdin_descriptor=stdin_descriptor)
        except BaseException:  # a cancellation too: undo, then pass it on
            await program.close()
            raise
        return program

    async def listen_at(self, port: int, max_waiting: int) -> socket.socket:
        """A socket that listens at a port of its loopback, for us to accept what its programs connect.

        Made by the spawner: the cell never holds it. `Unsupported` for a cell without a network of its own.
        """
        return await self._socket(port, max_waiting)

    async def connect(self, port: int) -> socket.socket:
        """A connection to a port of its loopback, made as `listen_at` makes one. `OSError` where nobody listens."""
        try:
            return await self._connect(port, is_ipv6=False)
        except ConnectionRefusedError:  # some programs listen at ::1 only
            return await self._connect(port, is_ipv6=True)

    def confinement(self) -> bytes:
        """As on the wire, the steps of its plan that everything in it has taken."""
        return encode_operations([step for step in self.operations if step.code in CONFINING])

    @property
    def can_pause(self) -> bool:
        """Whether the kernel can stop all of it at once."""
        return self.cgroup is not None and self.cgroup.can_freeze

    @property
    def is_paused(self) -> bool:
        """Whether everything in it is stopped."""
        return self._is_paused

    def is_quiet(self) -> bool:
        """Whether nothing runs in it but its agent, so that nothing can write to its files but on our behalf."""
        if self._programs or self._is_paused:
            return False
        try:  # its own /proc names all that are in its namespace, whoever their parents are
            with closing(open_beneath(self.root_descriptor, "/proc", FOLDER)) as folder:
                with os.scandir(folder) as entries:
                    names = [entry.name for entry in entries if entry.name.isdigit()]
                return file_system(folder) == PROC and names == ["1"]
        except OSError:
            return False

    @property
    def process_descriptor(self) -> int:
        """A pidfd of its first process; still the cell's."""
        return self._pidfd

    async def pause(self) -> None:
        """Stop everything in it where it is, memory and all. `Unsupported` without cgroup v2."""
        await self._freeze(True)

    async def resume(self) -> None:
        """Let it go on."""
        await self._freeze(False)

    async def destroy(self) -> None:
        """Kill everything in it and let go of it; returns when it is gone. Harmless when repeated."""
        if self._destruction is None:
            self._destruction = asyncio.ensure_future(self._destroy())
        await asyncio.shield(self._destruction)

    def usage(self) -> SandboxUsage:
        """What it has used so far; after its end, in all."""
        return self._final or self._measure()

    def open(self) -> socket.socket:
        """Make the agent's control socket and return the agent's end; called once, by `Cells`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ask_for_sender(ours, is_asked=self.is_launched)
        self._control = ours
        self._loop.add_reader(ours.fileno(), self._receive)
        return theirs

    def listen(self) -> list[int]:
        """What another runtime's program writes its errors to; called once, by `Cells`."""
        if self.spec.runtime == "cell":
            return []
        self._said = os.memfd_create("said", os.MFD_CLOEXEC)
        return [self._said]

    def expect(self, listener: socket.socket) -> None:
        """The agent will connect there, and nobody else can; called once, by `Cells`."""
        ask_for_sender(listener, is_asked=True)  # which its connections inherit: the first message may be there at once
        self._listener = listener
        self._loop.add_reader(listener.fileno(), self._answer)

    def _answer(self) -> None:
        """The agent calls: from here on its connection is the control socket."""
        assert self._listener is not None
        try:
            called, _ = self._listener.accept()
        except OSError:
            return
        self._stop_listening()
        if self._control is None:
            called.close()
            return
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        called.setblocking(False)
        self._control, self._has_called = called, True
        self._loop.add_reader(called.fileno(), self._receive)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def adopt(self, born: Born, spawner: Spawner) -> None:
        """It has a first process; called once, by `Cells`."""
        self._first_pid = born.pid
        self.spawner = spawner
        if self.cgroup is not None:
            self._counters = self.cgroup.before
        self._pidfd = born.pidfd
        if self._agent < 0:  # otherwise the agent has been faster to say who it is
            self.pid = born.pid

    async def until_ready(self, operations: Sequence[Operation]) -> None:
        """Wait for the agent; called once, by `Cells`, with the plan's steps to name the one that failed."""
        try:
            await self._ready
            self._open_inner_files()
        except SandboxError as error:
            if self._failure is None:
                said = os.pread(self._said, SAID_BYTES, 0).decode(errors="replace").strip() if self._said >= 0 else ""
                if not said:
                    raise
                raise SandboxError(f"{self.name} cannot be made: {self.spec.runtime} says: {said}") from error
            step, number = self._failure
            what = str(operations[step]) if step < len(operations) else "the plan"
            raise SandboxError(f"{self.name} cannot be made: {what}: {os.strerror(number)}") from error

    def require_alive(self) -> None:
        """Raises why nothing can be asked of it any more, if so."""
        if self._control is None:
            raise self._loss()

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Ask the agent for something."""
        self.require_alive()
        assert self._control is not None
        try:
            socket.send_fds(self._control, [data], descriptors)
        except OSError as error:
            raise SandboxError(f"{self.name}: its agent does not listen ({error})") from error

    async def _connect(self, port: int, *, is_ipv6: bool) -> socket.socket:
        made = await self._socket(port, is_ipv6=is_ipv6)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await until_ready(made.fileno(), self._loop.add_writer, self._loop.remove_writer)
            if number := made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(number, os.strerror(number))
        except ConnectionRefusedError as error:
            made.close()
            raise ConnectionRefusedError(error.errno, f"nobody listens at port {port} of the sandbox") from None
        except TimeoutError as error:
            made.close()
            raise TimeoutError(errno.ETIMEDOUT, f"port {port} of the sandbox takes no connection") from error
        except BaseException:  # a cancellation too: undo, then pass it on
            made.close()
            raise
        return made

    async def _socket(self, port: int, max_waiting: int = 0, *, is_ipv6: bool = False) -> socket.socket:
        self.require_alive()
        assert self.spawner is not None
        if not 0 < port < 1 << 16:
            raise ValueError(f"port {port} is not between 1 and 65535")
        if Feature.PORTS not in features(self.spec.runtime):
            raise Unsupported(f"{self.name}: runtime {self.spec.runtime!r} has no allow-list and no ports; say 'cell'")
        if self.spec.network in ("off", "host"):
            raise Unsupported(f"{self.name} has no network of its own: network={self.spec.network!r}; use 'none'")
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await self.spawner.socket_in(self._pidfd, port, max_waiting=max_waiting, is_ipv6=is_ipv6)
        except TimeoutError as error:
            raise SandboxError(f"{self.name}: no socket within {CONNECT_SECONDS:g} s") from error
        except ProcessLookupError as error:
            raise SandboxError(f"{self.name}: its first process is gone") from error

    def _loss(self) -> SandboxError:
        return SandboxError(f"{self.name}: {self._over or 'it was never opened'}", self._loss_outcome)

    def register(self, identity: int, program: "Process") -> None:
        """A program is about to be started."""
        self.has_run = True
        self._programs[identity] = program
        self._num_owed += 1

    def unregister(self, identity: int) -> None:
        """Nobody waits for this program any more."""
        self._programs.pop(identity, None)

    @property
    def takes_cgroups(self) -> bool:
        """Whether its agent can have a program enter a cgroup."""
        return self.launch is None or self.launch.has_program_cgroups

    def abandon(self) -> None:
        """Its agent is silent about a program that was killed: it is of no use any more."""
        self._lose("a program in it does not die")

    def limits_hit_since(self, when: float) -> frozenset[Outcome]:
        """Which limits were hit after a moment of `time.perf_counter`, or after the last time somebody asked."""
        before, self._counters = self._counters, self.cgroup.counters() if self.cgroup else Counters()
        now = time.perf_counter()
        if self._counters.memory > before.memory:
            self._hits[Outcome.OUT_OF_MEMORY] = now
        if self._counters.processes > before.processes:
            self._hits[Outcome.PIDS_LIMIT] = now
        return frozenset(outcome for outcome, moment in self._hits.items() if moment > when)

    def is_disk_full(self) -> bool:
        """Whether there is no room for another file, or for more in one."""
        room = os.fstatvfs(self._disk if self._disk >= 0 else self.root_descriptor)
        return room.f_bavail == 0 or room.f_favail == 0

    def _receive(self) -> None:
        assert self._control is not None
        for _ in range(64):  # then others have their turn
            try:
                message = receive(self._control, REPORT.size + 1)
            except BlockingIOError:
                return
            except OSError:
                message = Message(b"", [])
            if len(message.data) != REPORT.size:
                close_all(message.descriptors)
                if message.data:
                    self._lose("its agent talks nonsense")
                else:
                    self._miss_agent()
                return
            self._hear(REPORT.unpack(message.data), message)
            if self._over is not None:
                return

    def _miss_agent(self) -> None:
        """The agent is gone. Where memory ran out under what runs, the kernel may take the agent for it, which is larger
        than some programs: then it is these that ran out of memory, and nobody's trouble but theirs.
        """
        began = min((program.began for program in self._programs.values()), default=time.perf_counter())
        if not self._ready.done() or Outcome.OUT_OF_MEMORY not in self.limits_hit_since(began):
            self._lose("its agent is gone")
            return
        for program in list(self._programs.values()):
            program.end(Ending(signal.SIGKILL, 0, 0.0, 0))
        self._lose("it ended when its programs had used up its memory", Outcome.OUT_OF_MEMORY)

    def _hear(self, report: tuple[int, ...], message: Message) -> None:
        kind, identity, status, error, *usage = report
        num_expected = range(1) if self._has_called else range(1, MAX_DESCRIPTORS + 1)
        if kind == READY and not self._ready.done() and len(message.descriptors) in num_expected:
            self._meet(message)
            return
        close_all(message.descriptors)
        if kind == FAILED:
            self._failure = (identity, error)
            self._lose("its first process failed")
        elif kind != ENDED or not self._num_owed or not self._hear_end(identity, status, error, usage):
            self._lose("its agent talks nonsense")

    def _hear_end(self, identity: int, status: int, error: int, usage: Sequence[int]) -> bool:
        self._num_owed -= 1
        ending = ending_of(status, error, usage)
        if ending is not None and (program := self._programs.get(identity)) is not None:
            program.end(ending)
        return ending is not None

    def _meet(self, message: Message) -> None:
        """The agent is there, with its root and, maybe, its writable layer."""
        assert self._control is not None
        try:
            if self.is_launched:
                ask_for_sender(self._control, is_asked=False)
                self._agent = os.pidfd_open(message.pid)
                self.pid = message.pid
                for kind, value in (self.launch.late_limits if self.launch is not None else {}).items():
                    resource.prlimit(self.pid, kind, (value, value))
            if message.descriptors:
                self._take_root(*message.descriptors)
        except OSError as error:
            self._lose(f"its agent is not to be found ({error})")
            return
        self._ready.set_result(None)

    def _open_inner_files(self) -> None:
        """Those that the sandbox's first process, which is ours, sees and this one does not."""
        if self.launch is not None and self.launch.inner_files is not None:
            path = f"/proc/{self._first_pid}/root{self.launch.inner_files}"
            self.root_descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self.files_folder = self.launch.files_folder or self.image.working_folder
            self._disk = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _take_root(self, root: int, layer: int = -1) -> None:
        self.root_descriptor, self.layer_descriptor = root, layer
        if self.launch is None or not self.is_launched:
            return
        if self.launch.files is not None:
            os.close(root)
            self.root_descriptor = os.open(self.launch.files, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.files_folder = self.launch.files_folder or self.image.working_folder
        self._disk = open_beneath(self.root_descriptor, self.files_folder, os.O_PATH | os.O_DIRECTORY)

    def _lose(self, reason: str, outcome: Outcome = Outcome.AGENT_LOST) -> None:
        """Whoever waits for something in here, and whoever comes later, learns the reason."""
        if self._over is not None:
            return
        self._over, self._loss_outcome = reason, outcome
        self._stop_listening()
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        if not self._ready.done():
            self._ready.set_exception(self._loss())
            self._ready.exception()  # nobody waits for it when the creation was cancelled
        for program in list(self._programs.values()):
            program.lose(self._loss())

    def _measure(self) -> SandboxUsage:
        cgroup, tally = self.cgroup, self.tally
        cpu_seconds = cgroup.cpu_seconds() if cgroup is not None else None
        memory = cgroup.memory_bytes() if cgroup is not None else None
        peak = cgroup.peak_memory_bytes() if cgroup is not None else None
        return SandboxUsage(
            cpu_seconds=tally.cpu_seconds if cpu_seconds is None else cpu_seconds,
            memory_bytes=memory,
            peak_memory_bytes=max(peak or 0, tally.peak_memory_bytes, memory or 0) or None,
            num_processes=cgroup.num_processes() if cgroup is not None else None,
            disk_bytes=self._disk_bytes(),
            output_bytes=tally.output_bytes,
        )

    def _disk_bytes(self) -> int:
        if self.root_descriptor < 0 or (self.launch is not None and self.launch.files is not None):
            return 0  # or on this machine's own disk, where nobody counts it
        room = os.fstatvfs(self._disk if self._disk >= 0 else self.root_descriptor)
        return (room.f_blocks - room.f_bfree) * room.f_frsize

    async def _destroy(self) -> None:
        self._lose("it is destroyed")
        if self.cgroup is not None and (self._pidfd < 0 or self._is_paused):
            self.cgroup.kill()
        try:
            await self._end_processes()
            self._final = msgspec.structs.replace(self._measure(), memory_bytes=0, num_processes=0)
            await self._forget(self)
        finally:
            self._close_descriptors()

    def close_in_child(self) -> None:
        """In a forked child: close all that is open of it."""
        for one in (self._control, self._listener):
            if one is not None:
                one.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        own = (self._pidfd, self._agent, self._disk, self._said, self.root_descriptor, self.layer_descriptor)
        self._pidfd = self._agent = self._disk = self._said = self.root_descriptor = self.layer_descriptor = -1
        close_all([descriptor for descriptor in own if descriptor >= 0])

    async def _end_processes(self) -> None:
        """The kernel ends an agent that is process 1 when all others in its namespace are gone; a guardian ends itself
        when nothing descends from it any more.
        """
        if self._agent >= 0:
            _send(self._agent, signal.SIGKILL)
        elif self._pidfd >= 0:
            _send(self._pidfd, signal.SIGTERM if self.is_launched else signal.SIGKILL)
        if self._pidfd >= 0:
            await _until_over(self._pidfd, self.name)

    async def _freeze(self, frozen: bool) -> None:
        if self.cgroup is None or not self.can_pause:
            raise Unsupported("a cell can be paused where there is cgroup v2 only")
        self.require_alive()
        self.cgroup.freeze(frozen)
        self._is_paused = True  # also while it is being resumed
        deadline = time.monotonic() + KILL_SECONDS
        while self.cgroup.is_frozen() != frozen:
            if time.monotonic() > deadline:
                raise SandboxError(f"{self.name} cannot be {'paused' if frozen else 'resumed'}")
            await asyncio.sleep(0.0002)
        self._is_paused = frozen


def _send(pidfd: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


async def _until_over(pidfd: int, name: str) -> None:
    """Wait for the end of a process."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(KILL_SECONDS):
            await until_ready(pidfd, loop.add_reader, loop.remove_reader)
    except TimeoutError as error:
        raise SandboxError(f"{name}: its first process does not die") from error
