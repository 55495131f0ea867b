"""The gateway's own connection to a node: whether it lives, how it is, and what only a gateway may ask."""

import asyncio
import itertools
import logging
import random
import secrets
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from hone.sandbox.errors import SandboxError
from hone.sandbox.wire.addresses import Address, connect
from hone.sandbox.wire.frames import Stream, error_of
from hone.schema import sandbox_calls as calls
from hone.schema.sandbox_nodes import NodeReport
from hone.schema.sandboxes import Outcome

if TYPE_CHECKING:
    from hone.sandbox.gateway.node_connection import NodeConnection

CONNECT_SECONDS = 3.0
PING_SECONDS = 0.25
MAX_UNANSWERED = 6  # silent for 1.5 s to 1.75 s, a node is lost
TICK_SECONDS = 0.1
NUM_CONNECT_TICKS = 30
NUM_PATIENT_TICKS = 15  # for a node whose connection broke to be there still
REPORT_SECONDS = 1.0
CALL_SECONDS = 5.0
MIN_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 5.0
T = TypeVar("T")

logger = logging.getLogger("hone.sandbox.gateway.gateway")


class Watcher(Protocol):
    """Who wants to know of a node."""

    def node_came(self, control: "Control") -> bool:
        """It is there, and has made its first report. False: it is known already by another address."""

    def node_told(self, control: "Control", asked: float) -> None:
        """It has made another report, which was asked for at this time."""

    def node_went(self, control: "Control", problem: str) -> None:
        """It is lost."""


class Control:
    """One address of a node. `run` connects, watches, and connects again when the node is lost.

    prefix: of the ids of the sandboxes of the node that is or was there last. grace_seconds: how long the sandboxes of a
    client that is gone live on there.
    """

    def __init__(self, address: Address, watcher: Watcher, *, token: str = "", ca_file: str = "") -> None:
        self.address = address
        self.token = token
        self.ca_file = ca_file
        self.prefix = ""
        self.former_prefix = ""
        self.grace_seconds = 0.0
        self.report: NodeReport | None = None
        self.is_up = False
        self.problem = "not connected yet"
        self.connections: set[NodeConnection] = set()
        """The connections of clients' sessions to the node."""
        self.tried = asyncio.Event()
        """Set when the first attempt to connect has come to an end, good or bad."""
        self._watcher = watcher
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._stream: Stream[Any] | None = None
        self._over: asyncio.Future[str] | None = None
        self._welcome: asyncio.Future[str] | None = None
        self._num_unanswered = 0
        self._is_silent = False
        self._num_ticks = 0
        """How long we wait for the node yet; a stall of our own is one tick of it."""

    @property
    def name(self) -> str:
        """Of the node."""
        return self.prefix.partition(".")[0]

    async def run(self) -> None:
        """Until cancelled."""
        backoff = MIN_BACKOFF_SECONDS
        while True:
            began = time.monotonic()
            await self._visit()
            self.tried.set()
            if self.is_up:  # the connection broke, and the node may well be there
                await asyncio.sleep(TICK_SECONDS if time.monotonic() - began < REPORT_SECONDS else 0)
                continue
            if time.monotonic() - began > MAX_BACKOFF_SECONDS:
                backoff = MIN_BACKOFF_SECONDS
            logger.debug("%s: %s; again in %.1f s", self.address, self.problem, backoff)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(MAX_BACKOFF_SECONDS, 2 * backoff)

    async def call(self, message: Any, kind: type[T]) -> T:
        """Ask the node, and wait for the answer; `SandboxError` (node lost) if there will be none."""
        if self._stream is None:
            raise SandboxError(f"the node at {self.address} is gone: {self.problem}", Outcome.NODE_LOST)
        waiting = self._calls[message.call] = asyncio.get_running_loop().create_future()
        try:
            self._stream.send(message)
            async with asyncio.timeout(CALL_SECONDS):
                return msgspec.msgpack.decode(await waiting, type=kind)
        except TimeoutError:
            raise SandboxError(
                f"the node at {self.address} has not answered within {CALL_SECONDS:g} s", Outcome.NODE_LOST
            ) from None
        finally:
            self._calls.pop(message.call, None)

    def tell(self, message: Any) -> None:
        """Ask the node for something whose answer does not matter."""
        if self._stream is not None:
            self._stream.send(message)

    def number(self) -> int:
        """Of the next call."""
        return next(self._numbers)

    async def _visit(self) -> None:
        """Connect, and watch until the connection is over; the node may not be lost then."""
        stream: Stream[Any] = Stream(calls.ToClient, self._hear, self._lose)
        try:
            if not self.is_up:
                self._num_ticks = NUM_CONNECT_TICKS
            await self._patiently(self._enter(stream))
        except (OSError, ValueError, SandboxError, TimeoutError, msgspec.MsgspecError) as error:
            self.problem = str(error) or "it does not answer"
            is_gone = isinstance(error, ConnectionRefusedError | FileNotFoundError)
            if is_gone or not self._num_ticks:
                self._leave(self.problem)
        else:
            await self._watch(stream)
        finally:
            self._stream = None
            stream.close()

    async def _patiently(self, work: Coroutine[object, object, None]) -> None:
        """Do it before the patience is over; raises `TimeoutError` then."""
        task = asyncio.get_running_loop().create_task(work)
        try:
            while not task.done():
                if not self._num_ticks:
                    raise TimeoutError
                self._num_ticks -= 1
                await asyncio.wait([task], timeout=TICK_SECONDS)
            task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    async def _enter(self, stream: Stream[Any]) -> None:
        loop = asyncio.get_running_loop()
        self._over, self._welcome = loop.create_future(), loop.create_future()
        await connect(self.address, lambda: stream, ca_file=self.ca_file)
        self._stream = stream
        stream.send(calls.Hello(calls.VERSION, secrets.token_hex(16), self.token))
        prefix = await self._welcome
        if prefix != self.prefix:
            self._leave("it was started anew")
            self.former_prefix, self.prefix = self.prefix, prefix
        asked = time.monotonic()
        self.report = await self.call(calls.Report(self.number()), NodeReport)
        if not self.is_up:
            if not self._watcher.node_came(self):
                raise SandboxError(f"the node {self.name} is known by another address already")
            self.is_up = True
        self._watcher.node_told(self, asked)
        self.tried.set()

    async def _watch(self, stream: Stream[Any]) -> None:
        assert self._over is not None
        ticking = asyncio.get_running_loop().create_task(self._tick(stream))
        try:
            self.problem = await self._over
        finally:
            ticking.cancel()
        self._num_ticks = NUM_PATIENT_TICKS
        if self._is_silent:
            self._leave(self.problem)

    def _leave(self, problem: str) -> None:
        if self.is_up:
            self.is_up = False
            self._watcher.node_went(self, problem)

    async def _tick(self, stream: Stream[Any]) -> None:
        """Each ping that goes unanswered was sent by a loop that ran: a stall of our own does not count."""
        reports: set[asyncio.Task[None]] = set()
        reported = time.monotonic()
        self._num_unanswered = 0
        self._is_silent = False
        for number in itertools.count(1):
            if self._num_unanswered >= MAX_UNANSWERED:
                self._is_silent = True
                stream.close(f"no answer for {MAX_UNANSWERED * PING_SECONDS:g} s")
                return
            self._num_unanswered += 1
            stream.send(calls.Ping(number))
            if time.monotonic() - reported >= REPORT_SECONDS and not reports:
                reported = time.monotonic()
                task = asyncio.get_running_loop().create_task(self._ask_report())
                reports.add(task)
                task.add_done_callback(reports.discard)
            await asyncio.sleep(PING_SECONDS)

    async def _ask_report(self) -> None:
        asked = time.monotonic()
        try:
            self.report = await self.call(calls.Report(self.number()), NodeReport)
        except (SandboxError, ValueError, msgspec.MsgspecError) as error:
            logger.debug("%s makes no report: %s", self.address, error)
            return
        if self.is_up:
            self._watcher.node_told(self, asked)

    def _hear(self, message: Any) -> None:
        self._num_unanswered = 0
        match message:
            case calls.Done(call, result):
                self.tell(calls.Received(call))
                if (waiting := self._calls.get(call)) is not None and not waiting.done():
                    waiting.set_result(msgspec.Raw(bytes(result)))
            case calls.Failed(call):
                if call:
                    self.tell(calls.Received(call))
                refused = self._welcome if call == 0 else self._calls.get(call)
                if refused is not None and not refused.done():
                    refused.set_exception(error_of(message))
            case calls.Welcome(prefix, grace_seconds):
                self.grace_seconds = grace_seconds
                if self._welcome is not None and not self._welcome.done():
                    self._welcome.set_result(prefix)

    def _lose(self, problem: str) -> None:
        assert self._over is not None
        assert self._welcome is not None
        if not self._over.done():
            self._over.set_result(problem)
        error = SandboxError(f"the node at {self.address} is gone: {problem}", Outcome.NODE_LOST)
        for waiting in self._calls.values():
            if not waiting.done():
                waiting.set_exception(error)
        if not self._welcome.done():
            self._welcome.set_exception(error)
            self._welcome.exception()  # nobody may be waiting for it
