"""Which env worker runs what: a request goes to the least loaded worker that has its environment and room for it."""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from hone.schema.rollouts import RolloutRequest

Key = tuple[str, int]
"""Group and attempt."""


@dataclass(slots=True)
class Worker:
    """A connected env worker: its place on the socket, what it can run, when it was last heard, what it runs since when."""

    name: str
    pid: int
    identity: bytes
    environments: frozenset[str]
    heard_at: float
    running: dict[Key, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lost:
    """Rollouts of a worker that will not answer any more; `has_died`: the worker died, rather than reconnected."""

    worker: str
    keys: list[Key]
    has_died: bool


class Dispatch:
    """Who runs what. Times are handed in. max_rollouts: under way in one worker; a larger group runs alone."""

    def __init__(self, max_rollouts: int) -> None:
        self._max_rollouts = max_rollouts
        self._workers: dict[str, Worker] = {}
        self._names: dict[bytes, str] = {}
        self._silent: dict[bytes, Worker] = {}
        self._owners: dict[Key, Worker] = {}
        self._queues: dict[str, deque[tuple[int, RolloutRequest]]] = {}
        self._arrivals = itertools.count()

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    @property
    def num_queued(self) -> int:
        """Requests that no worker has yet."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def unserved(self) -> list[str]:
        """Environments with queued requests that no connected worker has."""
        served = frozenset[str]().union(*(worker.environments for worker in self._workers.values()))
        return sorted(name for name, queue in self._queues.items() if queue and name not in served)

    @property
    def identities(self) -> list[bytes]:
        return [worker.identity for worker in self._workers.values()]

    def greet(self, name: str, pid: int, identity: bytes, environments: frozenset[str], now: float) -> Lost | None:
        """A worker says hello, which it does when it runs nothing: what it had is lost."""
        lost = None
        self._silent = {place: worker for place, worker in self._silent.items() if worker.name != name}
        before = self._workers.get(name)
        if before is not None:
            lost = self._remove(before, has_died=before.pid != pid)
        self._workers[name] = Worker(name, pid, identity, environments, now)
        self._names[identity] = name
        return lost

    def dismiss(self, name: str) -> Lost | None:
        """A worker ends itself; what it runs is lost, and not at fault."""
        worker = self._workers.get(name)
        return None if worker is None else self._remove(worker, has_died=False)

    def hear(self, identity: bytes, now: float) -> bool:
        """Something came from this connection; false if it belongs to no worker that we know."""
        name = self._names.get(identity)
        if name is None:
            return False
        self._workers[name].heard_at = now
        return True

    def take_back(self, identity: bytes, now: float) -> list[str] | None:
        """A worker that was given up for its silence speaks again on the same connection.

        Returns the groups that it ran then, which it must forget; None if this connection is no such worker's.
        """
        worker = self._silent.pop(identity, None)
        if worker is None:
            return None
        groups = sorted({group for group, _ in worker.running})
        self._workers[worker.name] = Worker(worker.name, worker.pid, identity, worker.environments, now)
        self._names[identity] = worker.name
        return groups

    def forgive(self, now: float) -> None:
        """We did not listen for a while: nobody's silence counts."""
        for worker in self._workers.values():
            worker.heard_at = now

    def silent(self, now: float, seconds: float) -> list[Lost]:
        """Give up workers that were not heard for this long."""
        gone = [worker for worker in self._workers.values() if now - worker.heard_at > seconds]
        self._silent |= {worker.identity: worker for worker in gone}
        return [self._remove(worker, has_died=True) for worker in gone]

    def overdue(self, now: float, seconds: float) -> list[Key]:
        """Give up rollouts that run for longer than this; their worker should have ended them long ago."""
        found = []
        for worker in self._workers.values():
            for key, since in worker.running.items():
                if now - since <= seconds:
                    break  # in the order in which they were sent
                found.append(key)
        for key in found:
            self.done(key)
        return found

    def submit(self, request: RolloutRequest) -> None:
        self._queues.setdefault(request.environment, deque()).append((next(self._arrivals), request))

    def withdraw(self, group: str) -> list[bytes]:
        """Forget a group; returns the connections of the workers that run some of it."""
        for name, queue in self._queues.items():
            if any(request.group == group for _, request in queue):
                self._queues[name] = deque(entry for entry in queue if entry[1].group != group)
        keys = [key for key in self._owners if key[0] == group]
        identities = {self._owners[key].identity for key in keys}
        for key in keys:
            self.done(key)
        return sorted(identities)

    def assign(self, now: float) -> list[tuple[bytes, RolloutRequest]]:
        """Hand out what is queued, first come first served, as far as there is room; returns what to send where."""
        assigned = []
        while choices := list(self._choices()):
            _, environment, worker = min(choices, key=lambda choice: choice[0])
            _, request = self._queues[environment].popleft()
            for attempt in request.attempts:
                key = request.group, attempt
                worker.running[key] = now
                self._owners[key] = worker
            assigned.append((worker.identity, request))
        return assigned

    def _choices(self) -> Iterator[tuple[int, str, Worker]]:
        """For each environment whose oldest request has a worker with room: when that came, and the worker."""
        for name, queue in self._queues.items():
            if not queue:
                continue
            able = [worker for worker in self._workers.values() if name in worker.environments]
            if not able:
                continue
            arrival, request = queue[0]
            least = min(able, key=lambda worker: len(worker.running))
            if not least.running or len(least.running) + len(request.attempts) <= self._max_rollouts:
                yield arrival, name, least

    def is_owner(self, identity: bytes, key: Key) -> bool:
        """Whether this attempt was sent to this connection and is still waited for there."""
        owner = self._owners.get(key)
        return owner is not None and owner.identity == identity

    def done(self, key: Key) -> None:
        """The attempt has an outcome, wherever it came from."""
        owner = self._owners.pop(key, None)
        if owner is not None:
            del owner.running[key]
        else:
            self._unqueue(key)

    def _unqueue(self, key: Key) -> None:
        """An attempt that was issued again may have its outcome before anybody has begun it a second time."""
        group, attempt = key
        for queue in self._queues.values():
            for position, (arrival, request) in enumerate(queue):
                if request.group == group and attempt in request.attempts:
                    attempts = [other for other in request.attempts if other != attempt]
                    del queue[position]
                    if attempts:
                        queue.insert(position, (arrival, msgspec.structs.replace(request, attempts=attempts)))
                    return

    def _remove(self, worker: Worker, has_died: bool) -> Lost:
        del self._workers[worker.name]
        del self._names[worker.identity]
        keys = list(worker.running)
        for key in keys:
            del self._owners[key]
        return Lost(worker.name, keys, has_died)
