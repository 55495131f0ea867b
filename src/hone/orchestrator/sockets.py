"""A ZeroMQ ROUTER in an asyncio loop, without a future for each message: what arrived is taken in batches."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import zmq

from hone.transport.addresses import PortInUseError

LINGER_MILLISECONDS = 1_000
PING_MILLISECONDS = 2_000
SILENCE_MILLISECONDS = 30_000


class RouterSocket:
    """A bound ROUTER; `wake` is called when there is something to take. Use as a context within a running loop."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, wake: Callable[[], None]) -> None:
        self._context = context
        self._address = address
        self._wake = wake
        self._inbox: list[tuple[bytes, list[bytes]]] = []

    def __enter__(self) -> Self:
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
            self._socket.bind(self._address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise PortInUseError(
                f"cannot bind {self._address} ({error.strerror}); is another orchestrator of this run alive?"
            ) from error
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._collect)
        return self

    def __exit__(
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
