"""Frames that are handed on as they came: of each only the head is read, which says where it belongs."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Hashable
from enum import Enum
from typing import get_args

import msgspec

from hone.sandbox.addresses import peer_uid
from hone.sandbox.wire import MAX_FRAME_BYTES, WINDOW_BYTES
from hone.schema import sandbox_calls as calls


class Head(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The beginning of every message but the greetings. about: of a call about a sandbox, its id."""

    kind: str
    call: int
    about: msgspec.Raw = msgspec.Raw(b"")


class Route(Enum):
    """Where a message to a node belongs."""

    SANDBOX = "sandbox"
    """To the node whose prefix the sandbox's id has; so do the messages of this call that follow."""
    CALL = "call"
    """To the node that the call went to."""
    GATEWAY = "gateway"
    """It is the gateway's own to answer."""


OWN = {"Hello", "Create", "Status", "Statistics", "Ping", "Report", "Drain"}
FOLLOWING = {"Signal", "Resize", "Cancel", "Data", "Credit"}


def routes() -> dict[str, Route]:
    """By the name of the message; a name that is not here is not understood."""
    found = {}
    for kind in get_args(calls.ToNode):
        if kind.__name__ in OWN:
            found[kind.__name__] = Route.GATEWAY
        elif kind.__struct_fields__[:2] == ("call", "sandbox_id"):
            found[kind.__name__] = Route.SANDBOX
        elif kind.__name__ in FOLLOWING:
            found[kind.__name__] = Route.CALL
    return found


_HEADS = msgspec.msgpack.Decoder(Head)
_ENCODER = msgspec.msgpack.Encoder()


def head_of(frame: bytes) -> Head:
    """The head of a frame; `msgspec.MsgspecError` if it has none."""
    return _HEADS.decode(memoryview(frame)[4:])


def _size(data: bytes | bytearray, begin: int = 0) -> int:
    return int.from_bytes(data[begin : begin + 4], "little")


def frame_of(message: msgspec.Struct) -> bytes:
    """A message as a frame."""
    data = _ENCODER.encode(message)
    return len(data).to_bytes(4, "little") + data


class Frames(asyncio.Protocol):
    """One connection. hear: is given each frame, whole. lose: is called once, when the connection is over.

    press: is told when the other side does not take what is written (true), and when it does again (false): who writes
    shall stop reading what it writes. max_bytes: of a frame; may be changed.
    """

    def __init__(
        self,
        hear: Callable[[bytes], None],
        lose: Callable[[str], None],
        press: Callable[[bool], None],
        *,
        max_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self.max_bytes = max_bytes
        self.is_full = False
        self._hear = hear
        self._lose = lose
        self._press = press
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._holders: set[Hashable] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WINDOW_BYTES)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._holders:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        if not self._received and 4 <= len(data) <= self.max_bytes and len(data) - 4 == _size(data):
            self._hear(data)  # nearly always: what was written as one frame is read as one
            return
        self._received += data
        begin = 0
        while self._transport is not None and len(self._received) - begin >= 4:
            size = _size(self._received, begin)
            if size > self.max_bytes:
                self.close(f"a frame of {size} bytes")
                return
            if len(self._received) - begin - 4 < size:
                break
            frame = bytes(memoryview(self._received)[begin : begin + 4 + size])
            begin += 4 + size
            self._hear(frame)
        del self._received[:begin]

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._transport = None
            self._lose(str(error) if error is not None else "the connection is closed")

    def pause_writing(self) -> None:
        self.is_full = True
        self._press(True)

    def resume_writing(self) -> None:
        self.is_full = False
        self._press(False)

    @property
    def is_held(self) -> bool:
        """Whether nothing is read at the moment."""
        return bool(self._holders)

    def hold(self, holder: Hashable) -> None:
        """Read nothing more until everybody who said so has said `release`."""
        if not self._holders and self._transport is not None:
            self._transport.pause_reading()
        self._holders.add(holder)

    def release(self, holder: Hashable) -> None:
        """As far as this one is concerned, read on."""
        if holder in self._holders:
            self._holders.discard(holder)
            if not self._holders and self._transport is not None:
                self._transport.resume_reading()

    def write(self, frame: bytes) -> None:
        """Hand a frame on. Nothing happens when the connection is over: `lose` has said so."""
        if self._transport is not None:
            self._transport.write(frame)

    def say(self, message: msgspec.Struct) -> None:
        """A message of our own."""
        self.write(frame_of(message))

    def close(self, problem: str = "the connection is closed") -> None:
        """End the connection when all is written; `lose` hears of it now."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()
            self._lose(problem)

    def abort(self, problem: str) -> None:
        """End the connection without waiting for a side that takes nothing."""
        if (transport := self._transport) is not None:
            self.close(problem)
            with contextlib.suppress(RuntimeError):
                transport.abort()

    def peer_uid(self) -> int | None:
        """The user at the other end, where the kernel tells."""
        return peer_uid(self._transport.get_extra_info("socket")) if self._transport is not None else None
