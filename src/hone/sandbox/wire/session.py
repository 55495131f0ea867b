"""What a client of a node has under way: it outlives the connection that it was asked over."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.wire.call_streams import CallStreams
from hone.sandbox.wire.frames import Stream, failed, framed
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import Outcome

Do = Callable[[Any, CallStreams], Awaitable[Any]]
RETRY_SECONDS = 1.0

logger = logging.getLogger("hone.sandbox.wire.session")


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one client may have under way. max_calls: without an answer, or with one that the client did not take yet.

    max_streamed: of these, with streams. max_asked_bytes: of all that they ask with. max_held_bytes: of answers not taken.
    """

    max_calls: int = 16_384
    max_streamed: int = 4_096
    max_asked_bytes: int = 1 << 30
    max_held_bytes: int = 512 << 20


class Session:
    """The calls of one client. Each is done once, and its answer is kept until the client has said that it came.

    do: gives the result of a call. over: is called when the client has been away for grace_seconds.
    is_successor: an earlier session of this client has ended so. A call that this one never heard of may have been done
    then, and is not done again.
    """

    def __init__(
        self,
        do: Do,
        over: Callable[[], None],
        *,
        grace_seconds: float,
        limits: SessionLimits = SessionLimits(),
        is_successor: bool = False,
    ) -> None:
        self._do = do
        self._over = over
        self._grace_seconds = grace_seconds
        self._limits = limits
        self._is_successor = is_successor
        self._given_up: set[int] = set()
        self._calls: dict[int, _Call] = {}
        self._stream: Stream[Any] | None = None
        self._end: asyncio.TimerHandle | None = None
        self._num_streamed = 0
        self._num_asked_bytes = 0
        self._num_held_bytes = 0

    def join(self, stream: Stream[Any]) -> None:
        """The client is there, or there again. Its calls are quiet until it resumes them.

        A connection that it had before is over: the client knows that it is, whatever the kernel says.
        """
        before, self._stream = self._stream, stream
        if before is not None:
            before.close("the client has come by another connection")
        self._stay()
        for call in self._calls.values():
            call.is_quiet = True
        quiet = list(self._calls.values())
        asyncio.get_running_loop().call_later(self._grace_seconds, self._give_up, stream, quiet)

    def leave(self, stream: Stream[Any]) -> None:
        """This connection is over."""
        if self._stream is stream:
            self._stream = None
            self._end = asyncio.get_running_loop().call_later(self._grace_seconds, self._over)

    async def ended(self) -> None:
        """Wait until all calls that are under way have their answers."""
        if tasks := [call.task for call in self._calls.values() if call.task is not None]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Give all calls up."""
        self._stay()
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        for call in self._calls.values():
            self._cancel(call)
        if tasks:
            await asyncio.wait(tasks)

    def hear(self, message: Any) -> None:
        """What the client says; `ValueError` if it makes no sense."""
        match message:
            case calls.Data(number) | calls.Credit(number) | calls.Signal(number) | calls.Resize(number):
                if (call := self._calls.get(number)) is not None and not call.is_quiet:
                    call.streams.hear(message)
            case calls.Received(number):
                if (call := self._calls.get(number)) is not None and call.answer:
                    self._forget(call)
            case calls.Cancel(number):
                if (call := self._calls.get(number)) is not None:
                    self._cancel(call)
            case calls.Resume():
                self._resume(message)
            case _:
                self._begin(message)

    def _begin(self, message: Any) -> None:
        assert self._stream is not None
        if (known := self._calls.get(message.call)) is not None:
            if not known.is_repeatable:
                raise ValueError(f"call {message.call} is under way already")
            self._go_on(known, [])
            return
        is_repeatable, is_streamed = not calls.sandbox_of(message), isinstance(message, calls.Streamed)
        call = _Call(message.call, is_repeatable, is_streamed, self._stream.frame_bytes)
        call.streams = CallStreams(call.number, lambda said: self._say(call, framed(said)))
        if (problem := self._excess(call)) is not None:
            self._stream.send(failed(call.number, Busy(problem, RETRY_SECONDS)))
            return
        self._calls[call.number] = call
        self._num_asked_bytes += call.asked_bytes
        self._num_streamed += call.is_streamed
        call.task = asyncio.get_running_loop().create_task(self._answer(call, message))

    def _excess(self, call: "_Call") -> str | None:
        limits = self._limits
        if len(self._calls) >= limits.max_calls:
            return f"this client has {len(self._calls)} calls under way"
        if call.is_streamed and self._num_streamed >= limits.max_streamed:
            return f"this client has {self._num_streamed} programs in conversation"
        if self._num_asked_bytes + call.asked_bytes > limits.max_asked_bytes:
            return f"this client's calls under way have {self._num_asked_bytes >> 20} MB"
        return None

    async def _answer(self, call: "_Call", message: Any) -> None:
        call.has_begun = True
        try:
            result = await self._do(message, call.streams)
            frame = framed(calls.Done(call.number, msgspec.Raw(msgspec.msgpack.encode(result))))
        except asyncio.CancelledError:
            frame = _cancelled(call)
        except Exception as error:  # whatever it is, it is this call's alone
            if not isinstance(error, SandboxError | OSError | ValueError):
                logger.exception("a call failed: %s", type(message).__name__)
            frame = framed(failed(call.number, error))
        self._finish(call, frame)

    def _finish(self, call: "_Call", frame: bytes) -> None:
        if self._num_held_bytes + len(frame) > self._limits.max_held_bytes:
            problem = f"the answer is lost: the client takes none, and {self._num_held_bytes >> 20} MB of them wait"
            frame = framed(failed(call.number, SandboxError(problem, Outcome.NODE_LOST)))
        call.answer = frame
        call.task = None
        self._num_held_bytes += len(frame)
        self._num_asked_bytes -= call.asked_bytes
        self._num_streamed -= call.is_streamed
        self._say(call, frame)

    def _resume(self, message: calls.Resume) -> None:
        assert self._stream is not None
        if (call := self._calls.get(message.call)) is not None:
            self._go_on(call, call.streams.resumed(message))
        elif self._is_successor or message.call in self._given_up:
            problem = "the node has given the client up, and this call with it"
            self._stream.send(failed(message.call, SandboxError(problem, Outcome.NODE_LOST)))
        else:
            self._stream.send(calls.Resumed(message.call, False, 0, 0, 0, message.attempt))

    def _go_on(self, call: "_Call", again: list[Any]) -> None:
        call.is_quiet = False
        self._say(call, b"".join(framed(message) for message in again) + call.answer)

    def _say(self, call: "_Call", frames: bytes) -> None:
        if self._stream is not None and not call.is_quiet:
            self._stream.write(frames)

    def _give_up(self, stream: Stream[Any], quiet: "list[_Call]") -> None:
        """The client came back some time ago and did not resume these: it has their answers, or wants none."""
        if self._stream is not stream:
            return
        for call in quiet:
            if call.is_quiet and not call.answer:
                self._cancel(call)
            elif call.is_quiet and self._calls.get(call.number) is call:
                self._forget(call)
                self._given_up.add(call.number)
        if len(self._given_up) > self._limits.max_calls:
            self._given_up.clear()
            self._is_successor = True

    def _cancel(self, call: "_Call") -> None:
        if call.task is not None:
            call.task.cancel()
            if not call.has_begun:  # and will not
                self._finish(call, _cancelled(call))

    def _forget(self, call: "_Call") -> None:
        del self._calls[call.number]
        self._num_held_bytes -= len(call.answer)

    def _stay(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None


@dataclass(slots=True, eq=False)
class _Call:
    """is_repeatable: it does no harm to ask twice. answer: the last word, as it is sent. is_quiet: until it is resumed."""

    number: int
    is_repeatable: bool
    is_streamed: bool
    asked_bytes: int
    streams: CallStreams = field(init=False)
    task: asyncio.Task[None] | None = None
    has_begun: bool = False
    answer: bytes = b""
    is_quiet: bool = False


def _cancelled(call: _Call) -> bytes:
    return framed(calls.Failed(call.number, "cancelled", "the call was cancelled"))
