"""Messages over a stream of bytes, in frames; errors as messages and back."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.files.beneath import PROBLEMS
from hone.sandbox.wire.addresses import peer_uid
from hone.schema.sandbox_calls import Failed
from hone.schema.sandboxes import Outcome

MAX_FRAME_BYTES = 80 << 20
MAX_UNSENT_BYTES = 1 << 20
DEAD_MACHINE_SECONDS = 30
T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()


def framed(message: msgspec.Struct) -> bytes:
    """A frame: the length of a message in four bytes, and the message. `ValueError` if it is too long for one."""
    data = _encoder.encode(message)
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(data)} bytes; at most {MAX_FRAME_BYTES} go at once")
    return len(data).to_bytes(4, "little") + data


class Stream(asyncio.Protocol, Generic[T]):
    """One connection.

    kind: of the messages that come. hear: is given each; a `ValueError` from it ends the connection. lose: is called
    once, when the connection is over. max_frame_bytes: of what comes; may be changed at any time. stops_when_full: read
    no more while the other side does not read. Only one side of a connection may do so, or both would wait for one
    another.
    """

    def __init__(
        self,
        kind: Any,
        hear: Callable[[T], None],
        lose: Callable[[str], None],
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        stops_when_full: bool = False,
    ) -> None:
        self.max_frame_bytes = max_frame_bytes
        self.frame_bytes = 0
        """How long the message is that is being heard."""
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._hear = hear
        self._lose = lose
        self._stops_when_full = stops_when_full
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._num_silences = 0
        self._is_full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            notice_dead_machines(connection)

    def data_received(self, data: bytes) -> None:
        self._num_silences = 0
        self._received += data
        begin = 0
        while self._transport is not None and len(self._received) - begin >= 4:
            size = int.from_bytes(self._received[begin : begin + 4], "little")
            if size > self.max_frame_bytes:
                self.close(f"a frame of {size} bytes")
                return
            if len(self._received) - begin - 4 < size:
                break
            frame = bytes(self._received[begin + 4 : begin + 4 + size])
            begin += 4 + size
            self.frame_bytes = size
            try:
                self._hear(self._decoder.decode(frame))
            except (msgspec.MsgspecError, ValueError) as error:
                self.close(f"a message that makes no sense: {error}")
                return
        del self._received[:begin]

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._transport = None
            self._lose(str(error) if error is not None else "the other side has closed the connection")

    def pause_writing(self) -> None:
        self._is_full = True
        if self._stops_when_full and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_full = False
        if self._stops_when_full and self._transport is not None:
            self._transport.resume_reading()

    def send(self, message: msgspec.Struct) -> None:
        """Nothing happens when the connection is over: `lose` has said so."""
        self.write(framed(message))

    def write(self, frames: bytes) -> None:
        """As `send`, of what is `framed` already."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frames)

    def count_silence(self) -> int:
        """How often in a row this was called and nothing had come since the time before.

        Called by a timer, it measures silence without mistaking a stall of this process for one: after a stall the timer
        comes once, and what has come meanwhile is heard before it comes again.
        """
        if not (self._is_full and self._stops_when_full):
            self._num_silences += 1
        return self._num_silences - 1

    def close(self, problem: str = "the connection is closed") -> None:
        """End the connection; `lose` hears of it now. What was sent still leaves, unless the other side reads nothing."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            if self._is_full:
                transport.abort()
            else:
                transport.close()
            self._lose(problem)

    def peer_uid(self) -> int | None:
        """The user at the other end, where the kernel tells."""
        return peer_uid(self._transport.get_extra_info("socket")) if self._transport is not None else None


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
        case "cancelled":
            return SandboxError(message.message)
        case "broken_pipe":
            return BrokenPipeError(message.message)
        case "os":
            number = int(message.number)
            problem = PROBLEMS.get(number)
            return problem(message.message) if problem is not None else OSError(number, message.message)
        case _:
            return ValueError(message.message)


def notice_dead_machines(connection: socket.socket) -> None:
    """The kernel asks the other side's, which answers even while its program is busy or stopped."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_MACHINE_SECONDS * 1000)
