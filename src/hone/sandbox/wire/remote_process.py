"""A program, or a connection to a port, on a node behind an address: its streams at the client's side."""

import asyncio
import signal
from collections import deque
from typing import Any

from hone.sandbox.errors import SandboxError
from hone.sandbox.wire.flow import CHUNK_BYTES, Incoming, Outgoing
from hone.sandbox.wire.link import Link
from hone.schema import sandbox_calls as calls


class RemoteProcess:
    """As `Process` of a cell, from afar. What nobody reads here is not sent from there."""

    def __init__(self, link: Link, message: calls.Spawn | calls.SpawnPython | calls.Dial) -> None:
        self._link = link
        self._call = message.call
        self._input = Outgoing()
        self._is_input_over = False
        self._controls: deque[calls.Signal | calls.Resize] = deque()
        self._num_controls = 0
        self._outputs = {1: Incoming(), 2: Incoming()}
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.get_running_loop().create_task(link.call(message, int, self))
        self._ended.add_done_callback(self._end)

    async def started(self) -> None:
        """Wait until it runs; raises what stands in the way."""
        await asyncio.shield(self._started)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            piece = bytes(view[: min(await self._input.until_room(), CHUNK_BYTES)])
            self._input.add(piece)
            self._link.say(self._call, calls.Data(self._call, 0, piece))
            view = view[len(piece) :]
        await self._input.until_taken()

    def end_input(self) -> None:
        self._is_input_over = True
        self._link.say(self._call, calls.Data(self._call, 0, b""))

    async def read(self) -> bytes:
        return await self._read(1)

    async def read_error(self) -> bytes:
        return await self._read(2)

    async def wait(self) -> int:
        return await asyncio.shield(self._exited)

    def signal(self, number: int) -> None:
        self._control(calls.Signal(self._call, number))

    def interrupt(self) -> None:
        self.signal(signal.SIGINT)

    def kill(self) -> None:
        self.signal(0)

    def resize(self, rows: int, columns: int) -> None:
        self._control(calls.Resize(self._call, rows, columns))

    async def close(self) -> None:
        self._ended.cancel()
        await asyncio.wait([self._ended])

    # --- for the link ----------------------------------------------------------------------------------------------

    def hear(self, message: Any) -> None:
        """A piece of a stream has come, or that the program runs, or with which code it ended, or room for more input."""
        match message:
            case calls.Data(_, 0):
                if not self._started.done():
                    self._started.set_result(None)
            case calls.Data(_, 3, data):
                if not self._exited.done():
                    self._exited.set_result(int(data))
            case calls.Data(_, (1 | 2) as stream, data):
                self._outputs[stream].add(data)
            case calls.Credit(_, 0, num_bytes):
                self._input.take(num_bytes)
            case calls.Credit(_, calls.CONTROL, num_controls):
                self._drop_controls(num_controls)
            case calls.Failed():
                self._input.fail(BrokenPipeError(message.message))
            case _:
                raise ValueError(f"{type(message).__name__} for a stream that the node has no part in")

    def progress(self) -> tuple[list[int], list[int]]:
        """How far the streams have come."""
        outputs = self._outputs.values()
        for output in outputs:
            output.num_told = output.num_read
        return [one.num_received for one in outputs], [one.num_told for one in outputs]

    def resumed(self, message: calls.Resumed) -> list[Any]:
        """What the node shall hear again."""
        again: list[Any] = [
            calls.Data(self._call, 0, piece) for piece in self._input.resume(message.received, message.taken)
        ]
        if self._is_input_over:
            again.append(calls.Data(self._call, 0, b""))
        self._drop_controls(message.num_controls - self._num_controls)
        for stream, output in self._outputs.items():
            if num_untold := output.num_read - output.num_told:
                again.append(calls.Credit(self._call, stream, num_untold))
                output.num_told = output.num_read
        return again + list(self._controls)

    # --- helpers ---------------------------------------------------------------------------------------------------

    def _control(self, message: calls.Signal | calls.Resize) -> None:
        if not self._ended.done():
            self._controls.append(message)
            self._link.say(self._call, message)

    def _drop_controls(self, number: int) -> None:
        if not 0 <= number <= len(self._controls):
            raise ValueError(f"{number} signals are said to have come, {len(self._controls)} were on their way")
        self._num_controls += number
        for _ in range(number):
            self._controls.popleft()

    async def _read(self, stream: int) -> bytes:
        output = self._outputs[stream]
        data = await output.read()
        if data and self._link.say(self._call, calls.Credit(self._call, stream, len(data))):
            output.num_told += len(data)
        return data

    def _end(self, task: "asyncio.Task[int]") -> None:
        error = None if task.cancelled() else task.exception()
        if not self._started.done():
            self._started.set_exception(error or SandboxError("the program was given up"))
            self._started.exception()
        if not self._exited.done():
            self._exited.set_exception(error or SandboxError("the program was given up"))
            self._exited.exception()
        self._input.fail(error if isinstance(error, SandboxError) else BrokenPipeError("the program has ended"))
        for output in self._outputs.values():
            output.end(error if isinstance(error, SandboxError) else None)
