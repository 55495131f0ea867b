"""Decides what a node does and when: who gets a cell, which cells are kept warm, and when a lease is over.

No clock, no process and no task is in here: whoever calls says what time it is and does what `Lifecycle.take` lists.
"""

import collections
import heapq
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from hone.sandbox.errors import Busy, SandboxError
from hone.schema.sandboxes import Outcome, SandboxSpec

DEMAND_SECONDS = 5.0  # how far back a pool looks
AHEAD_SECONDS = 2.0  # and how far ahead it provides
MAX_REMEMBERED = 10_000
SPARE_DEADLINES = 1024
DRAINING_SECONDS = 5.0  # after which one may ask again a node that is being drained


@dataclass(frozen=True, slots=True)
class Limits:
    """What a node takes upon itself.

    max_sandboxes: cells at once, warm ones included. max_starting: cells that are being made at once. max_queued:
    sandboxes that wait for that; more are `Busy`. queue_seconds: after so long a wait a sandbox is given up. max_warm:
    cells that are kept ready, of all kinds together; how many of which kind follows the demand. max_snapshots,
    max_snapshot_mb: snapshots at once, and what they and sandboxes that began from them hold of memory, about.
    """

    max_sandboxes: int = 4096
    max_starting: int = 2 * (os.cpu_count() or 1)
    max_queued: int = 4096
    queue_seconds: float = 60.0
    max_warm: int = 0
    max_snapshots: int = 1024
    max_snapshot_mb: int = 4096


class Stage(StrEnum):
    """How far a sandbox is."""

    QUEUED = "queued"
    STARTING = "starting"
    READY = "ready"


class End(StrEnum):
    """What ended a sandbox."""

    CLOSED = "closed"
    CLIENT_GONE = "client_gone"
    LEASE_OVER = "lease_over"
    IDLE = "idle"
    NOT_READY = "not_ready"
    LOST = "lost"
    NODE_STOPPED = "node_stopped"


@dataclass(frozen=True, slots=True)
class Make:
    """Make a cell; tell `Lifecycle.made` or `Lifecycle.failed`. Cells are named by the number they get here.

    sandbox_id: whose it will be; empty if whoever comes may have it.
    """

    number: int
    spec: SandboxSpec
    sandbox_id: str = ""


@dataclass(frozen=True, slots=True)
class Give:
    """The sandbox is ready: this cell is its own. is_warm: it was there already."""

    sandbox_id: str
    number: int
    is_warm: bool = False


@dataclass(frozen=True, slots=True)
class Destroy:
    """Destroy a cell; tell `Lifecycle.gone`."""

    number: int


@dataclass(frozen=True, slots=True)
class Over:
    """The sandbox is no more; whoever waits for it or asks for it hears why."""

    sandbox_id: str
    problem: str
    outcome: Outcome
    end: End = End.LOST


Command = Make | Give | Destroy | Over


@dataclass(slots=True)
class Lease:
    """A sandbox as the node accounts for it. Times are of the caller's clock.

    snapshot_id: what it begins from, if not from its image alone. needs_own: whether no cell of a pool will do.
    has_begun: whether it was ready once.
    """

    sandbox_id: str
    spec: SandboxSpec
    owner: str
    key: str
    asked: float
    started: float = math.inf
    stage: Stage = Stage.QUEUED
    cell: int | None = None
    ends: float = math.inf
    used: float = 0.0
    num_uses: int = 0
    snapshot_id: str = ""
    needs_own: bool = False
    has_begun: bool = False

    def deadline(self) -> float:
        """When it is over unless it is used until then."""
        idle = self.spec.idle_seconds
        if self.stage is not Stage.READY or idle is None or self.num_uses:
            return self.ends
        return min(self.ends, self.used + idle)


@dataclass(slots=True)
class _Pool:
    """Cells of one kind. count: of requests, those of `DEMAND_SECONDS` ago at a third of their weight."""

    spec: SandboxSpec
    ready: list[int] = field(default_factory=list)
    num_starting: int = 0
    floor: int = 0
    count: float = 0.0
    counted: float = 0.0

    def demand(self, now: float) -> float:
        return self.count * math.exp((self.counted - now) / DEMAND_SECONDS)

    def ask(self, now: float) -> None:
        self.count, self.counted = self.demand(now) + 1, now

    def target(self, now: float) -> int:
        """So many as are asked for in the time ahead. One request a while ago is no demand."""
        return max(self.floor, math.floor(self.demand(now) * AHEAD_SECONDS / DEMAND_SECONDS + 0.5))


class Lifecycle:
    """The state of a node. prefix: of the ids of its sandboxes, which carry the node's name."""

    def __init__(self, prefix: str, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.leases: dict[str, Lease] = {}
        self.num_busy = 0
        self.is_draining = False
        self._prefix = prefix
        self._numbers = itertools.count(1)
        self._cells = itertools.count(1)
        self._by_key: dict[tuple[str, str], str] = {}
        self._queue: collections.OrderedDict[str, Lease] = collections.OrderedDict()
        self._makings: dict[int, str | bytes] = {}
        self._waiting: set[int] = set()
        self._dying: set[int] = set()
        self._pools: dict[bytes, _Pool] = {}
        self._num_given = 0
        self._num_warm = 0
        self._deadlines: list[tuple[float, str]] = []
        self._reasons: collections.OrderedDict[str, Over] = collections.OrderedDict()
        self._making_seconds = 0.01
        self._begun: dict[int, float] = {}
        self._commands: list[Command] = []

    def take(self) -> list[Command]:
        """What is to be done, in this order; it is the caller's from now on."""
        commands, self._commands = self._commands, []
        return commands

    def ask(self, spec: SandboxSpec, now: float, *, key: str = "", owner: str = "", snapshot_id: str = "") -> Lease:
        """A lease on a sandbox that will be there. key: the same key of the same owner is the same sandbox, while it lives.

        Raises `Busy` when as many wait as may or none are taken any more, `ValueError` for a key that
        stands for a sandbox of another kind.
        """
        if key and (known := self._by_key.get((owner, key))) is not None:
            lease = self.leases[known]
            if lease.spec != spec or lease.snapshot_id != snapshot_id:
                raise ValueError(
                    f"the key {key!r} stands for {lease.sandbox_id}, a sandbox of another kind; use another key"
                )
            return lease
        if self.is_draining:
            self.num_busy += 1
            raise Busy("the node takes no new sandboxes", DRAINING_SECONDS)
        if not snapshot_id:
            self._pool(spec).ask(now)
        if len(self._queue) >= self.limits.max_queued:
            self.num_busy += 1
            raise Busy(f"{len(self._queue)} sandboxes wait already", self._wait_seconds())
        lease = Lease(f"{self._prefix}{next(self._numbers)}", spec, owner, key, asked=now, snapshot_id=snapshot_id)
        lease.needs_own = bool(snapshot_id)
        lease.ends = now + self.limits.queue_seconds
        self.leases[lease.sandbox_id] = lease
        if key:
            self._by_key[owner, key] = lease.sandbox_id
        self._watch(lease)
        self._queue[lease.sandbox_id] = lease
        self._advance(now)
        return lease

    def made(self, number: int, now: float) -> None:
        """A cell is ready."""
        purpose = self._end_making(number, now)
        lease = self.leases.get(purpose) if isinstance(purpose, str) else None
        if isinstance(purpose, bytes):
            self._pools[purpose].ready.append(number)
        elif lease is not None:
            self._give(lease, number, now)
        else:  # its lease has ended meanwhile
            self._destroy(number)
        self._advance(now)

    def waits(self, number: int, now: float) -> None:
        """A cell is not being made yet: its image is to be had first. Others may start meanwhile."""
        self._waiting.add(number)
        self._advance(now)

    def goes_on(self, number: int) -> None:
        """It is being made now."""
        self._waiting.discard(number)

    def failed(self, number: int, now: float, problem: str, outcome: Outcome) -> None:
        """A cell could not be made. Nothing of it is left."""
        purpose = self._end_making(number, now)
        if isinstance(purpose, bytes):
            self._num_warm -= 1
            pool = self._pools[purpose]
            pool.count, pool.floor = 0.0, 0  # until somebody asks for one, and hears the reason
        elif purpose in self.leases:
            self._end(self.leases[purpose], problem, outcome, End.NOT_READY)
        self._advance(now)

    def gone(self, number: int, now: float) -> None:
        """A cell is destroyed."""
        self._dying.discard(number)
        self._advance(now)

    def knows(self, key: str, owner: str) -> bool:
        """Whether a sandbox of this key lives."""
        return bool(key) and (owner, key) in self._by_key

    def find(self, sandbox_id: str) -> Lease:
        """The lease of a sandbox; `SandboxError` that says why there is none."""
        lease = self.leases.get(sandbox_id)
        if lease is not None:
            return lease
        over = self._reasons.get(sandbox_id)
        if over is not None:
            raise SandboxError(f"{sandbox_id}: {over.problem}", over.outcome)
        if not sandbox_id.startswith(self._prefix):
            raise SandboxError(f"{sandbox_id}: its node is gone, or was started anew", Outcome.NODE_LOST)
        raise SandboxError(f"{sandbox_id}: there is no such sandbox (any more)")

    def begin_use(self, lease: Lease) -> None:
        """A call begins; while there is one, a sandbox is not idle."""
        lease.num_uses += 1

    def end_use(self, lease: Lease, now: float) -> None:
        """A call has ended."""
        lease.num_uses -= 1
        lease.used = now
        if not lease.num_uses and lease.spec.idle_seconds is not None:
            self._watch(lease)

    def renew(self, lease: Lease, now: float, seconds: float) -> None:
        """The lease lasts for so long from now."""
        if not seconds > 0:
            raise ValueError(f"{seconds:g} s is no time for a lease")
        if not lease.has_begun:
            lease.spec = msgspec.structs.replace(lease.spec, ttl_seconds=seconds)
            return
        lease.ends = now + seconds
        self._watch(lease)

    def exchange(self, lease: Lease, now: float) -> None:
        """Destroy the cell of a sandbox that is ready and make it another one, before all that wait; its lease goes on."""
        assert lease.cell is not None
        number, lease.cell = lease.cell, None
        lease.stage, lease.needs_own = Stage.QUEUED, True
        self._num_given -= 1
        self._dying.add(number)
        self._queue[lease.sandbox_id] = lease
        self._queue.move_to_end(lease.sandbox_id, last=False)
        self._advance(now)
        self._commands.append(Destroy(number))

    def end(
        self,
        sandbox_id: str,
        now: float,
        problem: str,
        outcome: Outcome = Outcome.AGENT_LOST,
        end: End = End.LOST,
    ) -> None:
        """A lease is over. Harmless when repeated."""
        lease = self.leases.get(sandbox_id)
        if lease is not None:
            self._end(lease, problem, outcome, end)
            self._advance(now)

    def keep_warm(self, spec: SandboxSpec, count: int, now: float) -> None:
        """Keep at least so many cells of this kind ready, within the limits, whatever the demand."""
        self._pool(spec).floor = count
        self._advance(now)

    def tick(self, now: float) -> None:
        """End what is over; to be called at `next_deadline`, and now and then for the pools to shrink."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, sandbox_id = heapq.heappop(self._deadlines)
            lease = self.leases.get(sandbox_id)
            if lease is None:
                continue
            if lease.deadline() > now:
                self._watch(lease)
            elif not lease.has_begun:
                self._end(
                    lease, f"it was not ready within {self.limits.queue_seconds:g} s", Outcome.NODE_LOST, End.NOT_READY
                )
            elif lease.ends <= now:
                self._end(lease, "its lease is over", Outcome.AGENT_LOST, End.LEASE_OVER)
            else:
                self._end(
                    lease, f"nothing was asked of it for {lease.spec.idle_seconds:g} s", Outcome.AGENT_LOST, End.IDLE
                )
        self._shrink(now)
        self._advance(now)

    def next_deadline(self) -> float:
        """When `tick` has something to do; infinity if that depends on others."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def num_in(self, stage: Stage) -> int:
        """Sandboxes that are so far."""
        return sum(lease.stage is stage for lease in self.leases.values())

    @property
    def num_cells(self) -> int:
        """Cells that exist, are being made or being destroyed."""
        return self._num_given + self.num_warm + len(self._makings) + len(self._dying)

    @property
    def num_making(self) -> int:
        """Cells that are being made."""
        return len(self._makings)

    @property
    def _num_starting(self) -> int:
        return len(self._makings) - len(self._waiting)

    @property
    def num_warm(self) -> int:
        """Cells that are ready for whoever comes."""
        return sum(len(pool.ready) for pool in self._pools.values())

    @property
    def num_dying(self) -> int:
        """Cells that are being destroyed."""
        return len(self._dying)

    def cells(self) -> Iterator[int]:
        """All cells that are ready, given to somebody or not."""
        for lease in self.leases.values():
            if lease.cell is not None:
                yield lease.cell
        for pool in self._pools.values():
            yield from pool.ready

    def _advance(self, now: float) -> None:
        """Give out what is warm, make what is waited for, then what will be."""
        room = self.limits.max_sandboxes - self.num_cells
        while self._queue:
            lease = next(iter(self._queue.values()))
            pool = None if lease.needs_own else self._pool(lease.spec)
            if pool is not None and pool.ready:
                self._queue.popitem(last=False)
                self._num_warm -= 1
                self._give(lease, pool.ready.pop(), now, is_warm=True)
                continue
            if self._num_starting >= self.limits.max_starting:
                return
            if room <= 0:
                self._drop_one_warm()
                return
            self._queue.popitem(last=False)
            lease.stage, lease.started = Stage.STARTING, now
            self._make(lease.sandbox_id, lease.spec, now)
            room -= 1
        self._refill(now, room)

    def _refill(self, now: float, room: int) -> None:
        if not self.limits.max_warm:
            return
        for key, pool in self._pools.items():
            missing = pool.target(now) - len(pool.ready) - pool.num_starting
            free = min(
                self.limits.max_warm - self._num_warm, self.limits.max_starting - self._num_starting, room, missing
            )
            for _ in range(free):
                pool.num_starting += 1
                self._num_warm += 1
                room -= 1
                self._make(key, pool.spec, now)

    def _shrink(self, now: float) -> None:
        for key, pool in list(self._pools.items()):
            while len(pool.ready) > pool.target(now):
                self._num_warm -= 1
                self._destroy(pool.ready.pop())
            if not pool.ready and not pool.num_starting and not pool.floor and pool.demand(now) < 0.01:
                del self._pools[key]

    def _drop_one_warm(self) -> None:
        for pool in self._pools.values():
            if pool.ready:
                self._num_warm -= 1
                self._destroy(pool.ready.pop())
                return

    def _give(self, lease: Lease, number: int, now: float, *, is_warm: bool = False) -> None:
        lease.stage, lease.cell, lease.used = Stage.READY, number, now
        self._num_given += 1
        if not lease.has_begun:
            lease.has_begun = True
            lease.ends = now + lease.spec.ttl_seconds
        self._watch(lease)
        self._commands.append(Give(lease.sandbox_id, number, is_warm))

    def _end(self, lease: Lease, problem: str, outcome: Outcome, end: End) -> None:
        del self.leases[lease.sandbox_id]
        self._queue.pop(lease.sandbox_id, None)
        self._by_key.pop((lease.owner, lease.key), None)
        over = self._reasons[lease.sandbox_id] = Over(lease.sandbox_id, problem, outcome, end)
        if len(self._reasons) > MAX_REMEMBERED:
            self._reasons.popitem(last=False)
        self._commands.append(over)
        if lease.cell is not None:
            self._num_given -= 1
            self._destroy(lease.cell)

    def _make(self, purpose: str | bytes, spec: SandboxSpec, now: float) -> None:
        number = next(self._cells)
        self._makings[number] = purpose
        self._begun[number] = now
        self._commands.append(Make(number, kind_of(spec), purpose if isinstance(purpose, str) else ""))

    def _end_making(self, number: int, now: float) -> str | bytes:
        self._making_seconds += 0.1 * (now - self._begun.pop(number) - self._making_seconds)
        purpose = self._makings.pop(number)
        self._waiting.discard(number)
        if isinstance(purpose, bytes):
            self._pools[purpose].num_starting -= 1
        return purpose

    def _destroy(self, number: int) -> None:
        self._dying.add(number)
        self._commands.append(Destroy(number))

    def _watch(self, lease: Lease) -> None:
        heapq.heappush(self._deadlines, (lease.deadline(), lease.sandbox_id))
        if len(self._deadlines) > SPARE_DEADLINES + 4 * len(self.leases):  # most are of what is over or was put off
            self._deadlines = [(one.deadline(), one.sandbox_id) for one in self.leases.values()]
            heapq.heapify(self._deadlines)

    def _pool(self, spec: SandboxSpec) -> _Pool:
        kind = kind_of(spec)
        key = msgspec.msgpack.encode(kind)
        if (pool := self._pools.get(key)) is None:
            pool = self._pools[key] = _Pool(kind)
        return pool

    def _wait_seconds(self) -> float:
        return max(0.05, len(self._queue) * self._making_seconds / self.limits.max_starting)


def kind_of(spec: SandboxSpec) -> SandboxSpec:
    """What is alike in the cells of sandboxes that differ in lease, purpose, environment variables and allow-list only.

    One with an allow-list begins as one without network: its proxy is of the node, and comes when it is given out.
    """
    plain = SandboxSpec()
    network = "none" if spec.network == "allow" else spec.network
    return msgspec.structs.replace(
        spec, ttl_seconds=plain.ttl_seconds, idle_seconds=None, env={}, rollout="", network=network, allow=()
    )
