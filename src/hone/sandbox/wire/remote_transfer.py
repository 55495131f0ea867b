"""A tree of files on its way to or from a node behind an address: the streams of its call at the client's side."""

import asyncio
from typing import Any, BinaryIO

from hone.sandbox.errors import SandboxError
from hone.sandbox.wire.flow import CHUNK_BYTES, Incoming, Outgoing
from hone.sandbox.wire.link import Link
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import Transfer


class RemoteTransfer:
    """One upload or download."""

    def __init__(self, link: Link, message: calls.Upload | calls.Download) -> None:
        self._link = link
        self._call = message.call
        self._input = Outgoing()
        self._is_input_over = isinstance(message, calls.Download)
        self._output = Incoming()
        self._ended = asyncio.get_running_loop().create_task(link.call(message, Transfer, self))
        self._ended.add_done_callback(self._end)

    async def send(self, archive: BinaryIO) -> Transfer:
        """Send an archive; what the node says of it."""
        try:
            while data := await asyncio.to_thread(archive.read, min(await self._input.until_room(), CHUNK_BYTES)):
                self._input.add(data)
                self._link.say(self._call, calls.Data(self._call, 0, data))
            self._is_input_over = True
            self._link.say(self._call, calls.Data(self._call, 0, b""))
        except BrokenPipeError:
            pass  # it has ended already, and says why
        except BaseException:  # a cancellation too: undo, then pass it on
            self._ended.cancel()
            raise
        return await self._ended

    async def receive(self, archive: BinaryIO) -> Transfer:
        """Write the archive that comes; what the node says of it."""
        try:
            while data := await self._output.read():
                await asyncio.to_thread(archive.write, data)
                if self._link.say(self._call, calls.Credit(self._call, 1, len(data))):
                    self._output.num_told += len(data)
        except BaseException:  # a cancellation too: undo, then pass it on
            self._ended.cancel()
            raise
        return await self._ended

    # --- for the link ----------------------------------------------------------------------------------------------

    def hear(self, message: Any) -> None:
        """A piece has come, or there is room for another one."""
        match message:
            case calls.Data(_, 1, data):
                self._output.add(data)
            case calls.Credit(_, 0, num_bytes):
                self._input.take(num_bytes)
            case _:
                raise ValueError(f"{type(message).__name__} for a stream that the node has no part in")

    def progress(self) -> tuple[list[int], list[int]]:
        """How far the streams have come."""
        self._output.num_told = self._output.num_read
        return [self._output.num_received, 0], [self._output.num_told, 0]

    def resumed(self, message: calls.Resumed) -> list[Any]:
        """What the node shall hear again."""
        pieces = self._input.resume(message.received, message.taken)
        again: list[Any] = [calls.Data(self._call, 0, piece) for piece in pieces]
        if self._is_input_over:
            again.append(calls.Data(self._call, 0, b""))
        if num_untold := self._output.num_read - self._output.num_told:
            again.append(calls.Credit(self._call, 1, num_untold))
            self._output.num_told = self._output.num_read
        return again

    # --- helpers ---------------------------------------------------------------------------------------------------

    def _end(self, task: "asyncio.Task[Transfer]") -> None:
        error = None if task.cancelled() else task.exception()
        self._input.fail(BrokenPipeError("the call has ended"))
        self._output.end(error if isinstance(error, SandboxError) else None)
