"""A client of a gateway and its connections to nodes: what comes from one side is handed on to the other."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.gateway.node_connection import NodeConnection
from hone.sandbox.gateway.relay import Frames, Head, Route, head_of, prefix_of, routes
from hone.sandbox.gateway.tenants import Grant, Scope
from hone.sandbox.wire.frames import MAX_FRAME_BYTES, failed
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import Outcome, SandboxStatus

if TYPE_CHECKING:
    from hone.sandbox.gateway.creates import Creating
    from hone.sandbox.gateway.gateway import Gateway

GRACE_SECONDS = 10.0
HELLO_SECONDS = 10.0
MAX_HELLO_BYTES = 4096
STABLE_SECONDS = 1.0  # a connection to a node that broke sooner is not made again at once
MAX_DELAY_SECONDS = 1.0
REPORTED_SECONDS = 3.0  # after which a gateway knows what there is
MAX_BREAKS = 6  # in a row; a node where it does not get better is lost to this client
MAX_CALLS = 1 << 16
MAX_TOLD = 100  # characters of what a client sent
MAX_QUESTIONS = 64  # of the gateway itself, at once
ROUTES = routes()

logger = logging.getLogger("hone.sandbox.gateway.gateway")


@dataclass(frozen=True, slots=True)
class Session:
    """A client, over all of its connections. name: its secret."""

    owner: str
    name: str = field(repr=False)


class Front:
    """A client's connection. calls: those that it has not said `Received` of, with the connection to the node of each."""

    def __init__(self, gateway: "Gateway") -> None:
        self.frames = Frames(self._hear, self._lose, self._press, max_bytes=MAX_HELLO_BYTES)
        self.calls: dict[int, NodeConnection] = {}
        self.creates: dict[int, Creating] = {}
        self.grant = Grant("", frozenset())
        self.session: Session | None = None
        self._gateway = gateway
        self._nodes: dict[str, NodeConnection] = {}
        self._destroys: dict[int, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._breaks: dict[str, _Breaks] = {}
        loop = asyncio.get_running_loop()
        self._late = loop.call_later(HELLO_SECONDS, lambda: self.frames.abort("no greeting"))

    def node(self, prefix: str, *, is_tentative: bool = False) -> NodeConnection | None:
        """The connection to a node, made now if there is none; None if the node is lost."""
        if (node := self._nodes.get(prefix)) is None and (control := self._gateway.nodes.get(prefix)) is not None:
            assert self.session is not None
            breaks = self._breaks.setdefault(prefix, _Breaks())
            node = self._nodes[prefix] = NodeConnection(
                self, control, delay_seconds=breaks.delay_seconds(), is_tentative=is_tentative
            )
            self.begin(node.open())
        return node

    def begin(self, work: Coroutine[object, object, None]) -> None:
        """Have something done, unless the client goes before."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def done(self, call: int, result: object) -> None:
        """An answer of the gateway's own."""
        self.frames.say(calls.Done(call, msgspec.Raw(msgspec.msgpack.encode(result))))

    def fail(self, call: int, error: Exception) -> None:
        """A call of this client's has failed, or was never made."""
        self.frames.say(failed(call, error))

    def hear_node(self, node: NodeConnection, frame: bytes) -> None:
        """A node has said something."""
        head = head_of(frame)
        if head.kind not in ("Resumed", "Ping"):
            node.was_of_use = True
        if self.calls.get(head.call) is not node:
            return  # nobody waits for it, or it is none of this node's business
        if head.kind in ("Done", "Failed"):
            if (creating := self.creates.get(head.call)) is not None:
                self._gateway.creates.hear(creating, frame)
                return
            if self._destroys and (sandbox_id := self._destroys.pop(head.call, None)) is not None:
                self._gateway.ledger.end(sandbox_id, self.grant.owner)
        self.frames.hand(frame, node.frames)

    def lose_node(self, node: NodeConnection, problem: str) -> None:
        """A connection to a node is over. Where the node lives, its calls go on when the client resumes them."""
        if self._nodes.get(node.prefix) is not node:
            return
        del self._nodes[node.prefix]
        self.frames.release(node)
        its = [call for call, one in self.calls.items() if one is node]
        for call in its:
            del self.calls[call]
        breaks = self._breaks[node.prefix]
        breaks.count(was_open=node.is_open, was_of_use=node.was_of_use)
        if not node.is_final and breaks.number <= MAX_BREAKS:
            self.frames.say(calls.Interrupted(node.prefix))
            for call in its:
                if (creating := self.creates.get(call)) is not None:
                    self._gateway.creates.repeat(creating)
            return
        error = SandboxError(f"the node {node.prefix.rstrip('.')} is gone: {problem}", Outcome.NODE_LOST)
        for call in its:
            if (creating := self.creates.get(call)) is not None:
                self._gateway.creates.lose(creating, error)
                continue
            if (sandbox_id := self._destroys.pop(call, None)) is not None:
                self._gateway.ledger.unwant(node.prefix, sandbox_id, self.grant.owner)
            self.fail(call, error)

    def _hear(self, frame: bytes) -> None:
        try:
            if self.session is None:
                self._greet(msgspec.msgpack.decode(memoryview(frame)[4:], type=calls.Hello))
                return
            head = head_of(frame)
            route = ROUTES.get(head.kind)
            if route is Route.SANDBOX:
                self._route(head, frame)
            elif route is Route.CALL:
                self._follow(head, frame)
            else:
                self._answer(head, frame)
        except msgspec.MsgspecError as error:
            self.frames.close(f"a message that makes no sense: {error}")

    def _greet(self, hello: calls.Hello) -> None:
        grant = self._gateway.grant(hello, self.frames.peer_uid())
        problem = ""
        if hello.version != calls.VERSION:
            problem = (
                f"the gateway speaks version {calls.VERSION}, not {hello.version}; install the same hone everywhere"
            )
        elif grant is None:
            problem = "the gateway does not let you in; check the token"
        elif not self._gateway.has_room(grant.owner, hello.session):
            problem = f"{grant.owner} has as many clients here as it may have, or all together have"
        elif len(hello.session) < calls.MIN_SESSION_LENGTH:
            problem = f"a session that can be guessed: fewer than {calls.MIN_SESSION_LENGTH} characters"
        if grant is None or problem:
            self.frames.say(calls.Failed(0, "value", problem))
            self.frames.close(problem)
            return
        self._late.cancel()
        self.grant = grant
        self.frames.max_bytes = MAX_FRAME_BYTES
        self.session = Session(grant.owner, hello.session)
        self._gateway.join(self, self.session)
        self.frames.say(calls.Welcome("", GRACE_SECONDS, is_relay=True))
        self.begin(self._look_around(grant.owner))

    async def _look_around(self, owner: str) -> None:
        """Be back wherever the client has sandboxes: they outlive its absence only then, and it may have come by another
        gateway before. Once more, when all nodes have told of those that are new.
        """
        for seconds in (0.0, REPORTED_SECONDS):
            await asyncio.sleep(seconds)
            for prefix in self._gateway.ledger.prefixes_of(owner):
                self.node(prefix, is_tentative=True)

    def _follow(self, head: Head, frame: bytes) -> None:
        node = self.calls.get(head.call)
        if head.kind == "Cancel" and (creating := self.creates.get(head.call)) is not None:
            self._gateway.creates.cancel(creating)
        elif node is not None:
            if head.kind == "Received":
                del self.calls[head.call]
            node.hand(frame, self.frames)

    def _route(self, head: Head, frame: bytes) -> None:
        if Scope.USE not in self.grant.scopes and not self._may(head.call, Scope.USE):
            return
        sandbox_id = msgspec.msgpack.decode(head.about, type=str)
        prefix = prefix_of(sandbox_id)
        node = self._nodes.get(prefix) or self.node(prefix)
        if node is None:
            if head.kind == "Destroy":
                self._gateway.ledger.unwant(prefix, sandbox_id, self.grant.owner)
            self.fail(head.call, SandboxError(f"{sandbox_id[:MAX_TOLD]}: its node is gone", Outcome.NODE_LOST))
            return
        if len(self.calls) >= MAX_CALLS:
            self.fail(head.call, Busy(f"{MAX_CALLS} calls are under way", 1.0))
            return
        self.calls[head.call] = node
        if head.kind == "Destroy":
            self._destroys[head.call] = sandbox_id
        node.hand(frame, self.frames)

    def _answer(self, head: Head, frame: bytes) -> None:
        match head.kind:
            case "Ping":
                self.frames.write(frame)
            case "Create":
                if head.call in self.creates or head.call in self.calls:
                    self.frames.close(f"call {head.call} is under way already")
                elif len(self.creates) >= MAX_CALLS:
                    self.fail(head.call, Busy(f"{MAX_CALLS} creations are under way", 1.0))
                elif self._may(head.call, Scope.CREATE):
                    self._gateway.creates.ask(
                        self, msgspec.msgpack.decode(memoryview(frame)[4:], type=calls.Create), frame
                    )
            case "Status" | "Statistics" | "Drain":
                self._question(head, frame)
            case "Hello":
                self.frames.close("a second greeting")
            case _:
                self.fail(head.call, ValueError(f"a call that this gateway does not know: {head.kind[:MAX_TOLD]}"))

    def _question(self, head: Head, frame: bytes) -> None:
        if not self._may(head.call, Scope.ADMIN if head.kind == "Drain" else Scope.OBSERVE):
            return
        if len(self._tasks) >= MAX_QUESTIONS + len(self._nodes):
            self.fail(head.call, Busy(f"{MAX_QUESTIONS} questions are under way", 1.0))
        elif head.kind == "Status":
            self.begin(self._list(head.call))
        elif head.kind == "Statistics":
            self.begin(self._count(head.call))
        else:
            self.begin(self._drain(msgspec.msgpack.decode(memoryview(frame)[4:], type=calls.Drain)))

    async def _list(self, call: int) -> None:
        whose = None if self.grant.allows(Scope.ADMIN) else self.grant.owner
        found: list[SandboxStatus] = []
        for told in await self._gateway.ask_all(lambda one: calls.Status(one.number()), list[SandboxStatus]):
            found += [one for one in told if whose is None or one.owner == whose]
        self.done(call, found)

    async def _count(self, call: int) -> None:
        self.done(call, await self._gateway.statistics())

    async def _drain(self, message: calls.Drain) -> None:
        try:
            self.done(message.call, await self._gateway.drain(message.node, message.is_draining))
        except (SandboxError, ValueError) as error:
            self.fail(message.call, error)

    def _may(self, call: int, scope: Scope) -> bool:
        if self.grant.allows(scope):
            return True
        self.fail(call, SandboxError(f"this token is not for that; it lacks the scope {scope}", Outcome.POLICY_DENIED))
        return False

    def _press(self, is_full: bool) -> None:
        for node in self._nodes.values():
            if is_full:
                node.frames.hold(self)
            else:
                node.frames.release(self)

    def _lose(self, problem: str) -> None:
        logger.debug("a client is gone: %s", problem)
        self._late.cancel()
        creates, self.creates = self.creates, {}
        self._gateway.creates.leave(list(creates.values()))
        self.calls.clear()
        nodes, self._nodes = self._nodes, {}
        for node in nodes.values():
            node.close("its client is gone")
        for task in self._tasks:
            task.cancel()
        self._gateway.leave(self)


@dataclass(slots=True)
class _Breaks:
    """How often in a row a connection to a node broke soon after it was made."""

    number: int = 0
    made: float = 0.0

    def delay_seconds(self) -> float:
        """How long to wait before the next one, which is made then."""
        delay = min(MAX_DELAY_SECONDS, 0.05 * 2.0**self.number) if self.number else 0.0
        self.made = time.monotonic() + delay
        return delay

    def count(self, *, was_open: bool, was_of_use: bool) -> None:
        """It broke. was_of_use: after something had come over it."""
        was_stable = was_open and time.monotonic() - self.made > STABLE_SECONDS
        self.number = 0 if was_stable else 1 if was_of_use else self.number + 1
