"""What a node tells its gateway about itself, so that the gateway can place and account."""

import msgspec


class Leased(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A sandbox that a node has, queued ones included: whose it is and what it was promised. key: of its creation."""

    sandbox_id: str
    owner: str
    key: str
    memory_mb: int
    cpus: float


class NodeReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node at one moment. num_queued: of its sandboxes, those that no cell is made for yet. images: that it has used.

    memory_mb, free_memory_mb: of the machine, or of what this part of it may use.
    """

    max_sandboxes: int
    num_queued: int
    memory_mb: int
    free_memory_mb: int
    cores: int
    is_draining: bool
    images: tuple[str, ...]
    sandboxes: tuple[Leased, ...]
