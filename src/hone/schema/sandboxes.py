"""A sandbox as others ask for it, and what became of a program in one."""

import math
from enum import StrEnum
from typing import Literal, get_args

import msgspec

from hone.schema.sandbox_network import parse_rules

RuntimeName = Literal["process", "bwrap", "oci", "cell", "gvisor"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
"""How sandboxes may be isolated, the weakest first."""
DEFAULT_RUNTIMES: tuple[RuntimeName, ...] = ("cell",)
"""What a node offers unless it is told otherwise."""
MAX_ROLLOUT = 256


class SandboxSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a sandbox shall be.

    image: its root file system; "python" is the runtime's default with a Python in it. memory_mb: for its programs.
    cpus: cores. disk_mb: what it may write. max_processes: alive at once. network: none; "off", without a loopback even;
    the host's; or with "allow" the hosts that `allow` lists, through a proxy: "pypi.org", "*.example.org:8443" (see
    `hone.schema.sandbox_network.AllowRule`).
    ttl_seconds: the lease; when it is over, the sandbox is gone, as it is when nothing is asked of it for idle_seconds.
    env: variables of every program in it. rollout: what it is for, as spans and accounts of its node tell. runtime: how it
    is isolated; never another one than asked for.
    """

    image: str = "python"
    memory_mb: int = 512
    cpus: float = 1.0
    disk_mb: int = 256
    max_processes: int = 256
    network: Literal["none", "off", "host", "allow"] = "none"
    ttl_seconds: float = 600.0
    idle_seconds: float | None = None
    env: dict[str, str] = {}
    rollout: str = ""
    allow: tuple[str, ...] = ()
    runtime: RuntimeName = "cell"

    def __post_init__(self) -> None:
        for name in ("memory_mb", "cpus", "disk_mb", "max_processes", "ttl_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} of a sandbox is not positive and finite")
        if self.idle_seconds is not None and not 0 < self.idle_seconds < math.inf:
            raise ValueError(
                f"idle_seconds {self.idle_seconds} of a sandbox is not positive and finite; None is without"
            )
        if len(self.rollout) > MAX_ROLLOUT:
            raise ValueError(
                f"the rollout of a sandbox is named by {len(self.rollout)} characters; {MAX_ROLLOUT} may be"
            )
        if bool(self.allow) != (self.network == "allow"):
            advice = "name hosts, or take network='none'" if not self.allow else "take network='allow' with it"
            raise ValueError(
                f"allow {list(self.allow)} and network {self.network!r} of a sandbox do not agree; {advice}"
            )
        parse_rules(self.allow)


class Outcome(StrEnum):
    """How a program in a sandbox ended, or why it has no end that anybody knows (`is_infra`)."""

    EXITED = "exited"
    """By itself, with an exit code."""
    SIGNALLED = "signalled"
    """By a signal that the sandbox did not send."""
    TIMEOUT = "timeout"
    """Killed: it ran longer than it was given."""
    OUT_OF_MEMORY = "out_of_memory"
    """It failed at its limit of memory."""
    PIDS_LIMIT = "pids_limit"
    """It failed at its limit of processes and threads."""
    DISK_FULL = "disk_full"
    """It failed with its disk full."""
    OUTPUT_LIMIT = "output_limit"
    """Killed: it wrote more than anybody will read."""
    AGENT_LOST = "agent_lost"
    """The sandbox ended beneath it."""
    NODE_LOST = "node_lost"
    """The machine of the sandbox is gone."""
    POLICY_DENIED = "policy_denied"
    """What was asked for is not allowed, or cannot be kept safe, where it was asked for."""

    @property
    def is_infra(self) -> bool:
        """Whether it is trouble of the infrastructure: a failure, never a result of the program."""
        return self in (Outcome.AGENT_LOST, Outcome.NODE_LOST, Outcome.POLICY_DENIED)


class Usage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a program used: it and all of its children that had ended when it did; memory is that of the largest."""

    wall_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


class ExecResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a program did. exit_code: minus the signal's number if one ended it, 127 if there is no such program.

    stdout, stderr: what is not UTF-8 is replaced; of long output the head and the tail, with a line between them that
    says how much is missing.
    """

    outcome: Outcome
    exit_code: int
    stdout: str
    stderr: str
    usage: Usage

    @property
    def is_success(self) -> bool:
        """Whether the program ended by itself with exit code 0."""
        return self.outcome is Outcome.EXITED and self.exit_code == 0


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is at a path in a sandbox. kind: file, folder, link, fifo, socket or device. mode: the permission bits."""

    name: str
    kind: str
    size_bytes: int
    mode: int
    modified_seconds: float


class Transfer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a tree that was copied had. left_out: paths of what is neither file, folder nor link, or is a link that leads
    out of the tree; the first hundred.
    """

    num_files: int
    num_bytes: int
    left_out: tuple[str, ...]


class SnapshotStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A snapshot as its node holds it. image: of the sandbox that it was taken of. size_bytes: what it holds of memory."""

    snapshot_id: str
    image: str
    size_bytes: int
    seconds_left: float


class PythonResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a snippet of a Python session did.

    text: what it and its children printed, the value of its last line if that is an expression, and its traceback.
    is_success: it raised nothing. is_late: it was interrupted at its timeout. is_over: its process is gone, and with it
    all variables; the next snippet begins a new session.
    """

    text: str
    is_success: bool
    is_late: bool = False
    is_over: bool = False


class SandboxUsage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a sandbox has used so far, or used in all when it is over.

    cpu_seconds: of all of its processes, or where no cgroup of version 2 counts, of its programs that have ended.
    memory_bytes: now, its files included. peak_memory_bytes: the most of that, or what its largest program used where no
    cgroup counts. num_processes: alive now, threads included. disk_bytes: written and not removed. output_bytes: read from
    its programs' streams. num_calls: that clients made. None where nobody counts.
    """

    cpu_seconds: float = 0.0
    memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    num_processes: int | None = None
    disk_bytes: int = 0
    output_bytes: int = 0
    num_calls: int = 0


class SandboxStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sandbox as its node sees it. stage: queued, starting or ready."""

    sandbox_id: str
    owner: str
    stage: str
    image: str
    age_seconds: float
    seconds_left: float
    usage: SandboxUsage
