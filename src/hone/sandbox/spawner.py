"""The helper process that clones cells: its start, orders to it and its answers."""

import asyncio
import fcntl
import itertools
import os
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.host import Host
from hone.sandbox.native.build import BuildError, build
from hone.sandbox.plan import SPAWN, Code, Operation, encode_operations, plan_spawner
from hone.sandbox.readiness import until_ready

SPAWNED = struct.Struct("=Qii")
LEAVE_SECONDS = 10.0
FIRST_SOCKET = 1 << 62  # cells are numbered from 1


@dataclass(frozen=True, slots=True)
class Born:
    """A cell's first process; or a socket, whose descriptor it then is."""

    pid: int
    pidfd: int


class Spawner:
    """The helper process that clones cells."""

    def __init__(self, host: Host, *, own_network: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[Born]] = {}
        self._sending = asyncio.Lock()
        self._socket_numbers = itertools.count(FIRST_SOCKET)
        self._is_lost = False
        self._started = self._loop.create_task(self._start(host, own_network=own_network))

    async def _start(self, host: Host, *, own_network: bool) -> None:
        """Start it and let it take its place."""
        try:
            programs = await asyncio.to_thread(build)
        except BuildError as error:
            raise Unsupported(f"cells need spawner and agent compiled once: {error}") from error
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

    async def order(self, identity: int, data: bytes, descriptors: Sequence[int]) -> asyncio.Future[Born]:
        """Have a cell cloned; the future is what came of it."""
        born: asyncio.Future[Born] = self._loop.create_future()
        self._waiting[identity] = born
        born.add_done_callback(lambda _: self._waiting.pop(identity, None))
        await self._send(data, descriptors)
        return born

    async def socket_in(self, process: int, port: int, *, max_waiting: int = 0, is_ipv6: bool = False) -> socket.socket:
        """A socket of the network that a process is in, named by its pidfd; the process never holds it.

        It listens at a port of the loopback, or, with nobody who may wait there, it is connected to it or on its way.
        Raises `OSError`.
        """
        identity = next(self._socket_numbers)
        operation = Operation(Code.SOCKET, a=port | (is_ipv6 << 16), b=max_waiting)
        order = SPAWN.pack(identity, 0, -1, 0, 0, 0, 0, 1) + encode_operations([operation])
        made = await (await self.order(identity, order, [process]))
        return socket.socket(fileno=made.pidfd)

    async def close(self) -> None:
        """End it, and with it what is left of its cells."""
        self._started.cancel()
        await asyncio.wait([self._started])
        self._lose()
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.to_thread(_end, process)

    async def _send(self, data: bytes, descriptors: Sequence[int]) -> None:
        async with self._sending:
            while True:
                if self._socket is None:
                    raise SandboxError("the spawner of cells is gone")
                try:
                    socket.send_fds(self._socket, [data], descriptors)
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
        waiting = self._waiting.get(identity)
        if waiting is None or waiting.done():  # cancelled: it ends by itself, as nobody has its socket
            for descriptor in descriptors:
                os.close(descriptor)
        elif identity == 0:
            waiting.set_result(Born(pid, -error))
        elif descriptors:
            waiting.set_result(Born(pid, descriptors[0]))
        else:
            what = "clone a cell" if identity < FIRST_SOCKET else "make a socket in it"
            waiting.set_exception(OSError(error, f"the kernel does not {what}: {os.strerror(error)}"))

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
