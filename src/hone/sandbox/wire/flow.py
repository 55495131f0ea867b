"""Bytes of a stream on their way: no more than the other side has room for, and kept until it has taken them."""

import asyncio
from collections import deque

from hone.sandbox.errors import SandboxError

WINDOW_BYTES = 256 << 10
CHUNK_BYTES = 64 << 10


class Outgoing:
    """The sending end of a stream. It never holds more than its window; whoever wants to send waits for room."""

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        self.num_sent = 0
        self.num_taken = 0
        self._window_bytes = window_bytes
        self._kept = bytearray()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._error: Exception | None = None

    @property
    def room(self) -> int:
        """How many bytes the other side still takes."""
        return self._window_bytes - len(self._kept)

    async def until_room(self) -> int:
        """Wait until there is room for a byte at least; how much there is."""
        while self._error is None and not self.room:
            await self._change()
        if self._error is not None:
            raise self._error
        return self.room

    async def until_taken(self) -> None:
        """Wait until the other side has taken everything."""
        while self._error is None and self._kept:
            await self._change()
        if self._error is not None:
            raise self._error

    def add(self, data: bytes) -> None:
        """These bytes, for which there is room, are being sent."""
        assert len(data) <= self.room
        self._kept += data
        self.num_sent += len(data)

    def take(self, num_bytes: int) -> None:
        """The other side has taken so many more; `ValueError` if it was never sent so many."""
        if not 0 <= num_bytes <= len(self._kept):
            raise ValueError(f"{num_bytes} bytes are said to be taken, {len(self._kept)} were on their way")
        del self._kept[:num_bytes]
        self.num_taken += num_bytes
        self._wake()

    def resume(self, num_received: int, num_taken: int) -> list[bytes]:
        """What has to be sent again to somebody whom so many bytes have reached; `ValueError` if that cannot be."""
        if not self.num_taken <= num_taken <= num_received <= self.num_sent:
            raise ValueError(
                f"{num_received} bytes are said to have come and {num_taken} to be taken, "
                f"of {self.num_sent} that were sent and {self.num_taken} that were taken before"
            )
        self.take(num_taken - self.num_taken)
        begin = num_received - self.num_taken
        return [bytes(self._kept[at : at + CHUNK_BYTES]) for at in range(begin, len(self._kept), CHUNK_BYTES)]

    def fail(self, error: Exception) -> None:
        """Nothing will be taken any more; whoever waits is told so."""
        self._error = error
        self._wake()

    async def _change(self) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await waiting

    def _wake(self) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)


class Incoming:
    """The receiving end of a stream: what has come and was not read yet.

    num_told: how much of what was read the sender knows to be read.
    """

    def __init__(self) -> None:
        self.num_received = 0
        self.num_read = 0
        self.num_told = 0
        self._pieces: deque[bytes] = deque()
        self._is_over = False
        self._error: SandboxError | None = None
        self._change = asyncio.Event()

    def add(self, data: bytes) -> None:
        """A piece has come; an empty one is the end."""
        if data:
            self.num_received += len(data)
            self._pieces.append(data)
            self._change.set()
        else:
            self.end(None)

    def end(self, error: SandboxError | None) -> None:
        """Nothing more will come; whoever reads is told so, or why."""
        if not self._is_over:
            self._is_over = True
            self._error = error
            self._change.set()

    async def read(self) -> bytes:
        """The next piece; empty at the end."""
        while not self._pieces and not self._is_over:
            self._change.clear()
            await self._change.wait()
        if self._pieces:
            data = self._pieces.popleft()
            self.num_read += len(data)
            return data
        if self._error is not None:
            raise SandboxError(str(self._error), self._error.outcome)
        return b""
