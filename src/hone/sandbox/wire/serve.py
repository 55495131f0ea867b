"""A node behind an address: who may come in, the connections, and whose session each goes on with."""

import asyncio
import contextlib
import hmac
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.node.lifecycle import End
from hone.sandbox.node.node import Node
from hone.sandbox.node.sandbox import NodeSandbox
from hone.sandbox.wire.addresses import Listener, parse_address
from hone.sandbox.wire.answers import Caller, answer
from hone.sandbox.wire.call_streams import CallStreams
from hone.sandbox.wire.frames import MAX_FRAME_BYTES, Stream, failed
from hone.sandbox.wire.session import Session, SessionLimits
from hone.schema import sandbox_calls as calls

GRACE_SECONDS = 10.0
HELLO_SECONDS = 10.0
TICK_SECONDS = 5.0
MAX_SILENT_TICKS = 60
MAX_GREETING_BYTES = 64 << 10
MAX_CLIENTS = 4_096
MAX_REMEMBERED = 10_000

ClientKey = tuple[Caller, str]  # and the secret of its session

logger = logging.getLogger("hone.sandbox.wire.serve")


class NodeServer:
    """Lets clients use a node; an async context manager.

    address: unix:/path, for this user and root only, or tcp://host:port or tls://host:port, for whoever has a token; tls
    wants a certificate with its key. tokens: names of owners by token; an owner sees its own sandboxes. On the unix
    address the owner is "local" and sees all. gateways: names of those tokens that see all, and speak for other owners.
    grace_seconds: how long the sandboxes and calls of a client outlive its connection, for it to come back.
    """

    def __init__(
        self,
        node: Node,
        address: str,
        *,
        tokens: Mapping[str, str] | None = None,
        gateways: Collection[str] = (),
        certificate: Path | None = None,
        key: Path | None = None,
        grace_seconds: float = GRACE_SECONDS,
        session_limits: SessionLimits = SessionLimits(),
    ) -> None:
        self._listener = Listener(parse_address(address), certificate=certificate, key=key)
        self._is_unix = self._listener.address.kind == "unix"
        if not self._is_unix and not tokens:
            raise ValueError(
                f"{address} would run programs for everybody who can reach it; give tokens, or a unix: address"
            )
        self.node = node
        self.address = address
        self.grace_seconds = grace_seconds
        self.session_limits = session_limits
        self._tokens = dict(tokens or {})
        self._gateways = frozenset(gateways)
        self._connections: set[_Connection] = set()
        self._clients: dict[ClientKey, _Client] = {}
        self._given_up: dict[ClientKey, None] = {}
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._listener.open(self.accept)
        self.address = str(self._listener.address)
        self._watching = asyncio.get_running_loop().create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        if self._watching is not None:
            self._watching.cancel()
        for connection in list(self._connections):
            connection.stream.close("the node was stopped")
        for client in list(self._clients.values()):
            await client.session.close()
        self._listener.remove()

    def welcome(self, hello: Any, peer_uid: int | None) -> "_Client":
        """The client that greets, also when it comes back; an error that it is told otherwise."""
        if not isinstance(hello, calls.Hello):
            raise ValueError("no greeting")
        if hello.version != calls.VERSION:
            raise ValueError(
                f"the node speaks version {calls.VERSION}, not {hello.version}; install the same hone on both sides"
            )
        if (caller := self.caller(hello, peer_uid)) is None:
            raise ValueError("the node does not let you in; check the token")
        if len(hello.session) < calls.MIN_SESSION_LENGTH:
            raise ValueError(f"a session that can be guessed: fewer than {calls.MIN_SESSION_LENGTH} characters")
        key = (caller, hello.session)
        if key not in self._clients:
            if len(self._clients) >= MAX_CLIENTS:
                raise Busy(f"the node has {MAX_CLIENTS} clients", self.grace_seconds)
            self._clients[key] = _Client(self, key, is_successor=key in self._given_up)
        return self._clients[key]

    def caller(self, hello: calls.Hello, peer_uid: int | None) -> "Caller | None":
        """Whom a client is; None if it is nobody we know, or speaks for others and may not."""
        if self._is_unix:
            if peer_uid not in (os.geteuid(), 0):
                return None
            return Caller(hello.owner) if hello.owner else Caller("local", sees_all=True)
        name = None
        for token, known in self._tokens.items():
            if hmac.compare_digest(token.encode(), hello.token.encode()):
                name = known
        if name is None or (hello.owner and name not in self._gateways):
            return None
        return Caller(hello.owner) if hello.owner else Caller(name, sees_all=name in self._gateways)

    async def until_answered(self, seconds: float) -> None:
        """Wait until all calls that are under way have ended, but no longer than this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(client.session.ended() for client in list(self._clients.values())))

    def forget(self, key: ClientKey) -> None:
        """A client was away for too long."""
        del self._clients[key]
        self._given_up[key] = None
        if len(self._given_up) > MAX_REMEMBERED:
            del self._given_up[next(iter(self._given_up))]

    def disconnected(self, connection: "_Connection") -> None:
        """A connection is over."""
        self._connections.discard(connection)

    def accept(self) -> Stream[Any]:
        """The protocol of one more connection."""
        connection = _Connection(self)
        self._connections.add(connection)
        return connection.stream

    async def _watch(self) -> None:
        """Hang up on whoever is silent: clients ping.

        There is time: a client that is busy with something else shall keep its sandboxes, when its machine is gone the
        kernel notices sooner, and a client that has come back by another connection does not need the old one.
        """
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for connection in list(self._connections):
                if connection.stream.count_silence() >= MAX_SILENT_TICKS:
                    connection.stream.close(f"nothing was heard for {MAX_SILENT_TICKS * TICK_SECONDS:g} s")


class _Client:
    """What one client has: its session, and the sandboxes that it asked for. They end when it is gone."""

    def __init__(self, server: NodeServer, key: ClientKey, *, is_successor: bool) -> None:
        self._server = server
        self._key = key
        self._sandboxes: dict[str, NodeSandbox] = {}
        self._caller = key[0]
        self.session = Session(
            self._do,
            self._over,
            grace_seconds=server.grace_seconds,
            limits=server.session_limits,
            is_successor=is_successor,
        )

    @property
    def has_sandboxes(self) -> bool:
        """Whether any would end with it."""
        return bool(self._sandboxes)

    async def _do(self, message: Any, streams: CallStreams) -> Any:
        return await answer(self._server.node, self._caller, message, streams, self._own)

    def _own(self, sandbox: NodeSandbox) -> None:
        if sandbox.sandbox_id not in self._sandboxes:
            self._sandboxes[sandbox.sandbox_id] = sandbox
            sandbox.over.add_done_callback(lambda _: self._sandboxes.pop(sandbox.sandbox_id, None))

    def _over(self) -> None:
        self._server.forget(self._key)
        self._server.node.begin(self.session.close())
        for sandbox in list(self._sandboxes.values()):
            self._server.node.begin(self._server.node.end(sandbox, "its client is gone", End.CLIENT_GONE))


class _Connection:
    """One connection, of nobody until the greeting."""

    def __init__(self, server: NodeServer) -> None:
        self.stream: Stream[Any] = Stream(
            calls.ToNode, self._hear, self._lose, max_frame_bytes=MAX_GREETING_BYTES, stops_when_full=True
        )
        self._server = server
        self._session: Session | None = None
        self._late = asyncio.get_running_loop().call_later(HELLO_SECONDS, lambda: self.stream.close("no greeting"))

    def _hear(self, message: Any) -> None:
        match message:
            case _ if self._session is None:
                self._greet(message)
            case calls.Ping():
                self.stream.send(message)
            case calls.Hello():
                raise ValueError("a second greeting")
            case _:
                self._session.hear(message)

    def _greet(self, message: Any) -> None:
        try:
            client = self._server.welcome(message, self.stream.peer_uid())
        except (ValueError, SandboxError) as error:
            self.stream.send(failed(0, error))
            self.stream.close(str(error))
            return
        self._late.cancel()
        self._session = client.session
        self.stream.max_frame_bytes = MAX_FRAME_BYTES
        self.stream.send(
            calls.Welcome(self._server.node.prefix, self._server.grace_seconds, has_sandboxes=client.has_sandboxes)
        )
        client.session.join(self.stream)

    def _lose(self, problem: str) -> None:
        logger.debug("a client is gone: %s", problem)
        self._late.cancel()
        if self._session is not None:
            self._session.leave(self.stream)
        self._server.disconnected(self)
