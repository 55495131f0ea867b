"""A ZeroMQ ROUTER in an asyncio loop, without a future for each message: what arrived is taken in batches."""

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import zmq

from hone.orchestrator.errors import HopelessError
from hone.schema.wire import ProtocolError, Wire, WireError
from hone.transport.addresses import PortInUseError

logger = logging.getLogger("hone.orchestrator.sockets")

LINGER_MILLISECONDS = 1_000
PING_MILLISECONDS = 2_000
SILENCE_MILLISECONDS = 30_000
BIND_SECONDS = 5.0
"""The orchestrator before this one may still be about to let its ports go."""
BIND_RETRY_SECONDS = 0.1

AfterCommit = Callable[[Callable[[], None]], None]
"""Has something done once the ledger has recorded this tick: nobody is told what a crash could take back."""


class RouterSocket:
    """A bound ROUTER; `wake` is called when there is something to take. Use as a context within a running loop."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, wake: Callable[[], None]) -> None:
        self._context = context
        self._address = address
        self._wake = wake
        self._inbox: list[tuple[bytes, list[bytes]]] = []

    async def __aenter__(self) -> Self:
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.LINGER, LINGER_MILLISECONDS),
            (zmq.ROUTER_HANDOVER, 1),  # a peer that reconnects under its old name replaces itself
            (zmq.HEARTBEAT_IVL, PING_MILLISECONDS),
            (zmq.HEARTBEAT_TIMEOUT, SILENCE_MILLISECONDS),
        ):
            self._socket.setsockopt(option, value)
        try:
            await self._bind()
        except BaseException:  # a cancellation too: undo, then pass it on
            self._socket.close()
            raise
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._collect)
        return self

    async def _bind(self) -> None:
        deadline = time.monotonic() + BIND_SECONDS
        while True:
            try:
                self._socket.bind(self._address)
                return
            except zmq.ZMQError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                if time.monotonic() >= deadline:
                    raise PortInUseError(
                        f"cannot bind {self._address} ({error.strerror}); is another orchestrator of this run alive?"
                    ) from error
            await asyncio.sleep(BIND_RETRY_SECONDS)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def take(self) -> list[tuple[bytes, list[bytes]]]:
        """Everything that has arrived since the last time: the sender's identity and the frames of each message."""
        self._collect()
        taken, self._inbox = self._inbox, []
        return taken

    def send(self, identity: bytes, frames: Sequence[bytes]) -> None:
        """Never waits: there is no high-water mark, and what goes to a peer that is gone is dropped."""
        self._socket.send_multipart([identity, *frames], zmq.NOBLOCK, copy=True)
        self._collect()

    def _collect(self) -> None:
        """ZeroMQ's descriptor tells changes only, and any use of the socket may swallow one, so look after each use.

        It also stays readable until all is received, so what is there is received at once, not when it is wanted.
        """
        before = len(self._inbox)
        while True:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._inbox.append((identity, frames))
        if len(self._inbox) > before:
            self._wake()


def decode(wire: Wire, frame: bytes) -> Any:
    """The message of a frame, None for what is none; raises `HopelessError` for one of another version of hone."""
    try:
        return wire.decode(frame)
    except ProtocolError as error:
        raise HopelessError(f"a process of this run has another version of hone: {error}") from error
    except WireError as error:
        logger.error("a message is passed over: %s", error)
        return None
