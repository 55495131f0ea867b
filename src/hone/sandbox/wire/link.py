"""The client's side of a session with a node: its calls, over one connection after another."""

import asyncio
import contextlib
import errno
import functools
import itertools
import random
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.wire.addresses import connect, parse_address
from hone.sandbox.wire.frames import Stream, error_of, framed
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import Outcome

CONNECT_SECONDS = 10.0
ATTEMPT_SECONDS = 2.0
MIN_DELAY_SECONDS = 0.05
MAX_DELAY_SECONDS = 1.0
PING_SECONDS = 0.5
MAX_UNANSWERED = 3
ACKNOWLEDGE_SECONDS = 0.05
T = TypeVar("T")

Connector = Callable[[Callable[[], asyncio.Protocol]], Awaitable[None]]


class Streams(Protocol):
    """Whoever has the streams of a call, at the client's side."""

    def hear(self, message: Any) -> None:
        """The node says something about them; `ValueError` if it cannot be so."""

    def progress(self) -> tuple[list[int], list[int]]:
        """How far they have come: of each output the bytes that came, and those that were read."""

    def resumed(self, message: calls.Resumed) -> list[Any]:
        """What to send again; `ValueError` if it cannot be so."""


@dataclass(slots=True, eq=False)
class Pending:
    """A call without an answer. is_quiet: nothing is said to it before the node has told how far it is.

    undo: what is done with an answer that comes after it was cancelled.
    """

    message: Any
    answer: "asyncio.Future[msgspec.Raw]"
    streams: Streams | None = None
    is_sent: bool = False
    is_quiet: bool = True
    is_cancelled: bool = False
    num_resumed: int = 0
    undo: Callable[[msgspec.Raw], None] | None = None


class Link:
    """A session with a node. When the connection breaks it makes another one, over which all calls go on.

    reconnect_seconds: for how long it tries; None: as long as the node keeps the session. After that, and at once where
    it is known that the node is gone, what waits raises `SandboxError` (node lost): where the node's address refuses the
    connection, or another start of the node answers. ca_file: of the authorities whose word is taken at a tls:// address;
    by default that in $HONE_SANDBOX_CA. connector: how else to connect than to the address.
    """

    def __init__(
        self,
        address: str,
        token: str = "",
        *,
        ca_file: str = "",
        reconnect_seconds: float | None = None,
        connector: Connector | None = None,
    ) -> None:
        self.address = address
        self.num_reconnections = 0
        self._token = token
        self._reconnect_seconds = reconnect_seconds
        self._connector = connector or functools.partial(connect, parse_address(address), ca_file=ca_file)
        self._session = secrets.token_hex(16)
        self._numbers = itertools.count(1)
        self._calls: dict[int, Pending] = {}
        self._received: list[bytes] = []
        self._is_flush_due = False
        self._welcome: calls.Welcome | None = None
        self._stream: Stream[Any] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._joined = 0.0
        self._connecting: asyncio.Task[None] | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._problem: str | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the session is over; a new one is needed."""
        return self._problem is not None

    async def connected(self) -> None:
        """Wait until the node has let us in for the first time; raises `SandboxError` if it does not, or is not there."""
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect_first())
        await asyncio.shield(self._connecting)

    def number(self) -> int:
        """Of the next call."""
        return next(self._numbers)

    async def call(
        self,
        message: Any,
        kind: type[T],
        streams: Streams | None = None,
        undo: Callable[[T], Coroutine[object, object, None]] | None = None,
    ) -> T:
        """Ask, and wait for the answer. A call that is cancelled here is cancelled there.

        undo: of what was done nevertheless, as the answer was on its way already; nobody waits for it.
        """
        if self._problem is not None:
            raise self._loss()
        frame = framed(message)
        pending = Pending(message, asyncio.get_running_loop().create_future(), streams)
        if undo is not None:
            pending.undo = functools.partial(self._undo, undo, kind)
        self._calls[message.call] = pending
        if self._stream is not None:
            self._ask(pending, frame)
        try:
            return msgspec.msgpack.decode(await pending.answer, type=kind)
        except asyncio.CancelledError:
            pending.is_cancelled = True
            if pending.undo is not None and not pending.answer.cancelled() and pending.answer.exception() is None:
                pending.undo(pending.answer.result())  # it came at this very moment
            if not pending.is_sent:
                self._calls.pop(message.call, None)
            self.say(message.call, calls.Cancel(message.call))
            raise

    def say(self, call: int, message: Any) -> bool:
        """Say something to a call, if that is possible now. What is lost after all, `Streams.resumed` repeats."""
        pending = self._calls.get(call)
        if self._stream is None or pending is None or pending.is_quiet:
            return False
        self._write(framed(message))
        return True

    async def close(self) -> None:
        """Hang up. The node ends this session's sandboxes soon after, unless they were closed before."""
        self._lose("the connection is closed")
        tasks = self._tasks | ({self._connecting} if self._connecting is not None else set())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._stream is not None:
            self._flush()
            self._stream.close()

    # --- connections -----------------------------------------------------------------------------------------------

    async def _connect_first(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._attempt()
        except (OSError, TimeoutError) as error:
            problem = f"{self.address}: {error or f'no answer within {CONNECT_SECONDS:g} s'}"
            self._lose(problem)
            raise SandboxError(f"no node to be had: {problem}", Outcome.NODE_LOST) from error
        except (SandboxError, ValueError) as error:
            self._lose(str(error))
            raise
        self._begin(self._ping())

    async def _attempt(self) -> None:
        """Make a connection and be let in; raises what the node objects, or `OSError`."""
        greeting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stream: Stream[Any] = Stream(
            calls.ToClient,
            lambda message: self._hear(stream, greeting, message),
            lambda problem: self._broken(stream, greeting, problem),
        )
        try:
            await self._connector(lambda: stream)
            stream.send(calls.Hello(calls.VERSION, self._session, self._token))
            await greeting
        except BaseException:  # a cancellation too: undo, then pass it on
            if stream is not self._stream:
                stream.close()
            raise

    async def _reconnect(self, problem: str) -> None:
        loop = asyncio.get_running_loop()
        assert self._welcome is not None
        seconds = self._welcome.grace_seconds if self._reconnect_seconds is None else self._reconnect_seconds
        deadline = loop.time() + seconds
        for delay in _delays(0.0 if loop.time() - self._joined > MAX_DELAY_SECONDS else MIN_DELAY_SECONDS):
            if loop.time() + delay >= deadline:
                break
            await asyncio.sleep(delay)
            try:
                async with asyncio.timeout_at(min(deadline, loop.time() + ATTEMPT_SECONDS)):
                    await self._attempt()
            except (OSError, TimeoutError) as error:
                problem = str(error) or f"no answer within {ATTEMPT_SECONDS:g} s"
                if _is_refused(error) and not self._welcome.is_relay:
                    return self._lose(problem)
            except Busy as error:
                problem = str(error)
            except (SandboxError, ValueError) as error:
                return self._lose(str(error))
            if self._stream is not None or self._problem is not None:
                return None
        return self._lose(f"{problem}; no connection within {seconds:g} s")

    async def _ping(self) -> None:
        while self._problem is None:
            if self._stream is not None:
                if self._stream.count_silence() >= MAX_UNANSWERED:
                    self._stream.close(f"no answer for {MAX_UNANSWERED * PING_SECONDS:g} s")
                else:
                    self._stream.send(calls.Ping(0))
            await asyncio.sleep(PING_SECONDS)

    def _hear(self, stream: Stream[Any], greeting: "asyncio.Future[None]", message: Any) -> None:
        if stream is self._stream:
            self._hear_call(message)
        elif greeting.done():
            return
        elif isinstance(message, calls.Welcome):
            if self._is_other_start(message):
                self._lose("it was restarted")
                stream.close()
                return
            self._join(stream, message)
            greeting.set_result(None)
        elif isinstance(message, calls.Failed):
            greeting.set_exception(error_of(message))
        else:
            raise ValueError("no greeting")

    def _is_other_start(self, welcome: calls.Welcome) -> bool:
        return self._welcome is not None and not welcome.is_relay and welcome.prefix != self._welcome.prefix

    def _join(self, stream: Stream[Any], welcome: calls.Welcome) -> None:
        """All calls go on over this connection."""
        self.num_reconnections += self._welcome is not None
        self._welcome = welcome
        self._stream = stream
        self._joined = asyncio.get_running_loop().time()
        for pending in list(self._calls.values()):
            if not pending.is_sent:  # its streams may have had much to say meanwhile
                self._go_on(pending, calls.Resumed(pending.message.call, False, 0, 0, 0, pending.num_resumed))
            elif not calls.sandbox_of(pending.message):
                self._ask(pending, framed(pending.message))
            else:
                self._resume(pending)

    def _broken(self, stream: Stream[Any], greeting: "asyncio.Future[None]", problem: str) -> None:
        if not greeting.done():
            greeting.set_exception(ConnectionResetError(problem))
        if stream is not self._stream:
            return
        self._stream = None
        self._received.clear()  # the node will forget what is not resumed
        for pending in self._calls.values():
            pending.is_quiet = True
        if self._reconnect_seconds == 0:
            self._lose(problem)
        elif self._problem is None and (self._reconnecting is None or self._reconnecting.done()):
            self._reconnecting = self._begin(self._reconnect(problem))

    # --- calls -----------------------------------------------------------------------------------------------------

    def _ask(self, pending: Pending, frame: bytes) -> None:
        pending.is_sent = True
        pending.is_quiet = False
        self._write(frame)
        if pending.is_cancelled:
            self._write(framed(calls.Cancel(pending.message.call)))

    def _resume(self, pending: Pending) -> None:
        assert self._stream is not None
        pending.is_quiet = True
        pending.num_resumed += 1
        call, sandbox_id = pending.message.call, calls.sandbox_of(pending.message)
        received, taken = pending.streams.progress() if pending.streams is not None else ([0, 0], [0, 0])
        self._stream.send(calls.Resume(call, sandbox_id, received, taken, pending.num_resumed))

    def _hear_call(self, message: Any) -> None:
        match message:
            case calls.Interrupted(prefix):
                for pending in self._calls.values():
                    if calls.sandbox_of(pending.message).startswith(prefix):
                        self._resume(pending)
            case calls.Ping() | calls.Welcome():
                pass
            case _ if message.call in self._calls:
                self._hear_pending(self._calls[message.call], message)
            case calls.Done() | calls.Failed():
                self._acknowledge(message.call)

    def _hear_pending(self, pending: Pending, message: Any) -> None:
        match message:
            case calls.Resumed():
                if pending.is_quiet and message.attempt == pending.num_resumed:
                    self._go_on(pending, message)
            case calls.Failed() if message.kind != "broken_pipe":
                self._settle(pending, error_of(message))
            case _ if pending.is_quiet:
                pass  # it was on its way when the connection broke, and comes again
            case calls.Done(_, result):
                self._settle(pending, result)
            case _ if pending.streams is not None:
                pending.streams.hear(message)

    def _go_on(self, pending: Pending, message: calls.Resumed) -> None:
        call = pending.message.call
        if not message.is_known and pending.is_cancelled:
            del self._calls[call]
            return
        again = pending.streams.resumed(message) if pending.streams is not None else []
        if not message.is_known:
            self._ask(pending, framed(pending.message))
        pending.is_quiet = False
        if pending.is_cancelled:
            again.append(calls.Cancel(call))
        for one in again:
            self._write(framed(one))

    def _undo(self, undo: Callable[[T], Coroutine[object, object, None]], kind: type[T], answer: msgspec.Raw) -> None:
        self._begin(self._undone(undo(msgspec.msgpack.decode(answer, type=kind))))

    async def _undone(self, work: Coroutine[object, object, None]) -> None:
        with contextlib.suppress(SandboxError):  # with the node, it is gone
            await work

    def _settle(self, pending: Pending, outcome: msgspec.Raw | Exception) -> None:
        call = pending.message.call
        del self._calls[call]
        self._acknowledge(call)
        if pending.undo is not None and pending.answer.cancelled() and not isinstance(outcome, Exception):
            pending.undo(outcome)
        if pending.answer.done():
            return
        if isinstance(outcome, Exception):
            pending.answer.set_exception(outcome)
        else:
            pending.answer.set_result(outcome)

    def _acknowledge(self, call: int) -> None:
        """The answer has come; the node hears so with what is said next, or after a moment."""
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_later(ACKNOWLEDGE_SECONDS, self._flush)
        self._received.append(framed(calls.Received(call)))

    def _write(self, frame: bytes) -> None:
        assert self._stream is not None
        if self._received:
            frame = b"".join(self._received) + frame
            self._received.clear()
        self._stream.write(frame)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._received and self._stream is not None:
            self._write(b"")

    # --- the end ---------------------------------------------------------------------------------------------------

    def _begin(self, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _loss(self) -> SandboxError:
        return SandboxError(f"the node at {self.address} is gone: {self._problem}", Outcome.NODE_LOST)

    def _lose(self, problem: str) -> None:
        if self._problem is None:
            self._problem = problem
            for pending in self._calls.values():
                if not pending.answer.done():
                    pending.answer.set_exception(self._loss())
            self._calls.clear()


def _is_refused(error: OSError) -> bool:
    """Whether nobody listens at the address; of a name with several addresses, Python 3.11 says so in the text only."""
    refusals = str(error).count(f"[Errno {errno.ECONNREFUSED}]")
    is_one = isinstance(error, ConnectionRefusedError | FileNotFoundError)
    return is_one or (refusals > 0 and refusals == str(error).count("[Errno"))


def _delays(first: float) -> Iterator[float]:
    """How long to wait before each attempt: more and more, and not the same for all clients of a node."""
    yield first
    for attempt in itertools.count():
        yield random.uniform(0.5, 1.0) * min(MAX_DELAY_SECONDS, MIN_DELAY_SECONDS * 2.0**attempt)
