"""A node that does what a test says, in place of one with cells: what a gateway sees of it is the same."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.wire.addresses import Listener, parse_address
from hone.sandbox.wire.frames import Stream, failed
from hone.schema import sandbox_calls as calls
from hone.schema.sandbox_nodes import Leased, NodeReport
from hone.schema.sandboxes import SandboxUsage


class ScriptedNode:
    """Keeps sandboxes as entries in a dict. busy: seconds to wait, of every creation. is_silent: hears, says nothing.

    answer: what any call about a sandbox gets; None leaves it open.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        start: str = "0",
        max_sandboxes: int = 100,
        address: str = "",
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        self.prefix = f"{name}.{start}."
        self.address = address or f"unix:{folder}/{name}"
        self.sandboxes: dict[str, Leased] = {}
        self.max_sandboxes = max_sandboxes
        self.busy: float | None = None
        self.holds_creates = False
        self.is_silent = False
        self.is_draining = False
        self.answer: Callable[[Any], object] = lambda message: type(message).__name__
        self.heard: list[Any] = []
        self.sessions: list[tuple[str, str]] = []
        self.streams: list[Stream[Any]] = []
        self._listener = Listener(parse_address(self.address), certificate=certificate, key=key)
        self._num_made = 0
        self._session_of: dict[Stream[Any], str] = {}
        self._makers: set[str] = set()

    async def __aenter__(self) -> "ScriptedNode":
        await self._listener.open(self._accept)
        self.address = str(self._listener.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.die()
        self._listener.remove()

    def die(self) -> None:
        """All connections break, and nobody is there any more."""
        self._listener.close()
        for stream in list(self.streams):
            stream.close()

    def links(self) -> int:
        """The connections of clients' sessions."""
        return len(self.sessions)

    def _accept(self) -> Stream[Any]:
        owner = ""

        def hear(message: Any) -> None:
            nonlocal owner
            if self.is_silent:
                return
            match message:
                case calls.Hello():
                    owner = message.owner
                    if owner:
                        self.sessions.append((owner, message.session))
                    self._session_of[stream] = message.session
                    has_sandboxes = message.session in self._makers
                    stream.send(calls.Welcome(self.prefix, 10.0, has_sandboxes=has_sandboxes))
                case calls.Ping():
                    stream.send(message)
                case calls.Received():
                    pass
                case calls.Resume(call):
                    self.heard.append(message)
                    stream.send(calls.Resumed(call, False, 0, 0, 0, message.attempt))
                case calls.Report(call):
                    done(call, self.report())
                case calls.Create():
                    self.heard.append(message)
                    if not self.holds_creates:
                        self._create(stream, owner, message)
                case _:
                    self.heard.append(message)
                    if isinstance(message, calls.Destroy):
                        self.sandboxes.pop(message.sandbox_id, None)
                        done(message.call, SandboxUsage(1.0))
                    elif isinstance(message, calls.Cancel):
                        stream.send(calls.Failed(message.call, "cancelled", "the call was cancelled"))
                    elif isinstance(message, calls.Drain):
                        self.is_draining = message.is_draining
                        done(message.call, len(self.sandboxes))
                    elif (result := self.answer(message)) is not None:
                        done(message.call, result)

        def done(call: int, result: object) -> None:
            stream.send(calls.Done(call, msgspec.Raw(msgspec.msgpack.encode(result))))

        stream: Stream[Any] = Stream(calls.ToNode, hear, lambda _: self.streams.remove(stream))
        self.streams.append(stream)
        return stream

    def report(self) -> NodeReport:
        return NodeReport(
            self.max_sandboxes, 0, 100_000, 100_000, 8, self.is_draining, ("python",), tuple(self.sandboxes.values())
        )

    def _create(self, stream: Stream[Any], owner: str, message: calls.Create) -> None:
        for one in self.sandboxes.values():
            if message.key and (one.owner, one.key) == (owner, message.key):
                stream.send(calls.Done(message.call, msgspec.Raw(msgspec.msgpack.encode(one.sandbox_id))))
                return
        if self.busy is not None:
            stream.send(failed(message.call, Busy("full", self.busy)))
            return
        if message.spec.image == "broken":
            stream.send(failed(message.call, SandboxError("no such image")))
            return
        self._num_made += 1
        self._makers.add(self._session_of[stream])
        sandbox_id = f"{self.prefix}{self._num_made}"
        self.sandboxes[sandbox_id] = Leased(sandbox_id, owner, message.key, message.spec.memory_mb, message.spec.cpus)
        stream.send(calls.Done(message.call, msgspec.Raw(msgspec.msgpack.encode(sandbox_id))))


async def until(claim: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for a claim to hold."""
    async with asyncio.timeout(seconds):
        while not claim():
            await asyncio.sleep(0.01)
