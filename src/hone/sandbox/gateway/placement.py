"""Which node takes a new sandbox: the ones that fit, in the order in which to ask them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from hone.schema.sandboxes import SandboxSpec

NUM_CANDIDATES = 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node as its last report has it. prefix: of its sandboxes' ids. num_sandboxes, memory_mb, cpus: what is promised
    there already, with what was sent there since the report; the others: what there is.
    """

    prefix: str
    is_draining: bool
    images: frozenset[str]
    num_sandboxes: int
    max_sandboxes: int
    promised_memory_mb: int
    memory_mb: int
    free_memory_mb: int
    promised_cpus: float
    cores: int

    def load(self) -> float:
        """How much of what is shortest there is promised. Memory and cores may be promised more than once over."""
        return max(
            self.num_sandboxes / self.max_sandboxes,
            0.25 * self.promised_memory_mb / self.memory_mb,
            0.05 * self.promised_cpus / self.cores,
        )

    def has_room(self, spec: SandboxSpec) -> bool:
        """Whether it would not have to wait there."""
        return self.num_sandboxes < self.max_sandboxes and self.free_memory_mb >= min(spec.memory_mb, 256)


def order(candidates: Sequence[Candidate], spec: SandboxSpec, key: str) -> list[str]:
    """The prefixes of the nodes that may take it, the best first; empty if none may.

    A node that has the image and room comes before one that has not. Among equals, the key chooses two by its hash, and
    the less loaded of these is first: so several gateways that know the same mostly agree, and no node is flooded.
    """
    fitting = [one for one in candidates if not one.is_draining and one.memory_mb >= spec.memory_mb]
    if not fitting:
        return []

    def tier(one: Candidate) -> tuple[bool, bool]:
        return not one.has_room(spec), spec.image not in one.images

    best = min(tier(one) for one in fitting)
    chosen = sorted((one for one in fitting if tier(one) == best), key=lambda one: _hash(one.prefix, key))
    first = min(chosen[:NUM_CANDIDATES], key=Candidate.load)
    others = sorted((one for one in fitting if one is not first), key=lambda one: (tier(one), one.load()))
    return [first.prefix, *(one.prefix for one in others)]


def _hash(prefix: str, key: str) -> bytes:
    """Rendezvous: each key has an order of its own of all nodes, which a node that comes or goes does not disturb."""
    return hashlib.blake2b(f"{prefix}\0{key}".encode(), digest_size=8).digest()
