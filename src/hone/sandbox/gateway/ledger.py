"""What a gateway knows of the sandboxes behind it: how much each owner has, and which node a key is bound to.

Kept from what passes through, put right by the nodes' reports. Nothing is looked up here on the way to a sandbox: its
id says where it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from hone.schema.sandbox_nodes import Leased
from hone.schema.sandboxes import SandboxSpec

HEARD_SECONDS = 1.0


@dataclass(slots=True)
class Totals:
    """What an owner has, with what it has asked for."""

    num_sandboxes: int = 0
    memory_mb: int = 0
    cpus: float = 0.0


@dataclass(slots=True, eq=False)
class Entry:
    """A sandbox, or the wish for one. prefix: of the node that has it, or may have it. told: when its id was.

    num_asked: requests for it that a node has not answered. doubtful: until when a node may hear of requests that nobody
    waits for any more; None without such. is_gone: it counts no more.
    """

    owner: str
    key: str
    memory_mb: int
    cpus: float
    prefix: str = ""
    sandbox_id: str = ""
    told: float = 0.0
    num_asked: int = 0
    doubtful: float | None = None
    is_gone: bool = False

    @property
    def is_bound(self) -> bool:
        """Whether it is, or may be, where it is said to be; else its place is not settled."""
        return bool(self.sandbox_id) or self.doubtful is not None


@dataclass(slots=True)
class _Lost:
    """A node that is gone, as far as one can see: what it had may live on there until a time."""

    until: float
    keys: set[tuple[str, str]] = field(default_factory=set)
    owners: dict[str, str] = field(default_factory=dict)
    unwanted: set[str] = field(default_factory=set)


class Ledger:
    """Entries by key and by sandbox."""

    def __init__(self) -> None:
        self._totals: dict[str, Totals] = {}
        self._entries: set[Entry] = set()
        self._by_id: dict[str, Entry] = {}
        self._by_key: dict[tuple[str, str], Entry] = {}
        self._doubtful: set[Entry] = set()
        self._num_at: dict[str, Totals] = {}
        self._ended: dict[str, set[str]] = {}
        self._lost: dict[str, _Lost] = {}
        self._missed: set[str] = set()

    def totals(self, owner: str) -> Totals:
        """What an owner has at once."""
        return self._totals.get(owner, Totals())

    def at(self, prefix: str) -> Totals:
        """What is promised at a node."""
        return self._num_at.get(prefix, Totals())

    def prefixes_of(self, owner: str) -> set[str]:
        """The nodes that have sandboxes of an owner."""
        return {entry.prefix for entry in self._entries if entry.owner == owner}

    def find(self, owner: str, key: str) -> Entry | None:
        """What a key stands for, if it is bound."""
        return self._by_key.get((owner, key)) if key else None

    def fenced_seconds(self, owner: str, key: str, now: float) -> float:
        """How long a lost node may still have the sandbox of a key; 0 if there is none such."""
        for prefix in [prefix for prefix, lost in self._lost.items() if lost.until <= now]:
            del self._lost[prefix]
        return max((lost.until - now for lost in self._lost.values() if (owner, key) in lost.keys), default=0.0)

    def begin(self, owner: str, key: str, spec: SandboxSpec) -> Entry:
        """Somebody wants a sandbox. Its key must not stand for one."""
        assert self.find(owner, key) is None
        entry = Entry(owner, key, spec.memory_mb, spec.cpus)
        self._entries.add(entry)
        if key:
            self._by_key[owner, key] = entry
        self._count(entry, 1)
        return entry

    def ask(self, entry: Entry, prefix: str) -> None:
        """A node is asked for it; it will be `confirm`, `refuse` or `doubt`."""
        if entry.prefix != prefix:
            self._count(entry, -1)
            entry.prefix = prefix
            self._count(entry, 1)
        entry.num_asked += 1

    def confirm(self, entry: Entry, sandbox_id: str, now: float) -> None:
        """The node has it."""
        entry.num_asked -= 1
        if not entry.is_gone:
            self._name(entry, sandbox_id, now)

    def refuse(self, entry: Entry, *, is_absent: bool) -> None:
        """The node does not give it; is_absent: because it has none. The entry stays until it is asked for elsewhere, or
        dropped.
        """
        entry.num_asked -= 1
        if is_absent:
            self._unname(entry)

    def doubt(self, entry: Entry, now: float) -> None:
        """Nobody will hear the node's answer. A report that is asked for when it must have heard tells what became of it."""
        entry.num_asked -= 1
        if not entry.is_gone:
            entry.doubtful = now + HEARD_SECONDS
            self._doubtful.add(entry)

    def drop(self, entry: Entry) -> None:
        """Unless somebody else has asked for it, there is no such sandbox. Harmless when repeated."""
        if not entry.sandbox_id and not entry.num_asked and entry.doubtful is None:
            self._remove(entry)

    def end(self, sandbox_id: str, owner: str) -> None:
        """An owner's sandbox is no more."""
        if (entry := self._by_id.get(sandbox_id)) is not None and entry.owner == owner:
            self._ended.setdefault(entry.prefix, set()).add(sandbox_id)
            self._unname(entry)
            self.drop(entry)

    def take_report(self, prefix: str, asked: float, sandboxes: Iterable[Leased]) -> list[str]:
        """A node has told what it has; asked: when it was asked to. Which of that it shall end."""
        told = {one.sandbox_id: one for one in sandboxes}
        ended = self._ended.pop(prefix, set())
        lost = self._lost.pop(prefix, None)
        was_missed = prefix in self._missed
        self._missed.discard(prefix)
        unwanted = [one for one in told if lost is not None and one in lost.unwanted]
        absent = [one for one in self._by_id.values() if one.prefix == prefix and one.sandbox_id not in told]
        for entry in absent:
            if entry.told < asked:
                self._unname(entry)
        heard = [one for one in self._doubtful if one.prefix == prefix and (one.doubtful or 0.0) < asked]
        for entry in heard:
            entry.doubtful = None
            self._doubtful.discard(entry)
        for sandbox_id, one in told.items():
            if sandbox_id in self._by_id or sandbox_id in ended or sandbox_id in unwanted:
                continue
            known = self.find(one.owner, one.key)
            if was_missed and known is not None and known.prefix != prefix:
                unwanted.append(sandbox_id)  # its key stands for another one meanwhile
            else:
                self._adopt(prefix, one, known, asked)
        for entry in (*absent, *heard):
            self.drop(entry)
        return unwanted

    def lose(self, prefix: str, until: float) -> None:
        """A node is gone, as far as one can see. Its sandboxes count no more, but their keys stay bound until then: so
        long may the node still have what it had.
        """
        lost = self._lost[prefix] = _Lost(until)
        self._missed.add(prefix)
        for entry in [one for one in self._entries if one.prefix == prefix]:
            if entry.key:
                lost.keys.add((entry.owner, entry.key))
            if entry.sandbox_id:
                lost.owners[entry.sandbox_id] = entry.owner
            self._remove(entry)
        self._ended.pop(prefix, None)

    def unwant(self, prefix: str, sandbox_id: str, owner: str) -> None:
        """An owner does not want its sandbox of a lost node any more: it shall end if the node comes back."""
        lost = self._lost.get(prefix)
        if lost is not None and lost.owners.get(sandbox_id) == owner:
            lost.unwanted.add(sandbox_id)

    def bury(self, prefix: str) -> None:
        """A lost node is dead for certain, and all that it had."""
        self._lost.pop(prefix, None)
        self._missed.discard(prefix)

    def _adopt(self, prefix: str, one: Leased, known: Entry | None, asked: float) -> None:
        """A sandbox came to light: of another gateway, of one before this, or of an answer that is not here yet."""
        if known is not None and known.prefix == prefix:
            if not known.sandbox_id:
                self._name(known, one.sandbox_id, asked)
            return  # or it is of an older report: a node has one for a key
        entry = Entry(one.owner, one.key, one.memory_mb, one.cpus, prefix, one.sandbox_id, asked)
        self._entries.add(entry)
        self._by_id[one.sandbox_id] = entry
        if one.key:
            self._by_key.setdefault((one.owner, one.key), entry)
        self._count(entry, 1)

    def _name(self, entry: Entry, sandbox_id: str, now: float) -> None:
        if entry.sandbox_id == sandbox_id:
            return
        self._unname(entry)
        if (known := self._by_id.get(sandbox_id)) is not None:  # a report was faster
            self._remove(known)
        entry.sandbox_id, entry.told = sandbox_id, now
        self._by_id[sandbox_id] = entry

    def _unname(self, entry: Entry) -> None:
        if entry.sandbox_id:
            del self._by_id[entry.sandbox_id]
            entry.sandbox_id = ""

    def _remove(self, entry: Entry) -> None:
        if entry.is_gone:
            return
        entry.is_gone = True
        self._entries.discard(entry)
        self._unname(entry)
        if entry.key and self._by_key.get((entry.owner, entry.key)) is entry:
            del self._by_key[entry.owner, entry.key]
        self._doubtful.discard(entry)
        self._count(entry, -1)

    def _count(self, entry: Entry, sign: int) -> None:
        for totals, name in ((self._totals, entry.owner), (self._num_at, entry.prefix)):
            one = totals.setdefault(name, Totals())
            one.num_sandboxes += sign
            one.memory_mb += sign * entry.memory_mb
            one.cpus += sign * entry.cpus
            if not one.num_sandboxes:
                del totals[name]
