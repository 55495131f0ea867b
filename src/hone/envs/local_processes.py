"""The local sandbox runtime: processes of this machine behind what the kernel grants without root."""

import asyncio
import contextlib
import marshal
import math
import os
import random
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hone.envs.failures import RolloutFailure, deadline, describe
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec, Usage
from hone.schema.traces import FailureClass

CREATE_SECONDS = 60.0
CLOSE_SECONDS = 10.0
KILL_SECONDS = 10.0
MAX_STARTING = 8 * (os.cpu_count() or 1)
DRAIN_SECONDS = 0.2
MAX_OUTPUT_BYTES = 64 << 20
MAX_REQUEST_BYTES = 160 << 10
GUARDIAN = Path(__file__).parent / "guests" / "guardian.py"
PYTHONS = ("python", "python3")


class LocalProcesses:
    """Sandboxes as process trees of this machine: no daemon, no root, a few milliseconds each.

    What holds for every sandbox: a folder of its own, removed at the end; none of this process's environment variables;
    limits on memory (address space of each process), file size, CPU time, cores and open files; output that is read
    while the program writes and of which head and tail are kept; the whole tree dies at a timeout, at close, at the end
    of the lease, and when this process dies, double-forked children included.

    What holds where the kernel grants it (`LocalSandbox.protections` says what does):

    - "namespaces" (unprivileged user namespaces): no network unless the spec says "host"; no capabilities; other
      processes cannot be named; the kernel itself kills the tree; `max_processes` is kept, unless this process is root.
    - "files" (Landlock, Linux 5.13): the programs see the system's programs and their own folder, but neither home
      folders nor data; they cannot look into other processes; from Linux 6.12 they cannot signal them either.

    is_weak_allowed: whether to go on where one of the two is missing.

    What it does not do, so that it is no place for hostile code: the kernel, /proc, /dev/shm and the user id are the
    host's; memory and disk are limited for each process and file, not for their sum; as root the number of processes is
    not limited. Images other than "python", this interpreter, are refused.
    """

    def __init__(self, *, is_weak_allowed: bool = True) -> None:
        self._is_weak_allowed = is_weak_allowed
        self._use_namespaces = True
        self._use_landlock = True
        self._spawner: _Spawner | None = None

    async def create(self, spec: SandboxSpec) -> "LocalSandbox":
        """A sandbox of this machine that is ready; raises a `RolloutFailure` of class sandbox."""
        if sys.platform != "linux":
            raise _failure("create", f"local processes need Linux, this is {sys.platform}; use another provider")
        if spec.image != "python":
            raise _failure("create", f"image {spec.image!r}: local processes have this machine's Python only")
        sandbox = LocalSandbox(spec)
        try:
            async with deadline(CREATE_SECONDS), _starting():
                await sandbox.open(self._spawn, use_namespaces=self._use_namespaces, use_landlock=self._use_landlock)
            missing = {"namespaces", "files"} - sandbox.protections
            if missing and not self._is_weak_allowed:
                raise _failure("create", f"this kernel does not grant {' and '.join(sorted(missing))}")
        except (OSError, TimeoutError) as error:
            await sandbox.close()
            raise _failure("create", describe(error)) from error
        except BaseException:  # a cancellation too: undo, then pass it on
            await sandbox.close()
            raise
        return sandbox

    def _spawn(self, control: socket.socket) -> None:
        """Let a guardian begin at this end of a socket."""
        try:
            if self._spawner is not None:
                self._spawner.spawn(control)
                return
        except OSError:
            self._spawner = None  # it is gone; a new one takes over
        self._spawner = _Spawner()
        self._spawner.spawn(control)


class LocalSandbox:
    """A `Sandbox` of `LocalProcesses`. protections: which of "namespaces" and "files" hold."""

    def __init__(self, spec: SandboxSpec) -> None:
        self.spec = spec
        self.protections: frozenset[str] = frozenset()
        self._folder = Path(tempfile.mkdtemp(prefix="hone-sandbox-"))
        self._work = self._folder / "work"
        self._control: socket.socket | None = None
        self._guardian: int | None = None
        self._ready: asyncio.Future[frozenset[str]] = asyncio.get_running_loop().create_future()
        self._dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._over: str | None = None
        self._processes: dict[int, LocalProcess] = {}
        self._num_started = 0

    async def open(
        self, spawn: Callable[[socket.socket], None], *, use_namespaces: bool = True, use_landlock: bool = True
    ) -> None:
        """Let a guardian start and wait until it is ready; called once, by the provider."""
        for name in ("work", "tmp"):
            (self._folder / name).mkdir()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._control = ours
        asyncio.get_running_loop().add_reader(ours, self._receive)
        with theirs:
            spawn(theirs)
        ours.send(marshal.dumps(self._options(use_namespaces, use_landlock)))
        self.protections = await self._ready

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        timeout_seconds: float = 60.0,
        kept_bytes: int = 64 << 10,
    ) -> ExecResult:
        """As `Sandbox.exec`."""
        started = time.perf_counter()
        process = self._start(argv, env, cwd, with_stderr=True)
        try:
            return await process.complete(stdin, timeout_seconds, kept_bytes, started)
        finally:
            await process.close()

    async def start(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "."
    ) -> "LocalProcess":
        """As `Sandbox.start`."""
        return self._start(argv, env, cwd, with_stderr=False)

    async def read(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """As `Sandbox.read`."""
        return await asyncio.to_thread(_read_file, self._living_work(), _parts(path), max_bytes)

    async def write(self, path: str, data: bytes) -> None:
        """As `Sandbox.write`."""
        await asyncio.to_thread(_write_file, self._living_work(), _parts(path), data)

    async def list(self, path: str = ".") -> tuple[str, ...]:
        """As `Sandbox.list`."""
        return await asyncio.to_thread(_list_folder, self._living_work(), _parts(path))

    async def close(self) -> None:
        """As `Sandbox.close`."""
        self._end("it is closed")
        try:
            if self._control is not None:
                with contextlib.suppress(OSError):
                    self._control.shutdown(socket.SHUT_WR)
                await self._wait_until_dead()
        finally:
            if self._control is not None:
                asyncio.get_running_loop().remove_reader(self._control)
                self._control.close()
                self._control = None
            self._processes.clear()
            if self._folder.exists():  # its guardian was killed, or never came
                await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def send(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Ask the guardian for something; what it says about the program comes to the program."""
        control = self._living_control()
        try:
            socket.send_fds(control, [marshal.dumps(request)], descriptors)
        except OSError as error:
            raise _failure("sandbox", f"its guardian does not listen ({describe(error)})") from error

    def forget(self, identity: int) -> None:
        """Nobody waits for this process any more."""
        self._processes.pop(identity, None)

    def _start(
        self, argv: Sequence[str], env: Mapping[str, str] | None, cwd: str, *, with_stderr: bool
    ) -> "LocalProcess":
        if not argv:
            raise ValueError("a program without a name; argv is empty")
        program = sys.executable if argv[0] in PYTHONS else argv[0]
        request: dict[str, Any] = {
            "argv": [program, *argv[1:]],
            "env": {**self._environment(), **(env or {})},
            "cwd": str(self._work.joinpath(*_parts(cwd))),
        }
        if len(marshal.dumps(request)) > MAX_REQUEST_BYTES:
            raise ValueError(f"arguments and environment of more than {MAX_REQUEST_BYTES} bytes; write them to a file")
        self._num_started += 1
        process = LocalProcess(self, self._num_started, with_stderr=with_stderr)
        self._processes[self._num_started] = process
        try:
            process.open(request)
        except OSError as error:
            process.let_go()
            raise _failure("start", describe(error)) from error
        except BaseException:  # a cancellation too: undo, then pass it on
            process.let_go()
            raise
        return process

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self._work),
            "TMPDIR": str(self._folder / "tmp"),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": str(math.ceil(self.spec.cpus)),  # libraries would count the host's cores
            **self.spec.env,
        }

    def _options(self, use_namespaces: bool, use_landlock: bool) -> dict[str, Any]:
        cores = sorted(os.sched_getaffinity(0))
        return {
            "cores": random.sample(cores, min(len(cores), math.ceil(self.spec.cpus))),
            "memory_bytes": self.spec.memory_mb << 20,
            "disk_bytes": self.spec.disk_mb << 20,
            "cpu_seconds": math.ceil(self.spec.ttl_seconds * self.spec.cpus),
            "max_processes": self.spec.max_processes,
            "network": self.spec.network,
            "ttl_seconds": self.spec.ttl_seconds,
            "readable": sorted({sys.prefix, sys.base_prefix}),
            "folder": str(self._folder),
            "namespaces": use_namespaces,
            "landlock": use_landlock,
        }

    async def _wait_until_dead(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.shield(self._dead)
        except TimeoutError:
            if self._guardian is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._guardian, signal.SIGKILL)

    def _living_control(self) -> socket.socket:
        if self._over is not None or self._control is None:
            raise _failure("sandbox", self._over or "it was never opened")
        return self._control

    def _living_work(self) -> Path:
        self._living_control()
        return self._work

    def _receive(self) -> None:
        assert self._control is not None
        try:
            data = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._control)
            self._dead.set_result(None)
            self._end("its guardian is gone")
            return
        message: dict[str, Any] = marshal.loads(data)
        if "protections" in message:
            self._guardian = message["pid"]
            if not self._ready.done():
                self._ready.set_result(frozenset(name for name, holds in message["protections"].items() if holds))
        elif "over" in message:
            self._end(message["over"])
        elif (process := self._processes.get(message["ended"])) is not None:
            process.end(message)

    def _end(self, reason: str) -> None:
        """Whoever waits for something in here, and whoever comes later, learns the reason."""
        if self._over is not None:
            return
        self._over = reason
        if not self._ready.done():
            self._ready.set_exception(_failure("create", reason))
            self._ready.exception()  # nobody waits for it when the creation was cancelled
        for process in list(self._processes.values()):
            process.lose(_failure("sandbox", reason))


class LocalProcess:
    """A `Process` of a `LocalSandbox`, and the inside of its `exec`."""

    def __init__(self, sandbox: LocalSandbox, identity: int, *, with_stderr: bool) -> None:
        self._sandbox = sandbox
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
            self._sandbox.send({"start": self._identity, **request}, [read_end, write_end, error_end])
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
            self._sandbox.send({"signal": self._identity, "kill": False})

    def kill(self) -> None:
        """As `Process.kill`."""
        if not self._ended.done():
            self._sandbox.send({"signal": self._identity, "kill": True})

    async def close(self) -> None:
        """As `Process.close`."""
        try:
            if not self._ended.done():
                self.kill()
                async with deadline(KILL_SECONDS):
                    await asyncio.shield(self._ended)
        except TimeoutError as error:
            raise _failure("kill", f"the program does not die ({error})") from error
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
        outcome = self._outcome or _own_outcome(code, usage, self._sandbox.spec.memory_mb << 20)
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
        self._sandbox.forget(self._identity)
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
            raise _failure("kill", f"the program does not die ({error})") from error

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


def _failure(where: str, message: str) -> RolloutFailure:
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


class _Spawner:
    """The process that forks guardians, and that ends with this object or with this process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(GUARDIAN)],
                {},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)],
            )
        self._socket = ours.detach()
        weakref.finalize(self, _stop, os.getpid(), self.pid, self._socket)

    def spawn(self, control: socket.socket) -> None:
        """Fork a guardian; `OSError` when the process is gone."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, control.fileno().to_bytes(4, sys.byteorder))]
        ours = socket.socket(fileno=self._socket)
        try:
            ours.sendmsg([b"+"], rights)
        finally:
            ours.detach()


def _stop(owner: int, pid: int, ours: int) -> None:
    if os.getpid() == owner:  # and no fork of it
        with contextlib.suppress(OSError):
            os.close(ours)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


_free: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


def _starting() -> asyncio.Semaphore:
    """The places for creations under way in this event loop: a burst may not take all cores at once."""
    return _free.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(MAX_STARTING))


def _parts(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError(f"path {path!r} in a sandbox; use one relative to its working folder, without '..'")
    return parts


@contextlib.contextmanager
def _folder(root: Path, parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder below `root`, reached without following a symbolic link."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def _file(root: Path, parts: Sequence[str], flags: int, *, make: bool = False) -> Iterator[int]:
    """A descriptor of a regular file; a fifo or a device cannot make the caller wait."""
    if not parts:
        raise IsADirectoryError("the working folder is not a file")
    with _folder(root, parts[:-1], make=make) as folder:
        file = os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(f"{'/'.join(parts)} is not a regular file")
        yield file
    finally:
        os.close(file)


def _read_file(root: Path, parts: Sequence[str], max_bytes: int) -> bytes:
    with _file(root, parts, os.O_RDONLY) as file, open(file, "rb", closefd=False) as reader:
        data = reader.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{'/'.join(parts)} is longer than {max_bytes} bytes; read it with a larger max_bytes")
    return data


def _write_file(root: Path, parts: Sequence[str], data: bytes) -> None:
    with _file(root, parts, os.O_WRONLY | os.O_CREAT, make=True) as file, open(file, "wb", closefd=False) as writer:
        writer.truncate(0)
        writer.write(data)


def _list_folder(root: Path, parts: Sequence[str]) -> tuple[str, ...]:
    with _folder(root, parts) as folder, os.scandir(folder) as entries:
        names = [f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries]
    return tuple(sorted(names))
