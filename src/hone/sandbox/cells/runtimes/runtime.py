"""What a runtime has to say: what it lacks on a machine, what it cannot do, and how a sandbox of it comes to be."""

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from hone.sandbox.cells.host import Host
from hone.sandbox.cells.plan import Bind, Grants, Image, Operation, Plan, encode_operations
from hone.sandbox.errors import Unsupported
from hone.schema.sandboxes import SandboxSpec

JOINS, APART = 2, 4  # FLAG_... of native/protocol.h
AGENT = "/.agent"
"""Where other runtimes' sandboxes have the agent's program."""


class Feature(StrEnum):
    """What not every runtime can do."""

    IMAGES = "images other than this machine's own"
    LOOPBACK = 'network="none", a loopback of its own'
    HOST_NETWORK = 'network="host"'
    TERMINAL = "terminals"
    PROCESSES = "max_processes, and an agent that programs cannot end"
    PORTS = "an allow-list of hosts, and published ports"
    DISK_SUM = "disk_mb as the limit of all its files together"
    MOVED_BINDS = "folders of the host at other paths"
    ZYGOTE = "a warm Python that is ready at once; others start their own python3 for it"
    LAYER_SNAPSHOT = "snapshots of the whole root file system"


@dataclass(frozen=True, slots=True)
class Birth:
    """A sandbox that is to be started. agent: where the agent's program lies. folder: a path that it may make for itself.
    said: which of the descriptors sent with the plan takes what the runtime's program has to say.

    is_weak_allowed: the operator takes what this machine cannot keep.
    """

    name: str
    spec: SandboxSpec
    image: Image
    binds: tuple[Bind, ...]
    grants: Grants
    agent: Path
    folder: Path
    said: int
    is_weak_allowed: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """How it is started, and what it is like then.

    image: with the working folder and the variables that its programs have. folder: of the host, removed in the end.
    files: where the files are that are read and written from outside, if its root is not its own; they have
    `files_folder` as their working folder. program_flags: how the agent starts programs.
    late_limits: those that hold from when the agent has been heard of, by RLIMIT_... listener: where the agent connects, if it
    does not inherit its control socket; it has no descriptor of its root then. inner_files: as `files`, as the process
    sees it that the plan begins in. has_program_cgroups: whether programs can be in cgroups of their own.
    """

    plan: Plan
    image: Image
    folder: Path | None = None
    files: Path | None = None
    files_folder: str | None = None
    program_flags: int = JOINS
    late_limits: Mapping[int, int] = field(default_factory=dict)
    listener: socket.socket | None = None
    inner_files: str | None = None
    has_program_cgroups: bool = True


class Runtime(Protocol):
    """An isolation that is not a cell's. Everything in it is started by the same agent."""

    name: str
    features: frozenset[Feature]

    def missing(self, host: Host) -> str:
        """What this machine lacks for it, in a clause; empty where it works."""

    def prelude(self, host: Host) -> tuple[Operation, ...]:
        """What the spawner of its sandboxes does to itself first."""

    def launch(self, birth: Birth, host: Host) -> Launch:
        """How a sandbox is started; raises `Unsupported` for what it asks for and this runtime cannot give."""


def require(runtime: str, features: Iterable[Feature], spec: SandboxSpec, image: Image) -> None:
    """Raises `Unsupported` that names what a sandbox asks for and its runtime cannot give."""
    offered = set(features)
    if spec.network == "none" and Feature.LOOPBACK not in offered:
        raise Unsupported(f'runtime {runtime!r} has no network of its own: say network="off", without any sockets')
    if spec.network == "host" and Feature.HOST_NETWORK not in offered:
        raise Unsupported(f'runtime {runtime!r} does not lead to the host\'s network; say runtime="cell"')
    if image.layers and Feature.IMAGES not in offered:
        raise Unsupported(f"runtime {runtime!r} has this machine's own image only ('python'), not {spec.image!r}")


def launch_plan(
    operations: Sequence[Operation],
    *,
    namespaces: int = 0,
    maps: tuple[bytes, bytes] = (b"", b""),
    layers: Sequence[str] = (),
    maps_layers: bool = False,
) -> Plan:
    """A plan of these steps, by default in the namespaces of the spawner."""
    return Plan(
        namespaces=namespaces,
        uid_map=maps[0],
        gid_map=maps[1],
        layers=tuple(layers),
        maps_layers=maps_layers,
        operations=tuple(operations),
        steps=encode_operations(operations),
    )


def texts(words: Iterable[str]) -> bytes:
    """Words as a plan has them."""
    encoded = [word.encode() for word in words]
    if any(b"\0" in word for word in encoded):
        raise ValueError("an argument of a runtime has a zero byte")
    return b"".join(word + b"\0" for word in encoded)


def with_variables(image: Image, variables: Mapping[str, str]) -> dict[str, str]:
    """An image's variables, and these."""
    return {**image.env, **variables}
