"""Creations through a gateway: placed, tried elsewhere where a node is busy, and one sandbox for one key."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.ledger import Entry
from hone.sandbox.placement import order
from hone.sandbox.quotas import Rate, check_quota
from hone.sandbox.wire import failed
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import SandboxSpec

if TYPE_CHECKING:
    from hone.sandbox.fronts import Front
    from hone.sandbox.gateway import Gateway

NO_NODE_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Creating:
    """A creation under way. left: nodes that were not asked yet. is_repeated: a node has the sandbox, or had."""

    front: "Front"
    call: int
    spec: SandboxSpec
    key: str
    frame: bytes
    entry: Entry | None = None
    left: list[str] = field(default_factory=list)
    refusals: list[Busy] = field(default_factory=list)
    is_repeated: bool = False


class Creates:
    """All creations that are under way."""

    def __init__(self, gateway: "Gateway") -> None:
        self.num_refused = 0
        self._gateway = gateway
        self._rates: dict[str, Rate] = {}
        self._waiting: dict[Entry, list[Creating]] = {}

    def ask(self, front: "Front", message: calls.Create, frame: bytes) -> None:
        """A client wants a sandbox."""
        creating = Creating(front, message.call, message.spec, message.key, frame)
        quota = self._gateway.tenants.quota(front.grant.owner)
        rate = self._rates.setdefault(
            front.grant.owner, Rate(quota.creates_per_second, quota.creates_at_once, left=quota.creates_at_once)
        )
        if seconds := rate.wait_seconds(time.monotonic()):
            self._refuse(creating, Busy(f"more than {quota.creates_per_second:g} creations a second", seconds))
            return
        front.creates[message.call] = creating
        self._place(creating)

    def hear(self, creating: Creating, frame: bytes) -> None:
        """The node has answered: it is over, unless another node can be asked."""
        entry, ledger = creating.entry, self._gateway.ledger
        assert entry is not None
        answer = msgspec.msgpack.decode(memoryview(frame)[4:], type=calls.Done | calls.Failed)
        if isinstance(answer, calls.Done):
            ledger.confirm(entry, msgspec.msgpack.decode(answer.result, type=str), time.monotonic())
        else:
            is_busy = answer.kind == "busy"
            ledger.refuse(entry, is_absent=is_busy)  # what it has, it gives, busy or not
            if is_busy:
                self._go_on(creating, entry, answer)
                return
            ledger.drop(entry)
        creating.front.frames.write(frame)
        self._settle(entry)

    def lose(self, creating: Creating, error: SandboxError) -> None:
        """The connection to the node is lost, and with it the answer: there may be a sandbox."""
        assert creating.entry is not None
        self._gateway.ledger.doubt(creating.entry, time.monotonic())
        creating.front.fail(creating.call, error)
        self._settle(creating.entry)

    def leave(self, creating: Creating) -> None:
        """Nobody waits for it any more."""
        entry = creating.entry
        assert entry is not None
        if creating in self._waiting.get(entry, []):
            self._waiting[entry].remove(creating)
            return
        self._gateway.ledger.doubt(entry, time.monotonic())
        self._settle(entry)

    def _go_on(self, creating: Creating, entry: Entry, answer: calls.Failed) -> None:
        busy = Busy("", answer.number)
        busy.args = (answer.message,)
        creating.refusals.append(busy)
        creating.front.creates[creating.call] = creating
        if creating.is_repeated:
            self._gateway.ledger.drop(entry)
            creating.is_repeated = False
            self._place(creating)
            self._settle(entry)
        else:
            self._try_next(creating)

    def _place(self, creating: Creating) -> None:
        gateway, owner = self._gateway, creating.front.grant.owner
        entry = gateway.ledger.find(owner, creating.key)
        creating.entry = entry
        if entry is not None and entry.is_bound:
            creating.is_repeated = True
            creating.left = [entry.prefix]
            self._try_next(creating)
        elif entry is not None:
            self._waiting.setdefault(entry, []).append(creating)
        else:
            try:
                self._check(creating, owner)
            except SandboxError as error:
                self._refuse(creating, error)
                return
            creating.entry = gateway.ledger.begin(owner, creating.key, creating.spec)
            creating.left = order(gateway.candidates(), creating.spec, f"{owner}\0{creating.key or creating.call}")
            self._try_next(creating)

    def _check(self, creating: Creating, owner: str) -> None:
        now, ledger = time.monotonic(), self._gateway.ledger
        if creating.key and (seconds := ledger.fenced_seconds(owner, creating.key, now)):
            raise Busy(
                f"the key {creating.key!r} may stand for a sandbox of a lost node still; use another key", seconds
            )
        check_quota(self._gateway.tenants.quota(owner), ledger.totals(owner), creating.spec)

    def _try_next(self, creating: Creating) -> None:
        entry, front = creating.entry, creating.front
        assert entry is not None
        while creating.left:
            link = front.link(prefix := creating.left.pop(0))
            if link is None:
                continue
            self._gateway.ledger.ask(entry, prefix)
            front.calls[creating.call] = link
            link.write(creating.frame)
            return
        self._gateway.ledger.drop(entry)
        self._refuse(creating, self._why_not(creating))
        self._settle(entry)

    def _why_not(self, creating: Creating) -> SandboxError:
        if creating.refusals:
            return min(creating.refusals, key=lambda one: one.retry_after_seconds)
        if not self._gateway.nodes:
            return Busy("no node is there", NO_NODE_SECONDS)
        return Busy(f"no node takes a sandbox of {creating.spec.memory_mb} MB now", NO_NODE_SECONDS)

    def _refuse(self, creating: Creating, error: SandboxError) -> None:
        self.num_refused += 1
        creating.front.creates.pop(creating.call, None)
        creating.front.frames.say(failed(creating.call, error))

    def _settle(self, entry: Entry) -> None:
        """What becomes of a key is known, so those who asked for the same may go on."""
        for creating in self._waiting.pop(entry, []):
            self._place(creating)
