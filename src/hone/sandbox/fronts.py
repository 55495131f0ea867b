"""A client of a gateway and its connections to nodes: what comes from one side is handed on to the other."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING

import msgspec

from hone.sandbox.addresses import connect
from hone.sandbox.control import CONNECT_SECONDS, Control
from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.relay import Frames, Head, Route, head_of, routes
from hone.sandbox.tenants import Grant, Scope
from hone.sandbox.wire import MAX_FRAME_BYTES, WINDOW_BYTES, failed
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import Outcome, SandboxStatus

if TYPE_CHECKING:
    from hone.sandbox.creates import Creating
    from hone.sandbox.gateway import Gateway

HELLO_SECONDS = 10.0
MAX_HELLO_BYTES = 4096
MAX_CALLS = 1 << 16
ROUTES = routes()
NIL = msgspec.Raw(msgspec.msgpack.encode(None))

logger = logging.getLogger("hone.sandbox.gateway")


class Session:
    """A client, over all of its connections. prefixes: of the nodes where it has been."""

    def __init__(self, grant: Grant, name: str) -> None:
        self.owner = grant.owner
        self.name = name
        self.prefixes: set[str] = set()
        self.front: Front | None = None
        self.left = 0.0


class Front:
    """A client's connection. calls: those under way, by number, with the connection to the node that each is at."""

    def __init__(self, gateway: "Gateway") -> None:
        self.frames = Frames(self._hear, self._lose, self._press, max_bytes=MAX_HELLO_BYTES)
        self.calls: dict[int, Link] = {}
        self.creates: dict[int, Creating] = {}
        self.grant = Grant("", frozenset())
        self.session: Session | None = None
        self._gateway = gateway
        self._links: dict[str, Link] = {}
        self._destroys: dict[int, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        self._late = loop.call_later(HELLO_SECONDS, lambda: self.frames.abort("no greeting"))

    def link(self, prefix: str) -> "Link | None":
        """The connection to a node, made now if there is none; None if the node is lost."""
        if (link := self._links.get(prefix)) is None and (control := self._gateway.nodes.get(prefix)) is not None:
            assert self.session is not None
            link = self._links[prefix] = Link(self, control)
            self.session.prefixes.add(prefix)
            self.begin(link.open())
        return link

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

    def hear_node(self, link: "Link", frame: bytes) -> None:
        """A node has said something."""
        head = head_of(frame)
        if self.calls.get(head.call) is not link:
            return  # it was cancelled, or is none of this node's business
        if head.kind == "Done" or (head.kind == "Failed" and msgspec.msgpack.decode(head.about) != "broken_pipe"):
            del self.calls[head.call]
            if (creating := self.creates.pop(head.call, None)) is not None:
                self._gateway.creates.hear(creating, frame)
                return
            if (sandbox_id := self._destroys.pop(head.call, None)) is not None:
                self._gateway.ledger.end(sandbox_id, self.grant.owner)
        self.frames.write(frame)

    def lose_link(self, link: "Link", problem: str) -> None:
        """A connection to a node is over: so is what was under way there."""
        if self._links.get(link.prefix) is link:
            del self._links[link.prefix]
        self.frames.release(link)
        for call in [call for call, its in self.calls.items() if its is link]:
            del self.calls[call]
            error = SandboxError(f"the node {link.prefix.rstrip('.')} is gone: {problem}", Outcome.NODE_LOST)
            if (creating := self.creates.pop(call, None)) is not None:
                self._gateway.creates.lose(creating, error)
                continue
            if (sandbox_id := self._destroys.pop(call, None)) is not None:
                self._gateway.ledger.unwant(link.prefix, sandbox_id, self.grant.owner)
            self.fail(call, error)

    def _hear(self, frame: bytes) -> None:
        try:
            if self.session is None:
                self._greet(msgspec.msgpack.decode(memoryview(frame)[4:], type=calls.Hello))
                return
            head = head_of(frame)
            route = ROUTES.get(head.kind)
            if route is Route.CALL:
                self._follow(head, frame)
            elif route is Route.SANDBOX:
                self._route(head, frame)
            else:
                self._answer(head, frame)
        except msgspec.MsgspecError as error:
            self.frames.close(f"an unreadable message: {error}")

    def _greet(self, hello: calls.Hello) -> None:
        grant = self._gateway.grant(hello, self.frames.peer_uid())
        problem = ""
        if hello.version != calls.VERSION:
            problem = (
                f"the gateway speaks version {calls.VERSION}, not {hello.version}; install the same hone everywhere"
            )
        elif grant is None:
            problem = "the gateway does not let you in; check the token"
        elif not self._gateway.has_room(grant.owner):
            problem = f"{grant.owner} has as many clients here as it may have, or all together have"
        if grant is None or problem:
            self.frames.say(calls.Failed(0, "value", problem))
            self.frames.close(problem)
            return
        self._late.cancel()
        self.grant = grant
        self.frames.max_bytes = MAX_FRAME_BYTES
        self.session = self._gateway.join(self, grant, hello.session)
        self.frames.say(calls.Welcome(""))
        for prefix in self.session.prefixes | self._gateway.ledger.prefixes_of(grant.owner):
            self.link(prefix)  # what it has there outlives its absence only if it is back there

    def _follow(self, head: Head, frame: bytes) -> None:
        if (link := self.calls.get(head.call)) is None:
            if head.kind == "Cancel" and (creating := self.creates.pop(head.call, None)) is not None:
                self._gateway.creates.leave(creating)
            return
        if head.kind == "Cancel":
            if head.call in self.creates:
                return  # the answer is wanted still: it binds the key
            del self.calls[head.call]
            self._destroys.pop(head.call, None)
        link.write(frame)

    def _route(self, head: Head, frame: bytes) -> None:
        if not self._may(head.call, Scope.USE):
            return
        sandbox_id = msgspec.msgpack.decode(head.about, type=str)
        prefix = sandbox_id[: sandbox_id.rfind(".") + 1]
        link = self._links.get(prefix) or self.link(prefix)
        if link is None:
            if head.kind == "Destroy":  # with its node, it is gone already
                self._gateway.ledger.unwant(prefix, sandbox_id, self.grant.owner)
                self.frames.say(calls.Done(head.call, NIL))
            else:
                self.fail(head.call, SandboxError(f"{sandbox_id}: its node is gone", Outcome.NODE_LOST))
            return
        if not self._is_new(head.call):
            return
        self.calls[head.call] = link
        if head.kind == "Destroy":
            self._destroys[head.call] = sandbox_id
        link.write(frame)

    def _answer(self, head: Head, frame: bytes) -> None:
        match head.kind:
            case "Ping":
                self.frames.write(frame)
            case "Create":
                if self._may(head.call, Scope.CREATE) and self._is_new(head.call):
                    self._gateway.creates.ask(
                        self, msgspec.msgpack.decode(memoryview(frame)[4:], type=calls.Create), frame
                    )
            case "Status":
                if self._may(head.call, Scope.OBSERVE):
                    self.begin(self._list(head.call))
            case "Statistics":
                if self._may(head.call, Scope.OBSERVE):
                    self.begin(self._count(head.call))
            case "Drain":
                if self._may(head.call, Scope.ADMIN):
                    self.begin(self._drain(msgspec.msgpack.decode(memoryview(frame)[4:], type=calls.Drain)))
            case "Hello":
                self.frames.close("a second greeting")
            case _:
                self.fail(head.call, ValueError(f"a call that this gateway does not know: {head.kind}"))

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

    def _is_new(self, call: int) -> bool:
        if call in self.calls or call in self.creates:
            self.frames.close(f"call {call} is under way already")
            return False
        if len(self.calls) + len(self.creates) >= MAX_CALLS:
            self.fail(call, Busy(f"{MAX_CALLS} calls are under way", 1.0))
            return False
        return True

    def _press(self, is_full: bool) -> None:
        for link in self._links.values():
            if is_full:
                link.frames.hold(self)
            else:
                link.frames.release(self)

    def _lose(self, problem: str) -> None:
        logger.debug("a client is gone: %s", problem)
        self._late.cancel()
        for creating in list(self.creates.values()):
            self._gateway.creates.leave(creating)
        self.creates.clear()
        self.calls.clear()
        for link in list(self._links.values()):
            link.close("its client is gone")
        for task in self._tasks:
            task.cancel()
        self._gateway.leave(self)


class Link:
    """A connection of one client's session to one node."""

    def __init__(self, front: Front, control: Control) -> None:
        self.prefix = control.prefix
        self.frames = Frames(self._hear, self._lose, self._press)
        self._front = front
        self._control = control
        self._backlog: list[bytes] = []
        self._num_waiting_bytes = 0
        self._is_open = False
        self._is_over = False
        control.links.add(self)

    async def open(self) -> None:
        """Connect, and say for whom."""
        front, control = self._front, self._control
        assert front.session is not None
        if front.frames.is_full:
            self.frames.hold(front)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await connect(control.address, lambda: self.frames, ca_file=control.ca_file)
        except (OSError, TimeoutError, ValueError) as error:
            self.close(str(error) or f"no connection within {CONNECT_SECONDS:g} s")
            return
        if self._is_over:  # the node or the client went meanwhile
            self.frames.close()
            return
        self.frames.say(calls.Hello(calls.VERSION, front.session.name, control.token, front.grant.owner))

    def write(self, frame: bytes) -> None:
        """Hand a frame on to the node, when it has let us in."""
        if self._is_open:
            self.frames.write(frame)
            return
        self._backlog.append(frame)
        self._num_waiting_bytes += len(frame)
        if self._num_waiting_bytes > WINDOW_BYTES:
            self._front.frames.hold(self)

    def ping(self) -> None:
        """Let the node hear that somebody is there."""
        if self._is_open and not self.frames.is_full:
            self.frames.say(calls.Ping(0))

    def close(self, problem: str, *, is_dead: bool = False) -> None:
        """It is over; is_dead: what was written need not get there any more. Harmless when repeated."""
        if is_dead:
            self.frames.abort(problem)
        else:
            self.frames.close(problem)
        self._lose(problem)

    def _hear(self, frame: bytes) -> None:
        try:
            if self._is_open:
                self._front.hear_node(self, frame)
            else:
                self._enter(msgspec.msgpack.decode(memoryview(frame)[4:], type=calls.Welcome | calls.Failed))
        except msgspec.MsgspecError as error:
            self.close(f"an unreadable message: {error}")

    def _enter(self, answer: calls.Welcome | calls.Failed) -> None:
        if isinstance(answer, calls.Failed):
            self.close(answer.message)
        elif answer.prefix != self.prefix:
            self.close("it was started anew")
        else:
            self._is_open = True
            for frame in self._backlog:
                self.frames.write(frame)
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
            self._control.links.discard(self)
            self._front.lose_link(self, problem)
