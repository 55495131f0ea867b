"""Creations through a gateway: placed, tried elsewhere where a node is busy, and one sandbox for one key."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.gateway.ledger import Entry
from hone.sandbox.gateway.placement import order
from hone.sandbox.gateway.quotas import Rate, check_quota
from hone.sandbox.gateway.relay import prefix_of
from hone.sandbox.wire.frames import failed, framed
from hone.schema import sandbox_calls as calls
from hone.schema.sandboxes import Outcome, SandboxSpec

if TYPE_CHECKING:
    from hone.sandbox.gateway.fronts import Front
    from hone.sandbox.gateway.gateway import Gateway

NO_NODE_SECONDS = 1.0
MAX_KEY_LENGTH = 512


@dataclass(slots=True, eq=False)
class Creating:
    """A creation under way. home: the only node that has what it begins from; empty if any node will do.

    left: nodes that were not asked yet. is_repeated: a node has the sandbox, or had.
    """

    front: "Front"
    call: int
    spec: SandboxSpec
    key: str
    frame: bytes
    home: str = ""
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
        if len(message.key) > MAX_KEY_LENGTH:
            front.fail(
                message.call, ValueError(f"a key of {len(message.key)} characters; at most {MAX_KEY_LENGTH} will do")
            )
            return
        home = prefix_of(message.snapshot_id)
        creating = Creating(front, message.call, message.spec, message.key, frame, home)
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
        del creating.front.creates[creating.call]
        creating.front.frames.write(frame)
        self._settle(entry)

    def repeat(self, creating: Creating) -> None:
        """The connection to the node broke; over another one the same question has the same answer."""
        assert creating.entry is not None
        node = creating.front.node(creating.entry.prefix)
        if node is None:
            self.lose(creating, SandboxError("its node is gone", Outcome.NODE_LOST))
        else:
            creating.front.calls[creating.call] = node
            node.hand(creating.frame, creating.front.frames)
            creating.front.frames.flush_handed()

    def lose(self, creating: Creating, error: SandboxError) -> None:
        """The node is lost, and with it the answer: there may be a sandbox."""
        assert creating.entry is not None
        del creating.front.creates[creating.call]
        self._gateway.ledger.doubt(creating.entry, time.monotonic())
        creating.front.fail(creating.call, error)
        self._settle(creating.entry)

    def leave(self, creates: Sequence[Creating]) -> None:
        """Their client is gone."""
        asked = [one.entry for one in creates if not self._stop_waiting(one) and one.entry is not None]
        for entry in asked:
            self._gateway.ledger.doubt(entry, time.monotonic())
        for entry in asked:
            self._settle(entry)

    def cancel(self, creating: Creating) -> None:
        """Its client wants it no more. What a node was asked for is heard to its end: the answer binds the key."""
        if self._stop_waiting(creating):
            del creating.front.creates[creating.call]
            creating.front.frames.say(calls.Failed(creating.call, "cancelled", "the call was cancelled"))

    def _stop_waiting(self, creating: Creating) -> bool:
        assert creating.entry is not None
        waiting = self._waiting.get(creating.entry, [])
        if creating in waiting:
            waiting.remove(creating)
            return True
        return False

    def _go_on(self, creating: Creating, entry: Entry, answer: calls.Failed) -> None:
        busy = Busy("", answer.number)
        busy.args = (answer.message,)
        creating.refusals.append(busy)
        front = creating.front
        front.calls.pop(creating.call).hand(framed(calls.Received(creating.call)), front.frames)
        if creating.is_repeated:
            self._gateway.ledger.drop(entry)
            creating.is_repeated = False
            self._place(creating)
            self._settle(entry)
        else:
            self._try_next(creating)
        front.frames.flush_handed()

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
            creating.left = [creating.home] if creating.home else self._candidates(creating, owner)
            self._try_next(creating)

    def _candidates(self, creating: Creating, owner: str) -> list[str]:
        return order(self._gateway.candidates(), creating.spec, f"{owner}\0{creating.key or creating.call}")

    def _check(self, creating: Creating, owner: str) -> None:
        now, ledger = time.monotonic(), self._gateway.ledger
        if creating.key and (seconds := ledger.fenced_seconds(owner, creating.key, now)):
            raise Busy(
                f"the key {creating.key!r} may stand for a sandbox of a lost node still; use another key", seconds
            )
        quota = self._gateway.tenants.quota(owner)
        check_quota(quota, ledger.totals(owner), creating.spec)
        rate = self._rates.setdefault(
            owner, Rate(quota.creates_per_second, quota.creates_at_once, left=quota.creates_at_once)
        )
        if seconds := rate.wait_seconds(now):
            raise Busy(f"more than {quota.creates_per_second:g} creations a second", seconds)

    def _try_next(self, creating: Creating) -> None:
        entry, front = creating.entry, creating.front
        assert entry is not None
        while creating.left:
            node = front.node(prefix := creating.left.pop(0))
            if node is None:
                continue
            self._gateway.ledger.ask(entry, prefix)
            front.calls[creating.call] = node
            node.hand(creating.frame, front.frames)
            return
        self._gateway.ledger.drop(entry)
        self._refuse(creating, self._why_not(creating))
        self._settle(entry)

    def _why_not(self, creating: Creating) -> SandboxError:
        if creating.refusals:
            return min(creating.refusals, key=lambda one: one.retry_after_seconds)
        if creating.home and creating.home not in self._gateway.nodes:
            return SandboxError(
                f"the node {creating.home[:100].rstrip('.')} of the snapshot is gone", Outcome.NODE_LOST
            )
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
