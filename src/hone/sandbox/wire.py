"""Messages over a stream of bytes, in frames; errors as messages and back; credit for what is streamed."""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from hone.sandbox.addresses import peer_uid
from hone.sandbox.beneath import PROBLEMS
from hone.sandbox.errors import Busy, SandboxError
from hone.schema.sandbox_calls import Failed
from hone.schema.sandboxes import Outcome

MAX_FRAME_BYTES = 80 << 20
WINDOW_BYTES = 256 << 10
CHUNK_BYTES = 64 << 10
T = TypeVar("T")


class Stream(asyncio.Protocol, Generic[T]):
    """One connection. Every frame is the length of a message in four bytes and the message.

    kind: of the messages that come. hear: is given each. lose: is called once, when the connection is over.
    """

    def __init__(self, kind: Any, hear: Callable[[T], None], lose: Callable[[str], None]) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._hear = hear
        self._lose = lose
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._problem = "the connection is closed"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._received += data
        begin = 0
        while self._transport is not None and len(self._received) - begin >= 4:
            size = int.from_bytes(self._received[begin : begin + 4], "little")
            if size > MAX_FRAME_BYTES:
                self.close(f"a frame of {size} bytes")
                return
            if len(self._received) - begin - 4 < size:
                break
            try:
                message = self._decoder.decode(bytes(self._received[begin + 4 : begin + 4 + size]))
            except msgspec.MsgspecError as error:
                self.close(f"an unreadable message: {error}")
                return
            begin += 4 + size
            self._hear(message)
        del self._received[:begin]

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._transport = None
            self._lose(str(error) if error is not None else self._problem)

    def send(self, message: msgspec.Struct) -> None:
        """Nothing happens when the connection is over: `lose` has said so."""
        if self._transport is not None:
            data = self._encoder.encode(message)
            self._transport.write(len(data).to_bytes(4, "little") + data)

    def close(self, problem: str = "the connection is closed") -> None:
        """End the connection; `lose` hears of it now."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()
            self._lose(problem)

    def peer_uid(self) -> int | None:
        """The user at the other end, where the kernel tells."""
        return peer_uid(self._transport.get_extra_info("socket")) if self._transport is not None else None


class Credit:
    """How many bytes the other side still takes; whoever wants to send waits for some."""

    def __init__(self, num_bytes: int = WINDOW_BYTES) -> None:
        self._total = self._left = num_bytes
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._error: Exception | None = None

    @property
    def is_used_up(self) -> bool:
        """Whether the other side has to deal with what it was sent first."""
        return self._left == 0

    async def take(self, max_bytes: int) -> int:
        """Use up to so many; returns when there is at least one."""
        while self._left == 0:
            await self._change()
        if self._error is not None:
            raise self._error
        taken = min(self._left, max_bytes)
        self._left -= taken
        return taken

    def give(self, num_bytes: int) -> None:
        """The other side takes so many more."""
        self._left += num_bytes
        self._wake()

    async def all_given(self) -> None:
        """Wait until the other side has dealt with everything it was sent."""
        while self._left < self._total:
            await self._change()
        if self._error is not None:
            raise self._error

    def fail(self, error: Exception) -> None:
        """Nothing will be taken any more."""
        self._error = error
        self._left = self._total
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


def failed(call: int, error: Exception) -> Failed:
    """An error as a message."""
    if isinstance(error, Busy):
        return Failed(call, "busy", str(error), error.outcome, error.retry_after_seconds)
    if isinstance(error, SandboxError):
        return Failed(call, "sandbox", str(error), error.outcome)
    if isinstance(error, BrokenPipeError):
        return Failed(call, "broken_pipe", str(error))
    if isinstance(error, OSError):
        return Failed(call, "os", error.strerror or str(error), number=float(error.errno or 5))
    if isinstance(error, ValueError):
        return Failed(call, "value", str(error))
    return Failed(call, "sandbox", f"{type(error).__name__}: {error}", Outcome.AGENT_LOST)


def error_of(message: Failed) -> Exception:
    """The error that `failed` was given, or what is left of it."""
    match message.kind:
        case "busy":
            error = Busy("", message.number)
            error.args = (message.message,)
            return error
        case "sandbox":
            return SandboxError(message.message, Outcome(message.outcome))
        case "broken_pipe":
            return BrokenPipeError(message.message)
        case "os":
            number = int(message.number)
            problem = PROBLEMS.get(number)
            return problem(message.message) if problem is not None else OSError(number, message.message)
        case _:
            return ValueError(message.message)
