"""Many nodes behind one address: who may come in, which nodes there are, and what is asked of all of them."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from hone.sandbox.errors import SandboxError
from hone.sandbox.gateway.control import CONNECT_SECONDS, PING_SECONDS, Control
from hone.sandbox.gateway.creates import Creates
from hone.sandbox.gateway.discovery import Source
from hone.sandbox.gateway.fronts import Front, Session
from hone.sandbox.gateway.ledger import Ledger
from hone.sandbox.gateway.placement import Candidate
from hone.sandbox.gateway.relay import Frames
from hone.sandbox.gateway.tenants import Grant, Scope, Tenants
from hone.sandbox.wire.addresses import Address, Listener, parse_address
from hone.schema import sandbox_calls as calls

NOTICE_SECONDS = 12.0  # within which a node notices that connections are dead, and then waits for clients to come back
MAX_SILENT_TICKS = 40
LOOK_SECONDS = 5.0
CONNECTION_PING_SECONDS = 2.0
MAX_CLIENTS = 8192
T = TypeVar("T")

logger = logging.getLogger("hone.sandbox.gateway.gateway")


class Gateway:
    """Hands on what clients ask of sandboxes to the nodes that have them; an async context manager.

    sources: where the nodes are. address: its own; a unix address lets in this user and root, as the owner "local"; others
    want tenants. token: that the nodes let it in with. ca_file: of the authorities that vouch for nodes at tls addresses.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        address: str,
        *,
        tenants: Tenants | None = None,
        token: str = "",
        ca_file: str = "",
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        self._listener = Listener(parse_address(address), certificate=certificate, key=key)
        self._is_unix = self._listener.address.kind == "unix"
        if not self._is_unix and tenants is None:
            raise ValueError(
                f"{address} would run programs for everybody who can reach it; give tenants, or a unix: address"
            )
        if not sources:
            raise ValueError("a gateway without nodes has nothing to do; give the address of one")
        self.address = address
        self.tenants = tenants or Tenants({}, {})
        self.ledger = Ledger()
        self.creates = Creates(self)
        self.nodes: dict[str, Control] = {}
        """Those that are there, by the prefix of their sandboxes' ids."""
        self.num_lost = 0
        self._sources = list(sources)
        self._token = token
        self._ca_file = ca_file
        self._fronts: set[Front] = set()
        self._sessions: dict[Session, Front] = {}
        self._controls: dict[Address, tuple[Control, asyncio.Task[None]]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        try:
            await self._look()
            async with asyncio.timeout(2 * CONNECT_SECONDS):  # clients that come back want their nodes known
                for control, _ in list(self._controls.values()):
                    await control.tried.wait()
        except TimeoutError:
            pass
        except BaseException:  # a cancellation too: undo, then pass it on
            await self._stop()
            raise
        self._tasks = [loop.create_task(self._keep_looking()), loop.create_task(self._keep_hearing())]
        try:
            await self._listener.open(self._accept)
        except BaseException:  # a cancellation too: undo, then pass it on
            await self._stop()
            raise
        self.address = str(self._listener.address)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for front in list(self._fronts):
            front.frames.close("the gateway was stopped")
        await self._stop()
        self._listener.remove()

    def grant(self, hello: calls.Hello, peer_uid: int | None) -> Grant | None:
        """What a client may; None if it may not come in."""
        if hello.owner:
            return None  # who speaks for others speaks to nodes
        if self._is_unix and peer_uid in (os.geteuid(), 0):
            return Grant("local", frozenset({Scope.ADMIN}))
        return self.tenants.grant(hello.token)

    def has_room(self, owner: str, name: str) -> bool:
        """Whether another client of an owner may come in; one that is back takes no more room than before."""
        num_clients = sum(one.owner == owner and one.name != name for one in self._sessions)
        return num_clients < self.tenants.quota(owner).max_clients and len(self._fronts) <= MAX_CLIENTS

    def join(self, front: Front, session: Session) -> None:
        """A client has come, or come back: then its connection before is over."""
        if (former := self._sessions.get(session)) is not None:
            former.frames.abort("its client has another connection")
        self._sessions[session] = front

    def leave(self, front: Front) -> None:
        """A client's connection is over."""
        self._fronts.discard(front)
        if front.session is not None and self._sessions.get(front.session) is front:
            del self._sessions[front.session]

    def candidates(self) -> list[Candidate]:
        """The nodes as they are for a new sandbox."""
        found = []
        for prefix, control in self.nodes.items():
            report, totals = control.report, self.ledger.at(prefix)
            assert report is not None
            found.append(
                Candidate(
                    prefix=prefix,
                    is_draining=report.is_draining,
                    images=frozenset(report.images),
                    num_sandboxes=totals.num_sandboxes,
                    max_sandboxes=report.max_sandboxes,
                    promised_memory_mb=totals.memory_mb,
                    memory_mb=report.memory_mb,
                    free_memory_mb=report.free_memory_mb,
                    promised_cpus=totals.cpus,
                    cores=report.cores,
                )
            )
        return found

    async def ask_all(self, message: Callable[[Control], Any], kind: type[T]) -> list[T]:
        """What all nodes say that say something."""
        answers = await asyncio.gather(
            *(one.call(message(one), kind) for one in list(self.nodes.values())), return_exceptions=True
        )
        told = []
        for one in answers:
            if isinstance(one, BaseException):
                if not isinstance(one, SandboxError | ValueError):
                    raise one
                logger.debug("a node does not answer: %s", one)
            else:
                told.append(one)
        return told

    async def statistics(self) -> dict[str, float]:
        """The sums of the nodes' numbers, and the gateway's own."""
        sums: dict[str, float] = {}
        for told in await self.ask_all(lambda one: calls.Statistics(one.number()), dict[str, float]):
            for name, value in told.items():
                sums[name] = sums.get(name, 0.0) + value
        return self.counts() | sums

    def counts(self) -> dict[str, float]:
        """The gateway's own numbers."""
        return {
            "gateway/nodes": len(self.nodes),
            "gateway/nodes_absent": len(self._controls) - len(self.nodes),
            "gateway/nodes_draining": sum(one.is_draining for one in self.candidates()),
            "gateway/nodes_lost": self.num_lost,
            "gateway/clients": len(self._fronts),
            "gateway/calls": sum(len(front.calls) for front in self._fronts),
            "gateway/creates_refused": self.creates.num_refused,
        }

    async def drain(self, name: str, is_draining: bool) -> int:
        """Have a node take no new sandboxes, or take them again; the number of those that it has."""
        found = [one for one in self.nodes.values() if name in (one.name, one.prefix.rstrip("."))]
        if len(found) != 1:
            known = ", ".join(sorted(one.prefix.rstrip(".") for one in self.nodes.values())) or "none"
            raise ValueError(f"{len(found)} nodes are called {name!r}; there are: {known}")
        (control,) = found
        left = await control.call(calls.Drain(control.number(), "", is_draining), int)
        if control.report is not None:
            control.report = msgspec.structs.replace(control.report, is_draining=is_draining)
        return left

    def node_came(self, control: Control) -> bool:
        """As `Watcher` has it."""
        if control.prefix in self.nodes:
            return False
        former = control.former_prefix
        if former and former != control.prefix and former.partition(".")[0] == control.name:
            self.ledger.bury(former)  # where it was listens another: the one before is dead
        self.nodes[control.prefix] = control
        logger.info("the node %s is there, at %s", control.prefix.rstrip("."), control.address)
        return True

    def node_told(self, control: Control, asked: float) -> None:
        """As `Watcher` has it."""
        assert control.report is not None
        for sandbox_id in self.ledger.take_report(control.prefix, asked, control.report.sandboxes):
            control.tell(calls.Destroy(control.number(), sandbox_id))

    def node_went(self, control: Control, problem: str) -> None:
        """As `Watcher` has it."""
        logger.warning("the node %s is lost: %s", control.prefix.rstrip("."), problem)
        self.nodes.pop(control.prefix, None)
        self.num_lost += 1
        self.ledger.lose(control.prefix, time.monotonic() + NOTICE_SECONDS + control.grace_seconds)
        for connection in list(control.connections):
            connection.close(problem, is_final=True)

    def _accept(self) -> Frames:
        front = Front(self)
        self._fronts.add(front)
        return front.frames

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """Learn where nodes are. One that is named no more is let go of when it is lost, not before."""
        named: set[Address] = set()
        for source in self._sources:
            named |= await source.addresses()
        for address in named - self._controls.keys():
            control = Control(address, self, token=self._token, ca_file=self._ca_file)
            self._controls[address] = (control, asyncio.get_running_loop().create_task(control.run()))
        for address in self._controls.keys() - named:
            control, task = self._controls[address]
            if not control.is_up:
                task.cancel()
                del self._controls[address]

    async def _keep_hearing(self) -> None:
        """Whoever we do not listen to shall not think that we are gone; nor shall nodes think that of clients."""
        pinged = 0.0
        while True:
            await asyncio.sleep(PING_SECONDS)
            now = time.monotonic()
            for front in list(self._fronts):
                if front.frames.is_held and not front.frames.is_full:
                    front.frames.say(calls.Ping(0))
                elif front.frames.count_silence() >= MAX_SILENT_TICKS:
                    front.frames.abort(f"nothing was heard for {MAX_SILENT_TICKS * PING_SECONDS:g} s")
            if now - pinged >= CONNECTION_PING_SECONDS:
                pinged = now
                for control in self.nodes.values():
                    for connection in control.connections:
                        connection.ping()

    async def _stop(self) -> None:
        tasks = [*self._tasks, *(task for _, task in self._controls.values())]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._controls.clear()
