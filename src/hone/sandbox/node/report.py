"""What a node tells its gateway: its sandboxes and how much room the machine has."""

import os
from collections.abc import Iterable
from pathlib import Path

from hone.sandbox.node.lifecycle import Lifecycle, Stage
from hone.schema.sandbox_nodes import Leased, NodeReport

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def report_of(lifecycle: Lifecycle, images: Iterable[str]) -> NodeReport:
    """The node at this moment."""
    total, free = machine_memory_mb()
    return NodeReport(
        max_sandboxes=lifecycle.limits.max_sandboxes,
        num_queued=lifecycle.num_in(Stage.QUEUED),
        memory_mb=total,
        free_memory_mb=free,
        cores=len(os.sched_getaffinity(0)),
        is_draining=lifecycle.is_draining,
        images=tuple(images),
        sandboxes=tuple(
            Leased(lease.sandbox_id, lease.owner, lease.key, lease.spec.memory_mb, lease.spec.cpus)
            for lease in lifecycle.leases.values()
        ),
    )


def machine_memory_mb() -> tuple[int, int]:
    """Memory in all, and what is free of it; where a cgroup gives this part of the machine less, in all that."""
    sizes = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, size = line.partition(":")
        sizes[name] = size
    total, free = (int(sizes[name].split()[0]) >> 10 for name in ("MemTotal", "MemAvailable"))
    for path in LIMITS:
        if path.exists() and (limit := path.read_text().strip()).isdecimal():
            total = min(total, int(limit) >> 20)
    return total, min(total, free)
