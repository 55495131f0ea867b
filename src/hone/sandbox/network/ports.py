"""Connections from outside to the ports that a sandbox's programs listen at."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol, Self

from hone.sandbox.cells.cell import Cell
from hone.sandbox.errors import SandboxError
from hone.sandbox.network.exchange import Peer, both

READ_BYTES = 64 << 10
RETRY_SECONDS = 0.02
MAX_CONNECTIONS = 256
BROKEN = 1


class Connection:
    """A connection to a port of a cell, with the streams of a `Process`: it has ended when both directions have.

    The node's end of it was made outside of the cell and is not shared with it.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._is_input_over = False
        self._is_output_over = False
        self._broken: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def write(self, data: bytes) -> None:
        """Send; returns when the kernel has taken it, or nearly. `BrokenPipeError` if nobody reads."""
        try:
            self._peer.writer.write(data)
            await self._peer.writer.drain()
        except OSError as error:
            raise BrokenPipeError(f"the connection broke: {error}") from error

    def end_input(self) -> None:
        """The other side will read the end."""
        with contextlib.suppress(OSError):
            self._peer.writer.write_eof()
        self._is_input_over = True
        self._settle()

    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        """The next piece; empty at the end, also where the connection broke: `read_error` has then something."""
        data, problem = b"", b""
        try:
            data = await self._peer.reader.read(max_bytes)
        except OSError as error:
            problem = str(error).encode() or b"it broke"
        if not data:
            self._is_output_over = True
            if not self._broken.done():
                self._broken.set_result(problem)
            self._settle(BROKEN if problem else 0)
        return data

    async def read_error(self, max_bytes: int = READ_BYTES) -> bytes:
        """What broke it, once; empty if nothing did, when the other side has ended."""
        problem = await asyncio.shield(self._broken)
        self._broken = asyncio.get_running_loop().create_future()
        self._broken.set_result(b"")
        return problem[:max_bytes]

    async def wait(self) -> int:
        """Until it has ended: 0, or another number if it broke."""
        return await asyncio.shield(self._ended)

    def signal(self, number: int) -> None:
        """Nothing is there to signal."""

    def resize(self, rows: int, columns: int) -> None:
        """It has no terminal."""

    def kill(self) -> None:
        """Break it off."""
        self._peer.writer.transport.abort()
        if not self._broken.done():
            self._broken.set_result(b"it was broken off")
        if not self._ended.done():
            self._ended.set_result(BROKEN)

    async def close(self) -> None:
        """Hang up. Harmless when repeated."""
        self._peer.writer.close()
        if not self._broken.done():
            self._broken.set_result(b"")
        if not self._ended.done():
            self._ended.set_result(0)
        await self._peer.hang_up()

    def _settle(self, code: int = 0) -> None:
        if not self._ended.done() and (code or (self._is_input_over and self._is_output_over)):
            self._ended.set_result(code)


async def dial(cell: Cell, port: int, timeout_seconds: float) -> Connection:
    """A connection to a port of a cell; where nobody listens yet, it is tried again for so long. Raises `OSError`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    while True:
        try:
            made = await cell.connect(port)
        except ConnectionRefusedError:
            if loop.time() >= deadline:
                raise
        else:
            return Connection(await _peer(made))
        await asyncio.sleep(RETRY_SECONDS)


class Stream(Protocol):
    """What is written to and read from: a connection to a port of a sandbox, here or on a node."""

    async def write(self, data: bytes) -> None: ...
    def end_input(self) -> None: ...
    async def read(self) -> bytes: ...
    async def close(self) -> None: ...


class Forwarding:
    """A port of this machine's loopback that leads to one of a sandbox; an async context manager.

    connect: makes a connection to the sandbox's port. local_port: 0 is a free one; `port` says which.
    """

    def __init__(self, connect: Callable[[], Awaitable[Stream]], local_port: int = 0) -> None:
        self.port = local_port
        self._connect = connect
        self._server: asyncio.Server | None = None
        self._carrying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        carrying = asyncio.get_running_loop().create_task(self._carry(Peer(reader, writer)))
        self._carrying.add(carrying)
        carrying.add_done_callback(self._carrying.discard)

    async def _carry(self, client: Peer) -> None:
        stream = None
        try:
            stream = await self._connect()
            await both(_up(client, stream), _down(stream, client))
        except (OSError, SandboxError):  # whoever connected here sees the connection end
            client.writer.transport.abort()
        finally:
            if stream is not None:
                await stream.close()
            await client.hang_up()


async def _up(client: Peer, stream: Stream) -> None:
    while data := await client.reader.read(READ_BYTES):
        await stream.write(data)
    stream.end_input()


async def _down(stream: Stream, client: Peer) -> None:
    while data := await stream.read():
        client.writer.write(data)
        await client.writer.drain()
    client.writer.write_eof()


async def _peer(connected: socket.socket) -> Peer:
    try:
        return Peer(*await asyncio.open_connection(sock=connected))
    except BaseException:  # a cancellation too: undo, then pass it on
        connected.close()
        raise
