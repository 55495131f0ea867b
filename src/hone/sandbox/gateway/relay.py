"""Frames that are handed on as they came: of each only the head is read, which says where it belongs."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Hashable
from enum import Enum
from typing import get_args

import msgspec

from hone.sandbox.wire.addresses import peer_uid
from hone.sandbox.wire.frames import MAX_FRAME_BYTES, MAX_UNSENT_BYTES, framed, notice_dead_machines
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
FOLLOWING = {"Signal", "Resize", "Cancel", "Data", "Credit", "Received"}


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


def head_of(frame: bytes) -> Head:
    """The head of a frame; `msgspec.MsgspecError` if it has none."""
    return _HEADS.decode(memoryview(frame)[4:])


def prefix_of(sandbox_id: str) -> str:
    """The part of a sandbox's or a snapshot's id that is its node's; empty if there is none."""
    return sandbox_id[: sandbox_id.rfind(".") + 1]


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
        self.handed: list[Frames] = []
        """The connections that have got something with `hand` from what is being heard."""
        self.is_full = False
        self._hear = hear
        self._lose = lose
        self._press = press
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._holders: set[Hashable] = set()
        self._out: list[bytes] = []
        self._num_silences = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            notice_dead_machines(connection)
        if self._holders:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self._num_silences = 0
        if self._received:
            self._received += data
            taken = self._cut(self._received)
            del self._received[:taken]
        elif (taken := self._cut(data)) < len(data):
            self._received += data[taken:]
        self.flush_handed()

    def _cut(self, data: bytes | bytearray) -> int:
        """Hear the whole frames at the beginning; how long they are."""
        begin = 0
        while self._transport is not None and len(data) - begin >= 4:
            end = begin + 4 + int.from_bytes(data[begin : begin + 4], "little")
            if end - begin - 4 > self.max_bytes:
                self.close(f"a frame of {end - begin - 4} bytes")
                break
            if end > len(data):
                break
            self._hear(bytes(data[begin:end]))
            begin = end
        return begin

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

    def hand(self, frame: bytes, giver: "Frames") -> None:
        """Hand a frame on, together with others that the giver hears at the same time."""
        if not self._out:
            giver.handed.append(self)
        self._out.append(frame)

    def flush_handed(self) -> None:
        """Send what others were handed by this one."""
        for other in self.handed:
            other.flush()
        self.handed.clear()

    def flush(self) -> None:
        """Send what was handed on."""
        frames, self._out = self._out, []
        if self._transport is not None and frames:
            self._transport.write(frames[0] if len(frames) == 1 else b"".join(frames))

    def write(self, frame: bytes) -> None:
        """Send a frame. Nothing happens when the connection is over: `lose` has said so."""
        self.flush()
        if self._transport is not None:
            self._transport.write(frame)

    def count_silence(self) -> int:
        """How often in a row this was called and nothing had come since; nothing comes while somebody holds."""
        if not self._holders:
            self._num_silences += 1
        return self._num_silences - 1

    def say(self, message: msgspec.Struct) -> None:
        """A message of our own."""
        self.write(framed(message))

    def close(self, problem: str = "the connection is closed") -> None:
        """End the connection when all is written; `lose` hears of it now."""
        if self._transport is not None:
            self.flush()
            transport, self._transport = self._transport, None
            transport.close()
            self._lose(problem)

    def abort(self, problem: str) -> None:
        """End the connection without waiting for a side that takes nothing."""
        if (transport := self._transport) is not None:
            self._out.clear()
            self.close(problem)
            with contextlib.suppress(RuntimeError):
                transport.abort()

    def peer_uid(self) -> int | None:
        """The user at the other end, where the kernel tells."""
        return peer_uid(self._transport.get_extra_info("socket")) if self._transport is not None else None
