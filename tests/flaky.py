"""A node that only counts what it does, connections that break where they are told to, and time that does not pass."""

import asyncio
import contextlib
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hone.sandbox.errors import SandboxError
from hone.sandbox.wire.remote import RemoteNode
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandboxes import ExecResult, Outcome, PythonResult, SandboxSpec, Usage

LATENCY_SECONDS = 0.002
T = TypeVar("T")


class ImpatientLoop(asyncio.SelectorEventLoop):
    """Where everybody would wait for a time, it is that time already."""

    def __init__(self) -> None:
        self._now = 0.0
        loop = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                if events := super().select(0):
                    return events
                assert timeout is not None, "everybody waits, and for nothing"
                loop._now += max(0.0, timeout)
                return []

        super().__init__(Selector())

    def time(self) -> float:
        return self._now


def run(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, without waiting; for an hour of its time at most. Nothing may fail unseen."""
    troubles: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=ImpatientLoop) as runner:
        runner.get_loop().set_exception_handler(lambda _, trouble: troubles.append(trouble))
        result = runner.run(asyncio.wait_for(work, 3600))
    assert troubles == []
    return result


@dataclass
class CountingNode:
    """As `Node`; what was done is in `effects`."""

    prefix: str = "n.1."
    effects: list[object] = field(default_factory=list)
    boxes: dict[str, "CountingSandbox"] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def create(self, spec: SandboxSpec, *, key: str, owner: str, snapshot_id: str = "") -> "CountingSandbox":
        if key not in self.keys:
            self.effects.append("create")
            box = CountingSandbox(self, f"{self.prefix}{len(self.boxes)}", Lease(owner))
            self.boxes[box.sandbox_id] = box
            self.keys[key] = box.sandbox_id
        return self.boxes[self.keys[key]]

    def sandbox(self, sandbox_id: str) -> "CountingSandbox":
        if sandbox_id not in self.boxes:
            raise SandboxError(f"{sandbox_id}: there is no such sandbox")
        return self.boxes[sandbox_id]

    def sandboxes(self, owner: str | None) -> list[object]:
        return []

    def statistics(self) -> dict[str, float]:
        return {}

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def end(self, sandbox: "CountingSandbox", problem: str, reason: object) -> None:
        self.effects.append(("end", problem))


@dataclass(frozen=True)
class Lease:
    owner: str


class CountingSandbox:
    def __init__(self, node: CountingNode, sandbox_id: str, lease: Lease) -> None:
        self.sandbox_id = sandbox_id
        self.lease = lease
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._node = node

    async def exec(self, argv: list[str], **_: object) -> ExecResult:
        self._node.effects.append(tuple(argv))
        try:
            await asyncio.sleep(float(argv[1]) if argv[0] == "sleep" else 0.01)
        except asyncio.CancelledError:
            self._node.effects.append("cancelled")
            raise
        stdout = "x" * int(argv[1]) if argv[0] == "print" else argv[0]
        return ExecResult(Outcome.EXITED, 0, stdout, "", Usage(0.0, 0.0, 0))

    async def python(self, code: str, *, timeout_seconds: float) -> PythonResult:
        self._node.effects.append(code)
        return PythonResult(code, True)

    async def write(self, path: str, data: bytes, *, mode: int | None) -> None:
        self._node.effects.append((path, data))

    async def spawn(self, argv: list[str], **_: object) -> "EchoingProcess":
        self._node.effects.append(("spawn", *argv))
        return EchoingProcess(self._node, int(argv[1]))


class EchoingProcess:
    """As `Process`, of a program like `tee /dev/stderr`, with pipes of so many bytes; it ends with its input, code 7."""

    def __init__(self, node: CountingNode, pipe_bytes: int) -> None:
        self._node = node
        self._pipe_bytes = pipe_bytes
        self._pipes = (bytearray(), bytearray())
        self._is_over = False
        self._change = asyncio.Condition()

    async def write(self, data: bytes) -> None:
        for begin in range(0, len(data), self._pipe_bytes):
            piece = data[begin : begin + self._pipe_bytes]
            async with self._change:
                await self._change.wait_for(lambda: not any(self._pipes))
                for pipe in self._pipes:
                    pipe.extend(piece)
                self._change.notify_all()

    def end_input(self) -> None:
        self._is_over = True
        asyncio.get_running_loop().create_task(self._wake())

    async def read(self, max_bytes: int) -> bytes:
        return await self._read(self._pipes[0], max_bytes)

    async def read_error(self, max_bytes: int) -> bytes:
        return await self._read(self._pipes[1], max_bytes)

    async def wait(self) -> int:
        async with self._change:
            await self._change.wait_for(lambda: self._is_over and not any(self._pipes))
        return 7

    def signal(self, number: int) -> None:
        self._node.effects.append(("signal", number))

    def kill(self) -> None:
        self._node.effects.append("kill")

    def resize(self, rows: int, columns: int) -> None:
        self._node.effects.append(("size", rows, columns))

    async def close(self) -> None:
        self._node.effects.append("closed")

    async def _read(self, pipe: bytearray, max_bytes: int) -> bytes:
        async with self._change:
            await self._change.wait_for(lambda: bool(pipe) or self._is_over)
            data = bytes(pipe[:max_bytes])
            del pipe[:max_bytes]
            self._change.notify_all()
        return data

    async def _wake(self) -> None:
        async with self._change:
            self._change.notify_all()


@dataclass(frozen=True)
class Cut:
    """A connection breaks when so many bytes have gone one way."""

    to_node: bool
    after_bytes: int


class Network:
    """Between a client and a node. cuts: of the first connection, the second, and so on; all later ones hold."""

    def __init__(self, server: NodeServer, cuts: list[Cut]) -> None:
        self.server = server
        self.frames: dict[bool, list[int]] = {True: [], False: []}
        """How long the frames of the first connection were, to the node and from it."""
        self.num_connections = 0
        self.refusal: Exception | None = None
        self._cuts = cuts
        self._last: _Wire | None = None

    async def connect(self, make: Callable[[], asyncio.Protocol]) -> None:
        await asyncio.sleep(0.001)
        if self.refusal is not None:
            raise self.refusal
        cut = self._cuts[self.num_connections] if self.num_connections < len(self._cuts) else None
        self.num_connections += 1
        self._last = _Wire(self, cut, make(), self.server.accept())

    def client(self, token: str = "secret", **options: Any) -> RemoteNode:
        return RemoteNode("tcp://nowhere:1", token, connector=self.connect, **options)

    def cut(self) -> None:
        """The last connection breaks."""
        assert self._last is not None
        self._last.cut()

    def hush(self) -> None:
        """The last connection carries nothing any more, and nobody is told."""
        assert self._last is not None
        self._last.is_still = True


class _Wire:
    def __init__(self, network: Network, cut: Cut | None, client: asyncio.Protocol, node: asyncio.Protocol) -> None:
        self.network = network
        self._is_first = network.num_connections == 1
        self._break = cut
        self._ends = {True: _End(self, True), False: _End(self, False)}
        self._protocols = {True: node, False: client}
        self._num_bytes = {True: 0, False: 0}
        self._under_way: dict[bool, deque[bytes]] = {True: deque(), False: deque()}
        self.is_cut = False
        self.is_still = False
        node.connection_made(self._ends[False])
        client.connection_made(self._ends[True])

    def send(self, to_node: bool, data: bytes) -> None:
        if self._is_first and data:
            self.network.frames[to_node] += _frames(data)
        self._under_way[to_node].append(data)
        asyncio.get_running_loop().call_later(LATENCY_SECONDS, self._arrive, to_node)

    def cut(self) -> None:
        if not self.is_cut:
            self.is_cut = True
            for protocol in self._protocols.values():
                asyncio.get_running_loop().call_soon(protocol.connection_lost, None)

    def _arrive(self, to_node: bool) -> None:
        data = self._under_way[to_node].popleft()
        if self.is_cut or self.is_still:
            return
        size = len(data)
        is_end = False
        if self._break is not None and self._break.to_node == to_node:
            size = min(size, self._break.after_bytes - self._num_bytes[to_node])
            is_end = self._num_bytes[to_node] + size == self._break.after_bytes
        self._num_bytes[to_node] += size
        if size:
            self._protocols[to_node].data_received(data[:size])
        if is_end:
            self.cut()


class _End(asyncio.Transport):
    def __init__(self, wire: _Wire, to_node: bool) -> None:
        super().__init__()
        self._wire = wire
        self._to_node = to_node
        self._is_closing = False

    def is_closing(self) -> bool:
        return self._is_closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._wire.send(self._to_node, bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def close(self) -> None:
        self._is_closing = True
        asyncio.get_running_loop().call_later(2 * LATENCY_SECONDS, self._wire.cut)

    def abort(self) -> None:
        self._is_closing = True
        self._wire.cut()


def _frames(data: bytes) -> list[int]:
    sizes = []
    while data:
        sizes.append(4 + int.from_bytes(data[:4], "little"))
        data = data[sizes[-1] :]
    return sizes


@contextlib.asynccontextmanager
async def network(cuts: list[Cut] | None = None, node: CountingNode | None = None, **options: Any) -> Any:
    """A network with a node that nobody but its clients can reach."""
    server = NodeServer(node or CountingNode(), "tcp://nowhere:1", tokens={"secret": "me", "other": "you"}, **options)
    yield Network(server, cuts or [])
    for client in list(server._clients.values()):
        await client.session.close()
