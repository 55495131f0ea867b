"""The helper process that clones cells: its start, orders to it and its answers."""

import asyncio
import collections
import fcntl
import hashlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hone.sandbox.cells.forks import keep_from_forks
from hone.sandbox.cells.plan import SPAWN, Code, Operation, encode_operations
from hone.sandbox.errors import SHORTAGES, SandboxError, Unsupported
from hone.sandbox.native.build import BuildError, build, cache_folder
from hone.sandbox.readiness import until_ready

# A shell runs it up to its exec, and for Python it begins with a string.
LAUNCHER = """#!/bin/sh
''':'
for python in {python} /usr/bin/python3 /usr/local/bin/python3; do
    if [ -x "$python" ]; then exec "$python" -I -S "$0" "$@"; fi
done
echo "without a C compiler on the node, the image has to have a Python 3 for the agent" >&2
exit 127
'''
"""
GUEST = Path(__file__).parents[1] / "guest"
SPAWNED = struct.Struct("=Qii")
LEAVE_SECONDS = 10.0
ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Born:
    """A cell's first process."""

    pid: int
    pidfd: int


class Spawner:
    """The helper process that clones cells, and starts the programs of other runtimes.

    prelude: what it does to itself first. is_native: the programs in C; otherwise those in Python, which do the same but
    for what `carry_out` is for.
    """

    def __init__(self, prelude: Sequence[Operation], *, is_native: bool = True) -> None:
        self.is_native = is_native
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        keep_from_forks(self)
        self._waiting: dict[int, asyncio.Future[Born]] = {}
        self._own: collections.deque[asyncio.Future[_Done]] = collections.deque()
        self._sending = asyncio.Lock()
        self._is_lost = False
        self._agent = Path()
        self._started = self._loop.create_task(self._start(prelude))

    async def _start(self, prelude: Sequence[Operation]) -> None:
        """Start it and let it take its place."""
        try:
            program = await asyncio.to_thread(_native if self.is_native else _in_python)
        except BuildError as error:
            problem = f"sandboxes need spawner and agent compiled once: {error}"
            raise (SandboxError(problem) if error.is_passing else Unsupported(problem)) from error
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        self._agent = program.agent_path
        agent = _sealed("agent", program.agent)
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a vfork; all waiting is done elsewhere
                [*program.command, str(theirs.fileno()), str(agent)],
                executable=program.executable,
                pass_fds=[theirs.fileno(), agent],
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # what is sent to the node's group is for the node to heed
            )
        finally:
            theirs.close()
            os.close(agent)
        self._loop.add_reader(ours.fileno(), self._receive)
        done = await self._carry_out(prelude, [])
        if done.error:
            problem = f"{prelude[done.num_steps]}: {os.strerror(done.error)}"
            if done.error in SHORTAGES:
                raise SandboxError(f"no sandboxes can be made now: {problem}")
            raise Unsupported(f"this machine does not let sandboxes be made: {problem}")

    @property
    def is_lost(self) -> bool:
        """Whether it is dead, or did not come to life."""
        if self._started.done() and (self._started.cancelled() or self._started.exception() is not None):
            return True
        return self._is_lost or (self._process is not None and self._process.poll() is not None)

    @property
    def agent(self) -> Path:
        """Where the agent's program lies, for runtimes that start it from a file; known once this has started."""
        return self._agent

    async def until_started(self) -> None:
        """Wait until it can make cells; raises what stands in the way."""
        await asyncio.shield(self._started)

    async def order(self, identity: int, data: bytes, descriptors: Sequence[int]) -> asyncio.Future[Born]:
        """Have a cell cloned; the future is what came of it."""
        born: asyncio.Future[Born] = self._loop.create_future()
        self._waiting[identity] = born
        born.add_done_callback(lambda _: self._waiting.pop(identity, None))
        await self._send(data, descriptors)
        return born

    async def carry_out(self, operations: Sequence[Operation], descriptors: Sequence[int] = ()) -> int:
        """Have it take steps itself, for all of its cells; what one of them gave, or -1. `OSError` for one that fails.

        `Unsupported` of one in Python.
        """
        if not self.is_native:
            raise Unsupported("layers and ports need the spawner in C; install a C compiler")
        done = await self._carry_out(operations, descriptors)
        if done.error:
            if done.descriptor >= 0:
                os.close(done.descriptor)
            raise OSError(done.error, f"{operations[done.num_steps]}: {os.strerror(done.error)}")
        return done.descriptor

    async def socket_in(self, process: int, port: int, *, max_waiting: int = 0, is_ipv6: bool = False) -> socket.socket:
        """A socket of the network that a process is in, named by its pidfd; the process never holds it.

        It listens at a port of the loopback, or, with nobody who may wait there, it is connected to it or on its way.
        Raises `OSError`.
        """
        operation = Operation(Code.SOCKET, a=port | (is_ipv6 << 16), b=max_waiting)
        return socket.socket(fileno=await self.carry_out([operation], [process]))

    async def _carry_out(self, operations: Sequence[Operation], descriptors: Sequence[int]) -> "_Done":
        done: asyncio.Future[_Done] = self._loop.create_future()
        order = SPAWN.pack(0, 0, -1, 0, 0, 0, 0, 0, len(operations)) + encode_operations(operations)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._send(order, descriptors, expected=done)
                return await done
        except TimeoutError as error:
            raise SandboxError(f"the spawner of cells has not answered for {ANSWER_SECONDS:g} s") from error
        except asyncio.CancelledError:  # at the moment of the answer, perhaps: nobody else would close what it gave
            if done.done() and not done.cancelled() and done.exception() is None and done.result().descriptor >= 0:
                os.close(done.result().descriptor)
            raise

    def close_in_child(self) -> None:
        """In a forked child: close its socket."""
        if self._socket is not None:
            self._socket.close()

    async def close(self) -> None:
        """End it, and with it what is left of its cells."""
        self._started.cancel()
        await asyncio.wait([self._started])
        self._lose()
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.to_thread(_end, process)

    async def _send(
        self, data: bytes, descriptors: Sequence[int], expected: "asyncio.Future[_Done] | None" = None
    ) -> None:
        """expected: what is told of an order for the spawner itself; the answers come in the order of the questions."""
        async with self._sending:
            while True:
                if self._socket is None:
                    raise SandboxError("the spawner of cells is gone")
                try:
                    socket.send_fds(self._socket, [data], descriptors)
                    if expected is not None:
                        self._own.append(expected)
                    return
                except BlockingIOError:
                    await until_ready(self._socket.fileno(), self._loop.add_writer, self._loop.remove_writer)
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
        if identity == 0:
            self._hear_own(_Done(pid, error, descriptors[0] if descriptors else -1))
            return
        waiting = self._waiting.get(identity)
        if waiting is None or waiting.done():  # cancelled: it ends by itself, as nobody has its socket
            for descriptor in descriptors:
                os.close(descriptor)
        elif descriptors:
            waiting.set_result(Born(pid, descriptors[0]))
        else:
            waiting.set_exception(OSError(error, f"the kernel does not clone a cell: {os.strerror(error)}"))

    def _hear_own(self, done: "_Done") -> None:
        expected = self._own.popleft()
        if not expected.done():
            expected.set_result(done)
        elif done.descriptor >= 0:
            os.close(done.descriptor)

    def _lose(self) -> None:
        self._is_lost = True
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        expected: list[asyncio.Future[Born] | asyncio.Future[_Done]] = [*self._waiting.values(), *self._own]
        for waiting in expected:
            if not waiting.done():
                waiting.set_exception(SandboxError("the spawner of cells is gone"))
                waiting.exception()


@dataclass(frozen=True, slots=True)
class _Done:
    """What came of an order for the spawner itself: the steps taken, what stopped it there, a descriptor it gave."""

    num_steps: int
    error: int
    descriptor: int


@dataclass(frozen=True, slots=True)
class _Program:
    """How the spawner is started, the agent that it starts without a file, and a file to start it from."""

    executable: Path
    command: list[str]
    agent: bytes
    agent_path: Path


def _native() -> _Program:
    programs = build()
    return _Program(programs.spawner, ["hone-spawner"], programs.agent, programs.agent_path)


def _in_python() -> _Program:
    agent = (GUEST / "agent.py").read_bytes()
    script = LAUNCHER.format(python=Path(sys.executable).resolve()).encode() + agent
    path = cache_folder() / f"agent-{hashlib.sha256(script).hexdigest()[:24]}"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as unfinished:
            unfinished.write(script)
        Path(unfinished.name).chmod(0o755)
        Path(unfinished.name).rename(path)
    command = [sys.executable, "-I", "-S", str(GUEST / "spawner.py")]
    return _Program(Path(sys.executable), command, agent, path)


def _sealed(name: str, content: bytes) -> int:
    """A program in memory that nobody can change any more, a cell that runs it least of all."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _end(spawner: subprocess.Popen[bytes]) -> None:
    """It leaves when its socket closes, in good order."""
    try:
        spawner.wait(LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        spawner.kill()
        spawner.wait()
