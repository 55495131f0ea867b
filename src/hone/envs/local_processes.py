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
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hone.envs.failures import deadline, describe
from hone.envs.guest_sessions import GuestSession
from hone.envs.local_files import list_folder, parts_of, read_file, write_file
from hone.envs.local_programs import LocalProcess, sandbox_failure
from hone.envs.local_spawner import Spawner
from hone.schema.sandboxes import ExecResult, PythonResult, SandboxSpec

CREATE_SECONDS = 60.0
CLOSE_SECONDS = 10.0
MAX_STARTING = 8 * (os.cpu_count() or 1)
MAX_REQUEST_BYTES = 160 << 10
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
    not limited. Images other than "python", this interpreter, are refused, and so are the runtimes bwrap, oci and gvisor.
    """

    def __init__(self, *, is_weak_allowed: bool = True) -> None:
        self._is_weak_allowed = is_weak_allowed
        self._use_namespaces = True
        self._use_landlock = True
        self._spawner: Spawner | None = None

    async def create(self, spec: SandboxSpec) -> "LocalSandbox":
        """A sandbox of this machine that is ready; raises a `RolloutFailure` of class sandbox."""
        if sys.platform != "linux":
            raise sandbox_failure("create", f"local processes need Linux, this is {sys.platform}; use another provider")
        if spec.image != "python":
            raise sandbox_failure("create", f"image {spec.image!r}: local processes have this machine's Python only")
        if spec.runtime not in ("process", "cell"):  # a cell is what a spec has that asks for nothing
            raise sandbox_failure(
                "create", f"runtime {spec.runtime!r}: local processes are weaker; use cells or a node"
            )
        sandbox = LocalSandbox(spec)
        try:
            async with deadline(CREATE_SECONDS), _starting():
                await sandbox.open(self._spawn, use_namespaces=self._use_namespaces, use_landlock=self._use_landlock)
            missing = {"namespaces", "files"} - sandbox.protections
            if missing and not self._is_weak_allowed:
                raise sandbox_failure("create", f"this kernel does not grant {' and '.join(sorted(missing))}")
        except (OSError, TimeoutError) as error:
            await sandbox.close()
            raise sandbox_failure("create", describe(error)) from error
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
        self._spawner = Spawner()
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
        self._session = GuestSession(self)

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

    async def start_python(self, code: str) -> LocalProcess:
        """As `Sandbox.start_python`."""
        return await self.start(["python", "-I", "-c", code])

    async def python(self, code: str, *, timeout_seconds: float = 60.0) -> PythonResult:
        """As `Sandbox.python`."""
        return await self._session.run(code, timeout_seconds)

    async def read(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """As `Sandbox.read`."""
        return await asyncio.to_thread(read_file, self._living_work(), parts_of(path), max_bytes)

    async def write(self, path: str, data: bytes) -> None:
        """As `Sandbox.write`."""
        await asyncio.to_thread(write_file, self._living_work(), parts_of(path), data)

    async def list(self, path: str = ".") -> tuple[str, ...]:
        """As `Sandbox.list`."""
        return await asyncio.to_thread(list_folder, self._living_work(), parts_of(path))

    async def close(self) -> None:
        """As `Sandbox.close`."""
        self._end("it is closed")
        try:
            await self._session.close()
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
            raise sandbox_failure("sandbox", f"its guardian does not listen ({describe(error)})") from error

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
            "cwd": str(self._work.joinpath(*parts_of(cwd))),
        }
        if len(marshal.dumps(request)) > MAX_REQUEST_BYTES:
            raise ValueError(f"arguments and environment of more than {MAX_REQUEST_BYTES} bytes; write them to a file")
        self._num_started += 1
        process = LocalProcess(self, self._num_started, self.spec.memory_mb << 20, with_stderr=with_stderr)
        self._processes[self._num_started] = process
        try:
            process.open(request)
        except OSError as error:
            process.let_go()
            raise sandbox_failure("start", describe(error)) from error
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
            raise sandbox_failure("sandbox", self._over or "it was never opened")
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
            self._ready.set_exception(sandbox_failure("create", reason))
            self._ready.exception()  # nobody waits for it when the creation was cancelled
        for process in list(self._processes.values()):
            process.lose(sandbox_failure("sandbox", reason))


_free: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


def _starting() -> asyncio.Semaphore:
    """The places for creations under way in this event loop: a burst may not take all cores at once."""
    return _free.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(MAX_STARTING))
