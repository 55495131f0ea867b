"""Cells: sandboxes of this machine made by the kernel's own means, each a small tree of processes below an agent."""

import asyncio
import contextlib
import errno
import fcntl
import itertools
import math
import os
import random
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self

from hone.sandbox.cgroups import CellCgroup, Cgroups, Counters, ProgramCgroup, sweep
from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.host import LANDLOCK_ABSTRACT_SOCKETS, MIN_KERNEL, Host, host_image, look
from hone.sandbox.native.build import build
from hone.sandbox.plan import (
    CONFINING,
    SPAWN,
    Bind,
    Grants,
    Image,
    Operation,
    Plan,
    encode_operations,
    id_maps,
    plan_cell,
    plan_spawner,
)
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec, Usage

CREATE_SECONDS = 30.0
KILL_SECONDS = 10.0
DRAIN_SECONDS = 0.2
MAX_OUTPUT_BYTES = 64 << 20
MAX_REQUEST_BYTES = 160 << 10
MAX_STRINGS = 32 << 10
NUM_IDS = 1 << 16
FIRST_ID, LAST_ID = 1 << 20, 1 << 31
READ_BYTES = 1 << 16
MAX_PLANS = 256

SPAWNED = struct.Struct("=Qii")
REQUEST = struct.Struct("=IIIIII")
REPORT = struct.Struct("=IIiiQQQ")
START, SIGNAL, KILL_TREE = 1, 2, 3
READY, FAILED, ENDED = 1, 2, 3
HAS_TERMINAL = 1


class Cells:
    """Makes cells; an async context manager. Leaving it destroys all of its cells; so does the death of this process.

    Example::

        async with Cells() as cells:
            cell = await cells.create(SandboxSpec(memory_mb=256))
            result = await cell.exec(["python3", "-c", "print(6 * 7)"])
            await cell.destroy()

    is_weak_allowed: whether to go on where this machine cannot filter system calls. host: facts about the machine, by
    default as they are.
    """

    def __init__(self, *, host: Host | None = None, is_weak_allowed: bool = False) -> None:
        self.host = host or look()
        self._is_weak_allowed = is_weak_allowed
        self._cgroups: Cgroups | None = None
        self._spawners: dict[bool, _Spawner] = {}
        self._cells: set[Cell] = set()
        self._numbers = itertools.count(1)
        self._ids: set[int] = set()
        self._plans: dict[tuple[object, ...], _KnownPlan] = {}
        self._nothing = -1

    async def __aenter__(self) -> Self:
        self._require()
        self._nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        sweep(self.host.cgroups)
        self._cgroups = Cgroups(self.host.cgroups)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await asyncio.gather(*(cell.destroy() for cell in list(self._cells)))
        finally:
            for spawner in self._spawners.values():
                await spawner.close()
            if self._cgroups is not None:
                self._cgroups.close()
            os.close(self._nothing)

    async def create(self, spec: SandboxSpec, image: Image | None = None, *, binds: Sequence[Bind] = ()) -> "Cell":
        """A cell that is ready. image: by default the host's programs. binds: more of the host for it to see.

        Raises `SandboxError`; a cancelled creation leaves nothing behind.
        """
        if self._cgroups is None:
            raise RuntimeError("Cells is an async context manager: use `async with`")
        if image is None:
            if spec.image != "python":
                raise Unsupported(f"image {spec.image!r} needs an image store; cells alone know the host's, 'python'")
            image = host_image()
        number = next(self._numbers)
        cgroup = self._cgroups.take(spec)
        uid = cgroup.uid if cgroup is not None else self._take_ids()
        cell = Cell(f"cell-{number}", spec, image, uid, self._nothing, self._forget)
        cell.cgroup = cgroup
        self._cells.add(cell)
        try:
            async with asyncio.timeout(CREATE_SECONDS):
                cell.cgroup = cgroup or self._cgroups.create(cell.name, spec, uid)
                spawner = await self._spawner(shares_host_network=spec.network == "host")
                await self._bear(cell, number, spawner, binds)
        except TimeoutError as error:
            await cell.destroy()
            raise SandboxError(f"{cell.name} was not ready within {CREATE_SECONDS:g} s") from error
        except OSError as error:
            await cell.destroy()
            raise SandboxError(f"{cell.name} cannot be made: {error}") from error
        except BaseException:
            await asyncio.shield(cell.destroy())
            raise
        return cell

    async def _bear(self, cell: "Cell", number: int, spawner: "_Spawner", binds: Sequence[Bind]) -> None:
        assert cell.cgroup is not None
        theirs = cell.open()
        try:
            with cell.cgroup.entrances() as (unified, tasks):
                descriptors = [theirs.fileno(), *tasks]
                if unified is not None:
                    descriptors.append(unified)
                plan = self._plan(cell, binds, num_tasks=len(tasks))
                cell.confinement = encode_operations([step for step in plan.operations if step.code in CONFINING])
                order = plan.encode(number, cgroup=-1 if unified is None else len(descriptors) - 1)
                born = await spawner.order(number, order, descriptors)
        finally:
            theirs.close()
        cell.adopt(await born)
        await cell.until_ready(plan.operations)

    def _plan(self, cell: "Cell", binds: Sequence[Bind], num_tasks: int) -> Plan:
        """Its plan. Many cells are alike in all but their ids."""
        grants = self._grants(cell, num_tasks)
        spec = cell.spec
        key = (id(cell.image), *binds, replace(grants, uid=0, gid=0), spec.memory_mb, spec.disk_mb, spec.max_processes)
        known = self._plans.get(key)
        if known is None or known.image is not cell.image:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            known = self._plans[key] = _KnownPlan(cell.image, plan_cell(spec, cell.image, grants, binds))
        return replace(known.plan, **id_maps(grants))

    def _grants(self, cell: "Cell", num_tasks: int) -> Grants:
        assert self._cgroups is not None
        network = cell.spec.network
        can_share = self.host.landlock >= LANDLOCK_ABSTRACT_SOCKETS
        cores = sorted(self.host.cores)
        return Grants(
            uid=cell.uid_base,
            gid=cell.uid_base if self.host.has_id_ranges else self.host.gid,
            num_ids=NUM_IDS if self.host.has_id_ranges else 1,
            cores=frozenset(random.sample(cores, min(len(cores), math.ceil(cell.spec.cpus)))),
            join=tuple(range(1, 1 + num_tasks)),
            has_memory_limit=self._cgroups.has("memory"),
            has_process_limit=self._cgroups.has("pids"),
            allow_clone3=cell.cgroup is not None and cell.cgroup.can_freeze,
            own_network=network == "none" or (network == "off" and not can_share),
            has_sockets=network != "off",
            scopes_abstract_sockets=network == "off" and can_share,
            masked=self.host.masked,
        )

    async def _spawner(self, *, shares_host_network: bool) -> "_Spawner":
        spawner = self._spawners.get(shares_host_network)
        if spawner is None or spawner.is_lost:
            if spawner is not None:
                await spawner.close()
            spawner = self._spawners[shares_host_network] = _Spawner(self.host, own_network=not shares_host_network)
        await spawner.until_started()
        return spawner

    def _take_ids(self) -> int:
        """The first of a cell's ids: a range of its own, or the only one there is."""
        if not self.host.has_id_ranges:
            return self.host.uid
        while True:
            uid = random.randrange(FIRST_ID, LAST_ID, NUM_IDS)
            if uid not in self._ids:
                self._ids.add(uid)
                return uid

    async def _forget(self, cell: "Cell") -> None:
        """All of a cell's processes are gone: keep its ids and cgroup for the next, or let go of them."""
        assert self._cgroups is not None
        self._cells.discard(cell)
        cgroup, cell.cgroup = cell.cgroup, None
        if cgroup is not None and self._cgroups.give_back(cgroup):
            return
        self._ids.discard(cell.uid_base)
        deadline = time.monotonic() + KILL_SECONDS
        while cgroup is not None and not cgroup.remove():  # the last process may be counted for a moment yet
            if time.monotonic() > deadline:
                raise SandboxError(f"{cell.name}: its cgroup does not become empty")
            await asyncio.sleep(0.001)

    def _require(self) -> None:
        host = self.host
        if host.kernel < MIN_KERNEL or not host.has_user_namespaces:
            raise Unsupported("this machine has no user namespaces for cells; `hone sandbox doctor` says more")
        if not host.has_seccomp and not self._is_weak_allowed:
            raise Unsupported("this kernel cannot filter system calls; is_weak_allowed=True goes on without")


class Cell:
    """One sandbox. Nothing in it can name, see or signal anything outside.

    root_descriptor: its root folder, for reading and writing files beneath (never by a path without RESOLVE_IN_ROOT).
    layer_descriptor: its writable layer. uid_base: the outside's id of its root. confinement: the steps of its plan, as
    on the wire, that everything in it has taken.
    """

    def __init__(
        self, name: str, spec: SandboxSpec, image: Image, uid_base: int, nothing: int, forget: Callable[["Cell"], Awaitable[None]]
    ) -> None:
        self.name = name
        self.spec = spec
        self.image = image
        self.uid_base = uid_base
        self.pid = 0
        self.root_descriptor = -1
        self.layer_descriptor = -1
        self.cgroup: CellCgroup | None = None
        self.confinement = b""
        self._nothing = nothing
        self._forget = forget
        self._control: socket.socket | None = None
        self._pidfd = -1
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._failure: tuple[int, int] | None = None
        self._over: str | None = None
        self._programs: dict[int, Process] = {}
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
        program = Process(self, next(self._numbers))
        try:
            program.start(argv, env, cwd, has_stdin=True, terminal=terminal, stdin_descriptor=stdin_descriptor)
        except BaseException:
            await program.close()
            raise
        return program

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

    def usage_bytes(self) -> int | None:
        """What memory it uses now, files included; None where no cgroup counts."""
        return self.cgroup.memory_bytes() if self.cgroup is not None else None

    def open(self) -> socket.socket:
        """Make the agent's control socket and return the agent's end; called once, by `Cells`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._control = ours
        self._loop.add_reader(ours.fileno(), self._receive)
        return theirs

    def adopt(self, born: "_Born") -> None:
        """It has a first process; called once, by `Cells`."""
        if self.cgroup is not None:
            self._counters = self.cgroup.counters()
        self.pid, self._pidfd = born.pid, born.pidfd

    async def until_ready(self, operations: Sequence[Operation]) -> None:
        """Wait for the agent; called once, by `Cells`, with the plan's steps to name the one that failed."""
        try:
            await self._ready
        except SandboxError as error:
            if self._failure is None:
                raise
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

    def _loss(self) -> SandboxError:
        return SandboxError(f"{self.name}: {self._over or 'it was never opened'}")

    def register(self, identity: int, program: "Process") -> None:
        """A program is about to be started."""
        self._programs[identity] = program

    def unregister(self, identity: int) -> None:
        """Nobody waits for this program any more."""
        self._programs.pop(identity, None)

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
        room = os.fstatvfs(self.root_descriptor)
        return room.f_bavail == 0 or room.f_favail == 0

    def _receive(self) -> None:
        assert self._control is not None
        for _ in range(64):  # then others have their turn
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, REPORT.size + 1, 2)
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if len(data) != REPORT.size:
                self._lose("its agent is gone" if not data else "its agent talks nonsense")
                return
            self._hear(REPORT.unpack(data), descriptors)
            if self._control is None:
                return

    def _hear(self, report: tuple[int, ...], descriptors: list[int]) -> None:
        kind, identity, status, error, user, system, peak = report
        if kind == ENDED and (program := self._programs.get(identity)) is not None:
            program.end(Ending(status, error, (user + system) / 1e6, peak << 10))
        elif kind == READY and not self._ready.done() and descriptors:
            self.root_descriptor = descriptors[0]
            self.layer_descriptor = descriptors[1] if len(descriptors) > 1 else -1
            self._ready.set_result(None)
            return
        elif kind == FAILED:
            self._failure = (identity, error)
            self._lose("its first process failed")
        for descriptor in descriptors:
            os.close(descriptor)

    def _lose(self, reason: str) -> None:
        """Whoever waits for something in here, and whoever comes later, learns the reason."""
        if self._over is not None:
            return
        self._over = reason
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        if not self._ready.done():
            self._ready.set_exception(self._loss())
            self._ready.exception()  # nobody waits for it when the creation was cancelled
        for program in list(self._programs.values()):
            program.lose(self._loss())

    async def _destroy(self) -> None:
        """The kernel ends the first process when all others in its namespace are gone."""
        self._lose("it is destroyed")
        if self.cgroup is not None and (self._pidfd < 0 or self._is_paused):
            self.cgroup.kill()
        try:
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                await _until_over(self._pidfd, self.name)
            await self._forget(self)
        finally:
            for descriptor in (self._pidfd, self.root_descriptor, self.layer_descriptor):
                if descriptor >= 0:
                    os.close(descriptor)
            self._pidfd = self.root_descriptor = self.layer_descriptor = -1

    async def _freeze(self, frozen: bool) -> None:
        if self.cgroup is None or not self.cgroup.can_freeze:
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


class Channel(Protocol):
    """Who starts programs in a cell and says how they ended: its agent, or a warm Python in it."""

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Ask for something; raises `SandboxError`."""

    def register(self, identity: int, program: "Process") -> None:
        """A program is about to be started."""

    def unregister(self, identity: int) -> None:
        """Nobody waits for this program any more."""


class Process:
    """A program in a cell, with its streams. It dies with the cell; background processes that it left do, too.

    channel: who starts it; by default the cell's agent.
    """

    def __init__(
        self,
        cell: Cell,
        identity: int,
        *,
        kept_bytes: int = 0,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        channel: Channel | None = None,
    ) -> None:
        self._cell = cell
        self._channel: Channel = channel or cell
        self._identity = identity
        self._max_output_bytes = max_output_bytes
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ending] = self._loop.create_future()
        self._stdin = self._stdout = self._stderr = -1
        self._kept = (_Kept(kept_bytes // 2), _Kept(kept_bytes // 2))
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
            self._cgroup = self._cell.cgroup.enter() if self._cell.cgroup is not None else None
            if self._cgroup is not None:
                stdio.append(self._cgroup.open())
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
                await _until_ready(self._stdin, self._loop.add_writer, self._loop.remove_writer)

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
        elif not self._ended.done():
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
        except TimeoutError as error:
            raise SandboxError(f"{self._cell.name}: a program does not die") from error
        except SandboxError:
            pass  # it is gone with its cell
        finally:
            self._let_go()

    async def complete(self, stdin: bytes, timeout_seconds: float, started: float) -> ExecResult:
        """Feed and read it until it ends or is late; what `Cell.exec` returns."""
        feeding = self._loop.create_task(self._feed(stdin)) if stdin else None
        outputs = [
            _Output(self._loop, descriptor, kept, self._overflow if kept else None, self._max_output_bytes)
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
        flags = HAS_TERMINAL if has_terminal else 0
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
                return os.read(descriptor, max_bytes)
            except BlockingIOError:
                await _until_ready(descriptor, self._loop.add_reader, self._loop.remove_reader)
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
        if not self._ended.done():
            self._outcome = self._outcome or Outcome.OUTPUT_LIMIT
            self._kill_or_lose()

    def _kill_or_lose(self) -> None:
        try:
            self.kill()
        except SandboxError as error:
            self.lose(error)
        self._loop.call_later(
            KILL_SECONDS, self.lose, SandboxError(f"{self._cell.name}: a program does not die")
        )

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
        for descriptor in {self._stdin, self._stdout, self._stderr} - {-1}:
            os.close(descriptor)
        self._stdin = self._stdout = self._stderr = -1


DEFAULT_ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}


@dataclass(frozen=True, slots=True)
class Ending:
    """How a program ended: its wait status, or the error for which it was not started, and what it used."""

    status: int
    error: int
    cpu_seconds: float
    peak_memory_bytes: int

    @property
    def code(self) -> int:
        return 126 if self.error else os.waitstatus_to_exitcode(self.status)


@dataclass(frozen=True, slots=True)
class _KnownPlan:
    image: Image
    plan: Plan


@dataclass(frozen=True, slots=True)
class _Born:
    pid: int
    pidfd: int


class _Spawner:
    """The helper process that clones cells."""

    def __init__(self, host: Host, *, own_network: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[_Born]] = {}
        self._sending = asyncio.Lock()
        self._is_lost = False
        self._started = self._loop.create_task(self._start(host, own_network=own_network))

    async def _start(self, host: Host, *, own_network: bool) -> None:
        """Start it and let it take its place."""
        programs = await asyncio.to_thread(build)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        agent = _sealed("agent", programs.agent)
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a vfork; all waiting is done elsewhere
                ["hone-spawner", str(theirs.fileno()), str(agent)],
                executable=programs.spawner,
                pass_fds=[theirs.fileno(), agent],
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        finally:
            theirs.close()
            os.close(agent)
        self._loop.add_reader(ours.fileno(), self._receive)
        prelude = plan_spawner(
            is_unprivileged=not host.has_id_ranges, uid=host.uid, gid=host.gid, own_network=own_network
        )
        self._waiting[0] = self._loop.create_future()
        await self._send(SPAWN.pack(0, 0, -1, 0, 0, 0, 0, len(prelude)) + encode_operations(prelude), [])
        born = await self._waiting[0]
        self._waiting.pop(0)
        if born.pid != len(prelude):
            problem = f"{prelude[born.pid]}: {os.strerror(-born.pidfd)}"
            raise Unsupported(f"this machine does not let cells be made: {problem}")

    @property
    def is_lost(self) -> bool:
        """Whether it is dead."""
        return self._is_lost or (self._process is not None and self._process.poll() is not None)

    async def until_started(self) -> None:
        """Wait until it can make cells; raises what stands in the way."""
        await asyncio.shield(self._started)

    async def order(self, identity: int, data: bytes, descriptors: Sequence[int]) -> asyncio.Future[_Born]:
        """Have a cell cloned; the future is what came of it."""
        born: asyncio.Future[_Born] = self._loop.create_future()
        self._waiting[identity] = born
        born.add_done_callback(lambda _: self._waiting.pop(identity, None))
        await self._send(data, descriptors)
        return born

    async def close(self) -> None:
        """End it, and with it what is left of its cells."""
        self._started.cancel()
        await asyncio.wait([self._started])
        self._lose()
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            await asyncio.to_thread(process.wait)

    async def _send(self, data: bytes, descriptors: Sequence[int]) -> None:
        async with self._sending:
            while True:
                if self._socket is None:
                    raise SandboxError("the spawner of cells is gone")
                try:
                    socket.send_fds(self._socket, [data], descriptors)
                    return
                except BlockingIOError:
                    await _until_ready(self._socket.fileno(), self._loop.add_writer, self._loop.remove_writer)
                except BrokenPipeError:
                    self._lose()

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, SPAWNED.size, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._lose()
            return
        identity, pid, error = SPAWNED.unpack(data)
        waiting = self._waiting.get(identity)
        if waiting is None or waiting.done():  # cancelled: it ends by itself, as nobody has its socket
            for descriptor in descriptors:
                os.close(descriptor)
        elif identity == 0:
            waiting.set_result(_Born(pid, -error))
        elif descriptors:
            waiting.set_result(_Born(pid, descriptors[0]))
        else:
            waiting.set_exception(OSError(error, f"the kernel does not clone a cell: {os.strerror(error)}"))

    def _lose(self) -> None:
        self._is_lost = True
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for waiting in list(self._waiting.values()):
            if not waiting.done():
                waiting.set_exception(SandboxError("the spawner of cells is gone"))
                waiting.exception()


class _Output:
    """Keeps what a program writes to one of its streams, as it comes."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        descriptor: int,
        kept: "_Kept",
        overflow: Callable[[], None] | None,
        max_bytes: int,
    ) -> None:
        self.is_over = False
        self.over: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._descriptor = descriptor
        self._kept = kept
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
        if self._kept.num_bytes > self._max_bytes and self._overflow is not None:
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


def _sealed(name: str, content: bytes) -> int:
    """A program in memory that nobody can change any more, a cell that runs it least of all."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


async def _first_of(outputs: Sequence[_Output], seconds: float) -> None:
    await asyncio.wait([output.over for output in outputs], timeout=seconds)


async def _until_over(pidfd: int, name: str) -> None:
    """Wait for the end of a process."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(KILL_SECONDS):
            await _until_ready(pidfd, loop.add_reader, loop.remove_reader)
    except TimeoutError as error:
        raise SandboxError(f"{name}: its first process does not die") from error


async def _until_ready(descriptor: int, watch: Callable[..., None], unwatch: Callable[[int], bool]) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    watch(descriptor, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        unwatch(descriptor)
