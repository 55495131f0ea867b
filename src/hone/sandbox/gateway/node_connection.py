"""The connection of one client's session to one node, from the gateway's side."""

import asyncio
from typing import TYPE_CHECKING

import msgspec

from hone.sandbox.gateway.control import CONNECT_SECONDS, Control
from hone.sandbox.gateway.relay import Frames
from hone.sandbox.wire.addresses import connect
from hone.sandbox.wire.frames import MAX_UNSENT_BYTES
from hone.schema import sandbox_calls as calls

if TYPE_CHECKING:
    from hone.sandbox.gateway.fronts import Front


class NodeConnection:
    """Made with the client's session, so that the node knows it when it comes again.

    delay_seconds: before it connects. is_tentative: it is kept only if the session has sandboxes at the node, or something
    is handed to it meanwhile. is_open: whether the node has let us in.
    """

    def __init__(
        self, front: "Front", control: Control, *, delay_seconds: float = 0.0, is_tentative: bool = False
    ) -> None:
        self.prefix = control.prefix
        self.frames = Frames(self._hear, self._lose, self._press)
        self.is_open = False
        self.was_of_use = False
        """Whether anything has come over it but that calls were resumed."""
        self.is_final = False
        """Whether the node is lost or does not let us in: another connection would be no better."""
        self._front = front
        self._control = control
        self._delay_seconds = delay_seconds
        self._is_tentative = is_tentative
        self._backlog: list[bytes] = []
        self._num_waiting_bytes = 0
        self._is_over = False
        control.connections.add(self)

    async def open(self) -> None:
        """Connect, and say for whom."""
        front, control = self._front, self._control
        assert front.session is not None
        if front.frames.is_full:
            self.frames.hold(front)
        try:
            await asyncio.sleep(self._delay_seconds)
            async with asyncio.timeout(CONNECT_SECONDS):
                await connect(control.address, lambda: self.frames, ca_file=control.ca_file)
        except (OSError, TimeoutError, ValueError) as error:
            self.close(str(error) or f"no connection within {CONNECT_SECONDS:g} s")
            return
        if self._is_over:  # the node or the client went meanwhile
            self.frames.close()
            return
        self.frames.say(calls.Hello(calls.VERSION, front.session.name, control.token, front.grant.owner))

    def hand(self, frame: bytes, giver: Frames) -> None:
        """Hand a frame on to the node, when it has let us in."""
        if self.is_open:
            self.frames.hand(frame, giver)
            return
        self._backlog.append(frame)
        self._num_waiting_bytes += len(frame)
        if self._num_waiting_bytes > MAX_UNSENT_BYTES:
            giver.hold(self)

    def ping(self) -> None:
        """Let the node hear that somebody is there."""
        if self.is_open and not self.frames.is_full:
            self.frames.say(calls.Ping(0))

    def close(self, problem: str, *, is_final: bool = False) -> None:
        """It is over. is_final: another one would be no better. Harmless when repeated."""
        self.is_final = is_final
        if is_final:
            self.frames.abort(problem)
        else:
            self.frames.close(problem)
        self._lose(problem)

    def _hear(self, frame: bytes) -> None:
        try:
            if self.is_open:
                self._front.hear_node(self, frame)
            else:
                self._enter(msgspec.msgpack.decode(memoryview(frame)[4:], type=calls.Welcome | calls.Failed))
        except msgspec.MsgspecError as error:
            self.close(f"a message that makes no sense: {error}")

    def _enter(self, answer: calls.Welcome | calls.Failed) -> None:
        if isinstance(answer, calls.Failed):
            self.close(answer.message, is_final=True)
        elif answer.prefix != self.prefix:
            self.close("it was started anew", is_final=True)
        elif self._is_tentative and not answer.has_sandboxes and not self._backlog:
            self.close("nothing is there", is_final=True)
        else:
            self.is_open = True
            for frame in self._backlog:
                self.frames.hand(frame, self.frames)
            self._backlog.clear()
            if not self.frames.is_full:
                self._front.frames.release(self)

    def _press(self, is_full: bool) -> None:
        if is_full:
            self._front.frames.hold(self)
        else:
            self._front.frames.release(self)

    def _lose(self, problem: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._backlog.clear()
            self._control.connections.discard(self)
            self._front.lose_node(self, problem)
