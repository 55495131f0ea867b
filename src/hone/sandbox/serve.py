"""A node behind an address: what its clients ask for over their streams, done on its sandboxes."""

import asyncio
import contextlib
import hmac
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from hone.sandbox.addresses import Listener, parse_address
from hone.sandbox.errors import SandboxError
from hone.sandbox.lifecycle import End
from hone.sandbox.node import Node, NodeSandbox
from hone.sandbox.programs import Process
from hone.sandbox.wire import CHUNK_BYTES, WINDOW_BYTES, Credit, Stream, failed
from hone.schema import sandbox_calls as calls

GRACE_SECONDS = 10.0
HELLO_SECONDS = 10.0
DRAIN_SECONDS = 0.2

logger = logging.getLogger("hone.sandbox.serve")


class NodeServer:
    """Lets clients use a node; an async context manager.

    address: unix:/path, for this user and root only, or tcp://host:port or tls://host:port, for whoever has a token; tls
    wants a certificate with its key. tokens: names of owners by token; an owner sees its own sandboxes. On the unix
    address the owner is "local" and sees all. gateways: names of those tokens that see all, and speak for other owners.
    grace_seconds: how long the sandboxes of a client outlive its connection, for it to come back.
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
        self.sessions: dict[tuple[Caller, str], Session] = {}
        self._tokens = dict(tokens or {})
        self._gateways = frozenset(gateways)
        self._clients: set[_Client] = set()

    async def __aenter__(self) -> Self:
        await self._listener.open(self._accept)
        self.address = str(self._listener.address)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for client in list(self._clients):
            client.stream.close("the node was stopped")
        await asyncio.gather(*(client.ended() for client in list(self._clients)))
        for session in self.sessions.values():
            session.forget()
        self._listener.remove()

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

    def session(self, name: str, caller: "Caller") -> "Session":
        """A client's sandboxes, also when it comes back."""
        key = (caller, name)
        if key not in self.sessions:
            self.sessions[key] = Session(self, key)
        return self.sessions[key]

    async def until_answered(self, seconds: float) -> None:
        """Wait until all calls that are under way have ended, but no longer than this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(client.ended() for client in list(self._clients)))

    def _accept(self) -> Stream[Any]:
        client = _Client(self)
        self._clients.add(client)
        return client.stream

    def forget(self, client: "_Client") -> None:
        """A connection is over."""
        self._clients.discard(client)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. sees_all: everybody's sandboxes, not only those of this owner."""

    owner: str
    sees_all: bool = False


class Session:
    """The sandboxes that one client asked for. They end some time after its last connection has."""

    def __init__(self, server: NodeServer, key: tuple[Caller, str]) -> None:
        self.caller = key[0]
        self._server = server
        self._key = key
        self._sandboxes: dict[str, NodeSandbox] = {}
        self._num_connections = 0
        self._end: asyncio.TimerHandle | None = None

    def join(self) -> None:
        """It has another connection."""
        self._num_connections += 1
        self.forget()

    def leave(self) -> None:
        """It has one connection less."""
        self._num_connections -= 1
        if not self._num_connections:
            self._end = asyncio.get_running_loop().call_later(self._server.grace_seconds, self._over)

    def forget(self) -> None:
        """Its sandboxes are not ended after all."""
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def add(self, sandbox: NodeSandbox) -> None:
        """It has another sandbox."""
        if sandbox.sandbox_id not in self._sandboxes:
            self._sandboxes[sandbox.sandbox_id] = sandbox
            sandbox.over.add_done_callback(lambda _: self._sandboxes.pop(sandbox.sandbox_id, None))

    def _over(self) -> None:
        self._server.sessions.pop(self._key, None)
        for sandbox in list(self._sandboxes.values()):
            self._server.node.begin(self._server.node.end(sandbox, "its client is gone", End.CLIENT_GONE))


class _Client:
    """One connection."""

    def __init__(self, server: NodeServer) -> None:
        self.stream: Stream[Any] = Stream(calls.ToNode, self._hear, self._lose)
        self._server = server
        self._session: Session | None = None
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._programs: dict[int, _Program] = {}
        loop = asyncio.get_running_loop()
        self._late = loop.call_later(HELLO_SECONDS, lambda: self.stream.close("no greeting"))

    async def ended(self) -> None:
        """Wait until all of its calls have ended."""
        if self._calls:
            await asyncio.wait(list(self._calls.values()))

    def _hear(self, message: Any) -> None:
        if self._session is None:
            self._greet(message)
            return
        match message:
            case calls.Ping():
                self.stream.send(message)
            case calls.Cancel(call):
                if (task := self._calls.get(call)) is not None:
                    task.cancel()
            case calls.Data(call, _, data):
                if (program := self._programs.get(call)) is not None:
                    program.feed(data)
            case calls.Credit(call, stream, num_bytes):
                if (program := self._programs.get(call)) is not None and stream in program.credits:
                    program.credits[stream].give(num_bytes)
            case calls.Signal(call, number):
                if (program := self._programs.get(call)) is not None:
                    program.signal(number)
            case calls.Resize(call, rows, columns):
                if (program := self._programs.get(call)) is not None:
                    program.resize(rows, columns)
            case calls.Hello():
                self.stream.close("a second greeting")
            case _:
                if message.call in self._calls:
                    self.stream.close(f"call {message.call} is under way already")
                    return
                task = asyncio.get_running_loop().create_task(self._answer(message))
                self._calls[message.call] = task

    def _greet(self, message: Any) -> None:
        problem = ""
        caller = None
        if not isinstance(message, calls.Hello):
            problem = "no greeting"
        elif message.version != calls.VERSION:
            problem = (
                f"the node speaks version {calls.VERSION}, not {message.version}; install the same hone on both sides"
            )
        elif (caller := self._server.caller(message, self.stream.peer_uid())) is None:
            problem = "the node does not let you in; check the token"
        if caller is None or problem:
            self.stream.send(calls.Failed(0, "value", problem))
            self.stream.close(problem)
            return
        self._late.cancel()
        self._session = self._server.session(message.session, caller)
        self._session.join()
        self.stream.send(calls.Welcome(self._server.node.prefix))

    def _lose(self, problem: str) -> None:
        logger.debug("a client is gone: %s", problem)
        self._late.cancel()
        for task in self._calls.values():
            task.cancel()
        if self._session is not None:
            self._session.leave()
        self._server.forget(self)

    async def _answer(self, message: Any) -> None:
        try:
            result = await self._do(message)
            self.stream.send(calls.Done(message.call, msgspec.Raw(msgspec.msgpack.encode(result))))
        except asyncio.CancelledError:
            pass  # nobody waits for it
        except Exception as error:  # whatever it is, it is this call's alone
            if not isinstance(error, SandboxError | OSError | ValueError):
                logger.exception("a call failed: %s", type(message).__name__)
            self.stream.send(failed(message.call, error))
        finally:
            self._calls.pop(message.call, None)

    async def _do(self, message: Any) -> Any:
        assert self._session is not None
        node, caller = self._server.node, self._session.caller
        match message:
            case calls.Create(_, spec, key):
                sandbox = node.create(spec, key=key, owner=caller.owner)
                self._session.add(sandbox)
                return sandbox.sandbox_id
            case calls.Status():
                return node.sandboxes(None if caller.sees_all else caller.owner)
            case calls.Statistics():
                return node.statistics()
            case calls.Usage(_, sandbox_id):
                return node.usage(sandbox_id, None if caller.sees_all else caller.owner)
            case calls.Report() | calls.Drain() if not caller.sees_all:
                raise ValueError("this is for those who see everybody's sandboxes; a gateway's token will do")
            case calls.Report():
                return node.report()
            case calls.Drain(_, name, is_draining):
                if name not in ("", node.name, node.prefix.rstrip(".")):
                    raise ValueError(f"this is the node {node.name}, not {name}")
                return node.drain(is_draining)
        return await self._do_in(self._find(message.sandbox_id), message)

    async def _do_in(self, sandbox: NodeSandbox, message: Any) -> Any:
        match message:
            case calls.UntilReady():
                return await sandbox.ready()
            case calls.Exec(_, _, argv, stdin, env, cwd, timeout_seconds, kept_bytes):
                return await sandbox.exec(
                    argv, stdin=stdin, env=env, cwd=cwd, timeout_seconds=timeout_seconds, kept_bytes=kept_bytes
                )
            case calls.Spawn():
                return await self._spawn(sandbox, message)
            case calls.Python(_, _, code, is_session, timeout_seconds):
                run = sandbox.python if is_session else sandbox.snippet
                return await run(code, timeout_seconds=timeout_seconds)
            case calls.Read(_, _, path, max_bytes):
                return await sandbox.read(path, max_bytes=max_bytes)
            case calls.Write(_, _, path, data, mode):
                return await sandbox.write(path, data, mode=mode)
            case calls.List(_, _, path):
                return await sandbox.list(path)
            case calls.Remove(_, _, path, is_recursive):
                return await sandbox.remove(path, is_recursive=is_recursive)
            case calls.Pause(_, _, is_paused):
                return await (sandbox.pause() if is_paused else sandbox.resume())
            case calls.Renew(_, _, seconds):
                return await sandbox.renew(seconds)
            case calls.Destroy():
                await sandbox.close()
                return sandbox.used()
        raise ValueError(f"a call that this node does not know: {type(message).__name__}")

    def _find(self, sandbox_id: str) -> NodeSandbox:
        assert self._session is not None
        sandbox = self._server.node.sandbox(sandbox_id)
        caller = self._session.caller
        if not caller.sees_all and sandbox.lease.owner != caller.owner:
            raise SandboxError(f"{sandbox_id}: there is no such sandbox (any more)")
        return sandbox

    async def _spawn(self, sandbox: NodeSandbox, message: calls.Spawn) -> int:
        terminal = (message.terminal[0], message.terminal[1]) if message.terminal else None
        process = await sandbox.spawn(message.argv, env=message.env, cwd=message.cwd, terminal=terminal)
        program = self._programs[message.call] = _Program(self.stream, message.call, process)
        try:
            return await program.run()
        finally:
            self._programs.pop(message.call, None)
            await program.close()


class _Program:
    """A program whose streams go over the connection."""

    def __init__(self, stream: Stream[Any], call: int, process: Process) -> None:
        self.credits = {1: Credit(), 2: Credit()}
        self._stream = stream
        self._call = call
        self._process = process
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self._num_waiting_bytes = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Carry its streams until it has ended and all of its output is sent; what its children write later is not."""
        loop = asyncio.get_running_loop()
        self._stream.send(calls.Data(self._call, 0, b""))
        self._tasks = [
            loop.create_task(self._write()),
            loop.create_task(self._pump(1)),
            loop.create_task(self._pump(2)),
        ]
        code = await self._process.wait()
        self._stream.send(calls.Data(self._call, 3, str(code).encode()))
        pumps = self._tasks[1:]
        while not all(pump.done() for pump in pumps):
            done, _ = await asyncio.wait(pumps, timeout=DRAIN_SECONDS)
            if len(done) < len(pumps) and not any(credit.is_used_up for credit in self.credits.values()):
                break  # something in the background holds them open
        return code

    def feed(self, data: bytes) -> None:
        """Input has come; an empty piece is its end."""
        self._num_waiting_bytes += len(data)
        if self._num_waiting_bytes > WINDOW_BYTES:
            self._stream.close("more input than was granted")
            return
        self._input.put_nowait(data)

    def signal(self, number: int) -> None:
        """A signal for its group; 0 kills all of it."""
        with contextlib.suppress(SandboxError):  # its end will be told otherwise
            if number:
                self._process.signal(number)
            else:
                self._process.kill()

    def resize(self, rows: int, columns: int) -> None:
        """Its terminal has another size."""
        with contextlib.suppress(OSError):
            self._process.resize(rows, columns)

    async def close(self) -> None:
        """Kill it if it runs, and stop carrying."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._process.close()

    async def _write(self) -> None:
        while data := await self._input.get():
            try:
                await self._process.write(data)
            except OSError as error:
                self._stream.send(failed(self._call, BrokenPipeError(f"nobody reads: {error}")))
                return
            self._num_waiting_bytes -= len(data)
            self._stream.send(calls.Credit(self._call, 0, len(data)))
        self._process.end_input()

    async def _pump(self, number: int) -> None:
        read = self._process.read if number == 1 else self._process.read_error
        while True:
            size = await self.credits[number].take(CHUNK_BYTES)
            data = await read(size)
            self.credits[number].give(size - len(data))
            self._stream.send(calls.Data(self._call, number, data))
            if not data:
                return
