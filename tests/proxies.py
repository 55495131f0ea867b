"""A TCP proxy before a node that loses connections as networks do."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self


class Proxy:
    """Carries bytes between its clients and a port. is_closed: it ends connections as soon as they are made.

    num_carried: bytes, both ways. cut_every: after so many of them all connections break, over and over.
    """

    def __init__(self, port: int) -> None:
        self.port = 0
        self.is_closed = False
        self.num_carried = 0
        self.cut_every: int | None = None
        self._next_cut = 0
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """All connections break; what is on its way is lost."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def stall(self) -> None:
        """Nothing is carried any more, and nobody is told."""
        self._flowing.clear()

    def restore(self) -> None:
        """New connections are carried; those that stalled stay as they are until they are cut."""
        for task in self._tasks:
            task.cancel()
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_closed:
            writer.transport.abort()
            return
        try:
            other_reader, other = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, other}
        for one, two in ((reader, other), (other_reader, writer)):
            task = asyncio.get_running_loop().create_task(self._carry(one, two))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
                self._count(len(data))
            writer.close()

    def _count(self, num_bytes: int) -> None:
        self.num_carried += num_bytes
        if self.cut_every is not None and self.num_carried >= self._next_cut:
            self._next_cut = self.num_carried + self.cut_every
            self.cut()
