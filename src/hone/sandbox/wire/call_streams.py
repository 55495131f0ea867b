"""The node's end of the streams of a call, which go on over the next connection when one breaks."""

import asyncio
from collections.abc import Callable
from typing import Any

from hone.sandbox.wire.flow import WINDOW_BYTES, Outgoing
from hone.schema import sandbox_calls as calls


class CallStreams:
    """What a call takes in, what it puts out, and what it says once.

    say: sends a message to the client if it is there, and forgets it otherwise; the streams keep what matters.
    signal, resize: what to do with these of the client.
    """

    def __init__(self, call: int, say: Callable[[Any], None]) -> None:
        self.outputs = {1: Outgoing(), 2: Outgoing()}
        self.signal: Callable[[int], None] = lambda _: None
        self.resize: Callable[[int, int], None] = lambda *_: None
        self._call = call
        self._say = say
        self._told: list[Any] = []
        self._input = bytearray()
        self._is_input_over = False
        self._num_received = 0
        self._num_taken = 0
        self._num_controls = 0
        self._change = asyncio.Event()

    def tell(self, message: Any) -> None:
        """Say something that the client shall know, also after it was away. Hearing it twice does no harm."""
        self._told.append(message)
        self._say(message)

    async def read(self, max_bytes: int) -> bytes:
        """The next piece of what the client sends, empty at its end. `took` it when it is where it belongs."""
        while not self._input and not self._is_input_over:
            self._change.clear()
            await self._change.wait()
        data = bytes(self._input[:max_bytes])
        del self._input[:max_bytes]
        return data

    def took(self, num_bytes: int) -> None:
        """The client may send so many more bytes."""
        self._num_taken += num_bytes
        self._say(calls.Credit(self._call, 0, num_bytes))

    def write(self, stream: int, data: bytes) -> None:
        """Send a piece for which there is room in `outputs`."""
        self.outputs[stream].add(data)
        self._say(calls.Data(self._call, stream, data))

    def end(self, stream: int) -> None:
        """Nothing more comes on this stream."""
        self.tell(calls.Data(self._call, stream, b""))

    def hear(self, message: Any) -> None:
        """What the client says to the call; `ValueError` if it cannot be so."""
        match message:
            case calls.Data(_, 0, data):
                self._feed(data)
            case calls.Credit(_, (1 | 2) as stream, num_bytes):
                self.outputs[stream].take(num_bytes)
            case calls.Signal(_, number):
                self._count_control()
                self.signal(number)
            case calls.Resize(_, rows, columns):
                self._count_control()
                self.resize(rows, columns)
            case _:
                raise ValueError(f"{type(message).__name__} for a stream that the client has no part in")

    def resumed(self, message: calls.Resume) -> list[Any]:
        """What a client is told when it comes back, whom so much of the streams has reached."""
        if len(message.received) != 2 or len(message.taken) != 2:
            raise ValueError("a call has two streams to resume")
        here = (self._num_received, self._num_taken, self._num_controls)
        again: list[Any] = [calls.Resumed(self._call, True, *here, message.attempt)]
        there = zip(self.outputs.items(), message.received, message.taken, strict=True)
        for (stream, output), num_received, num_taken in there:
            again += [calls.Data(self._call, stream, data) for data in output.resume(num_received, num_taken)]
        return again + self._told

    def _feed(self, data: bytes) -> None:
        if self._is_input_over and data:
            raise ValueError("input after its end")
        self._num_received += len(data)
        if self._num_received - self._num_taken > WINDOW_BYTES:
            raise ValueError("more input than was granted")
        self._input += data
        self._is_input_over = self._is_input_over or not data
        self._change.set()

    def _count_control(self) -> None:
        self._num_controls += 1
        self._say(calls.Credit(self._call, calls.CONTROL, 1))
