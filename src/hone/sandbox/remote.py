"""The client's side of a node behind an address: calls, streams, and noticing that the node is gone."""

import asyncio
import itertools
import secrets
import signal
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from hone.sandbox.addresses import connect, parse_address
from hone.sandbox.errors import SandboxError
from hone.sandbox.wire import CHUNK_BYTES, Credit, Stream, error_of
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import ExecResult, FileEntry, Outcome, PythonResult, SandboxSpec, SandboxStatus, SandboxUsage

CONNECT_SECONDS = 10.0
PING_SECONDS = 0.5
MAX_UNANSWERED = 3
T = TypeVar("T")


class RemoteNode:
    """A connection to a node. What waits for a node that goes silent or away raises `SandboxError` (node lost).

    ca_file: of the authorities whose word is taken at a tls:// address; by default that in $HONE_SANDBOX_CA.
    """

    def __init__(self, address: str, token: str = "", *, ca_file: str = "") -> None:
        self.address = address
        self._ca_file = ca_file
        self._token = token
        self._session = secrets.token_hex(16)
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._processes: dict[int, RemoteProcess] = {}
        self._stream: Stream[Any] | None = None
        self._welcome: asyncio.Future[calls.Welcome] = asyncio.get_running_loop().create_future()
        self._connecting: asyncio.Task[None] | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._num_unanswered = 0
        self._problem: str | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the connection is over; a new one is needed."""
        return self._problem is not None

    async def connected(self) -> None:
        """Wait until the node has let us in; raises `SandboxError` if it does not, or is not there."""
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
        await asyncio.shield(self._connecting)

    async def create(self, spec: SandboxSpec, *, key: str) -> "RemoteSandbox":
        """As `Node.create`."""
        sandbox_id = await self.call(calls.Create(self.number(), spec, key), str)
        return RemoteSandbox(self, sandbox_id)

    async def sandboxes(self) -> list[SandboxStatus]:
        """As `Node.sandboxes`."""
        return await self.call(calls.Status(self.number()), list[SandboxStatus])

    async def statistics(self) -> dict[str, float]:
        """As `Node.statistics`."""
        return await self.call(calls.Statistics(self.number()), dict[str, float])

    async def close(self) -> None:
        """Hang up. The node ends this session's sandboxes soon after, unless they were closed before."""
        for task in (self._connecting, self._pinging):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._stream is not None:
            self._stream.close()
        self._lose("the connection is closed")

    def number(self) -> int:
        """Of the next call."""
        return next(self._numbers)

    async def call(self, message: Any, kind: type[T]) -> T:
        """Ask, and wait for the answer. A call that is cancelled here is cancelled there."""
        if self._problem is not None:
            raise self._loss()
        waiting: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        self._calls[message.call] = waiting
        try:
            self.send(message)
            return msgspec.msgpack.decode(await waiting, type=kind)
        except asyncio.CancelledError:
            self.send(calls.Cancel(message.call))
            raise
        finally:
            self._calls.pop(message.call, None)

    def send(self, message: Any) -> None:
        """Say something that has no answer of its own."""
        if self._stream is not None:
            self._stream.send(message)

    def follow(self, call: int, process: "RemoteProcess") -> None:
        """The streams of this call are this program's."""
        self._processes[call] = process

    def unfollow(self, call: int) -> None:
        """Nobody cares any more."""
        self._processes.pop(call, None)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        stream: Stream[Any] = Stream(calls.ToClient, self._hear, self._lose)
        address = parse_address(self.address)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await connect(address, lambda: stream, ca_file=self._ca_file)
                self._stream = stream
                stream.send(calls.Hello(calls.VERSION, self._session, self._token))
                await self._welcome
        except (OSError, TimeoutError) as error:
            problem = f"{self.address}: {error or f'no answer within {CONNECT_SECONDS:g} s'}"
            self._lose(problem)
            raise SandboxError(f"no node to be had: {problem}", Outcome.NODE_LOST) from error
        self._pinging = loop.create_task(self._ping())

    async def _ping(self) -> None:
        """Each ping that goes unanswered was sent by a loop that ran: a stall of our own does not count."""
        for number in itertools.count(1):
            if self._num_unanswered >= MAX_UNANSWERED:
                assert self._stream is not None
                self._stream.close(f"no answer for {MAX_UNANSWERED * PING_SECONDS:g} s")
                return
            self._num_unanswered += 1
            self.send(calls.Ping(number))
            await asyncio.sleep(PING_SECONDS)

    def _hear(self, message: Any) -> None:
        self._num_unanswered = 0
        match message:
            case calls.Done(call, result):
                if (waiting := self._calls.get(call)) is not None and not waiting.done():
                    waiting.set_result(msgspec.Raw(bytes(result)))
            case calls.Failed(call):
                self._fail(message)
            case calls.Data(call, stream, data):
                if (process := self._processes.get(call)) is not None:
                    process.take(stream, data)
            case calls.Credit(call, _, num_bytes):
                if (process := self._processes.get(call)) is not None:
                    process.input_credit.give(num_bytes)
            case calls.Welcome():
                if not self._welcome.done():
                    self._welcome.set_result(message)

    def _fail(self, message: calls.Failed) -> None:
        error = error_of(message)
        if message.call == 0:
            if not self._welcome.done():
                self._welcome.set_exception(error)
        elif isinstance(error, BrokenPipeError) and (process := self._processes.get(message.call)) is not None:
            process.input_credit.fail(error)
        elif (waiting := self._calls.get(message.call)) is not None and not waiting.done():
            waiting.set_exception(error)

    def _loss(self) -> SandboxError:
        return SandboxError(f"the node at {self.address} is gone: {self._problem}", Outcome.NODE_LOST)

    def _lose(self, problem: str) -> None:
        if self._problem is not None:
            return
        self._problem = problem
        for waiting in self._calls.values():
            if not waiting.done():
                waiting.set_exception(self._loss())
        if not self._welcome.done():
            self._welcome.set_exception(self._loss())
            self._welcome.exception()  # nobody may be waiting for it
        for process in list(self._processes.values()):
            process.lose(self._loss())


class RemoteSandbox:
    """As `NodeSandbox`, from afar."""

    def __init__(self, node: RemoteNode, sandbox_id: str) -> None:
        self.sandbox_id = sandbox_id
        self._node = node
        self._is_closed = False
        self._final: SandboxUsage | None = None

    async def ready(self) -> None:
        await self._node.call(calls.UntilReady(self._node.number(), self.sandbox_id), type(None))

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
        message = calls.Exec(
            self._node.number(),
            self.sandbox_id,
            list(argv),
            stdin,
            dict(env or {}),
            cwd,
            timeout_seconds,
            kept_bytes,
        )
        return await self._node.call(message, ExecResult)

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        terminal: tuple[int, int] | None = None,
    ) -> "RemoteProcess":
        size = list(terminal) if terminal is not None else None
        message = calls.Spawn(self._node.number(), self.sandbox_id, list(argv), dict(env or {}), cwd, size)
        process = RemoteProcess(self._node, message)
        try:
            await process.started()
        except BaseException:  # a cancellation too: undo, then pass it on
            await process.close()
            raise
        return process

    async def python(self, code: str, *, timeout_seconds: float = 60.0) -> PythonResult:
        message = calls.Python(self._node.number(), self.sandbox_id, code, True, timeout_seconds)
        return await self._node.call(message, PythonResult)

    async def snippet(self, code: str, *, timeout_seconds: float = 60.0) -> ExecResult:
        message = calls.Python(self._node.number(), self.sandbox_id, code, False, timeout_seconds)
        return await self._node.call(message, ExecResult)

    async def read(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        return await self._node.call(calls.Read(self._node.number(), self.sandbox_id, path, max_bytes), bytes)

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> None:
        await self._node.call(calls.Write(self._node.number(), self.sandbox_id, path, data, mode), type(None))

    async def list(self, path: str = ".") -> tuple[FileEntry, ...]:
        return await self._node.call(calls.List(self._node.number(), self.sandbox_id, path), tuple[FileEntry, ...])

    async def remove(self, path: str, *, is_recursive: bool = False) -> None:
        await self._node.call(calls.Remove(self._node.number(), self.sandbox_id, path, is_recursive), type(None))

    async def pause(self) -> None:
        await self._node.call(calls.Pause(self._node.number(), self.sandbox_id, True), type(None))

    async def resume(self) -> None:
        await self._node.call(calls.Pause(self._node.number(), self.sandbox_id, False), type(None))

    async def renew(self, seconds: float) -> None:
        await self._node.call(calls.Renew(self._node.number(), self.sandbox_id, seconds), type(None))

    async def close(self) -> None:
        if not self._is_closed and not self._node.is_lost:  # with the node, it is gone already
            self._final = await self._node.call(calls.Destroy(self._node.number(), self.sandbox_id), SandboxUsage)
        self._is_closed = True

    async def usage(self) -> SandboxUsage:
        if self._final is not None:
            return self._final
        return await self._node.call(calls.Usage(self._node.number(), self.sandbox_id), SandboxUsage)


class RemoteProcess:
    """As `Process` of a cell, from afar. What nobody reads here is not sent from there."""

    def __init__(self, node: RemoteNode, message: calls.Spawn) -> None:
        self.input_credit = Credit()
        self._node = node
        self._call = message.call
        self._outputs: dict[int, asyncio.Queue[bytes | SandboxError]] = {1: asyncio.Queue(), 2: asyncio.Queue()}
        self._is_over = {1: False, 2: False}
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        node.follow(message.call, self)
        self._ended = asyncio.get_running_loop().create_task(node.call(message, int))
        self._ended.add_done_callback(self._end)

    async def started(self) -> None:
        """Wait until it runs; raises what stands in the way."""
        await asyncio.shield(self._started)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            size = await self.input_credit.take(min(len(view), CHUNK_BYTES))
            self._node.send(calls.Data(self._call, 0, bytes(view[:size])))
            view = view[size:]
        await self.input_credit.all_given()

    def end_input(self) -> None:
        self._node.send(calls.Data(self._call, 0, b""))

    async def read(self) -> bytes:
        return await self._read(1)

    async def read_error(self) -> bytes:
        return await self._read(2)

    async def wait(self) -> int:
        return await asyncio.shield(self._exited)

    def signal(self, number: int) -> None:
        self._node.send(calls.Signal(self._call, number))

    def interrupt(self) -> None:
        self.signal(signal.SIGINT)

    def kill(self) -> None:
        self.signal(0)

    def resize(self, rows: int, columns: int) -> None:
        self._node.send(calls.Resize(self._call, rows, columns))

    async def close(self) -> None:
        self._ended.cancel()
        await asyncio.wait([self._ended])
        self._node.unfollow(self._call)

    def take(self, stream: int, data: bytes) -> None:
        """A piece of a stream has come, an empty one at its end; or that the program runs, or with which code it ended."""
        if stream == 0:
            if not self._started.done():
                self._started.set_result(None)
        elif stream == 3:
            if not self._exited.done():
                self._exited.set_result(int(data))
        else:
            self._outputs[stream].put_nowait(data)

    def lose(self, error: SandboxError) -> None:
        """The node is gone."""
        self.input_credit.fail(error)
        for output in self._outputs.values():
            output.put_nowait(error)

    async def _read(self, stream: int) -> bytes:
        if self._is_over[stream]:
            return b""
        data = await self._outputs[stream].get()
        if isinstance(data, SandboxError):
            self._outputs[stream].put_nowait(data)
            raise SandboxError(str(data), data.outcome)
        if not data:
            self._is_over[stream] = True
        else:
            self._node.send(calls.Credit(self._call, stream, len(data)))
        return data

    def _end(self, task: "asyncio.Task[int]") -> None:
        error = None if task.cancelled() else task.exception()
        if not self._started.done():
            self._started.set_exception(error or SandboxError("the program was given up"))
            self._started.exception()
        if not self._exited.done():
            self._exited.set_exception(error or SandboxError("the program was given up"))
            self._exited.exception()
        self.input_credit.fail(BrokenPipeError("the program has ended"))
        for output in self._outputs.values():
            output.put_nowait(error if isinstance(error, SandboxError) else b"")
