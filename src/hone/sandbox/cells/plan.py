"""What a cell's first process does to itself before it becomes the agent, as data: pure, and tested without root."""

import math
import resource
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import PurePosixPath

from hone.sandbox.cells import seccomp
from hone.schema.sandboxes import SandboxSpec

NEW_MOUNTS, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USERS, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SETUID, NO_DEVICES, NO_PROGRAMS = 1, 2, 4, 8  # flags of mount(2)
RECURSIVE, PRIVATE = 0x4000, 0x40000
ATTRIBUTE_READ_ONLY, ATTRIBUTE_NO_SETUID, ATTRIBUTE_NO_DEVICES, ATTRIBUTE_NO_PROGRAMS = 1, 2, 4, 8

# A folder that every machine has and no cell needs. In the spawner's own view of the mounts it holds what all cells
# have in common, in a cell's its root is put together here.
STAGE = "/sys"
DEVICE_FOLDER, SHARED_MEMORY, NOTHING, MASK, FIRST_BIND, FIRST_LAYER = 0, 1, 2, 3, 8, 64  # slots of trees
MAX_BINDS, MAX_LAYERS = 56, 64
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
MASKED = ("kcore", "keys", "key-users", "kmsg", "sysrq-trigger", "timer_list", "sched_debug")
HOSTNAME = "sandbox"
WORK = "/work"
INODES_PER_MB = 256
NUM_NETWORKS = 16  # kept ready; an empty one costs the kernel about 100 KB
MAX_OPEN_FILES = 4096
MAX_INOTIFY = {"instances": 8, "watches": 4096}  # the kernel counts them against who runs the node, too
SPAWN = struct.Struct("=QQiIIIIII4x")
OPERATION = struct.Struct("=IIQQ")


class Code(IntEnum):
    """The operations of native/protocol.h."""

    MOUNT = 1
    MAKE_FOLDER = 2
    LINK = 3
    WRITE = 4
    TAKE_TREE = 5
    PUT_TREE = 6
    KEEP = 7
    PIVOT = 8
    HOSTNAME = 9
    NETWORKS = 10
    LIMIT = 11
    FILTER = 12
    DROP_POWERS = 13
    IDENTITY = 14
    JOIN = 15
    CORES = 16
    LANDLOCK = 17
    UNSHARE = 18
    LEAVE = 19
    UNMOUNT = 20
    BECOME_AGENT = 21
    SOCKET = 22
    KEEPER = 23
    TAKE_DESCRIPTOR = 24
    GIVE = 25
    EXECUTE = 32
    DATA = 33
    GUARD = 34


CONFINING = frozenset({Code.LIMIT, Code.CORES, Code.DROP_POWERS, Code.LANDLOCK, Code.FILTER})


@dataclass(frozen=True, slots=True)
class Operation:
    """One step; what data, a and b are, native/protocol.h says."""

    code: Code
    data: bytes = b""
    a: int = 0
    b: int = 0

    def __str__(self) -> str:
        text = self.data.split(b"\0\0")[0][:120].replace(b"\0", b" ").decode(errors="replace").strip()
        return f"{self.code.name.lower().replace('_', ' ')} {text}".strip() if self.code != Code.FILTER else "filter"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a cell comes to be: the namespaces it is cloned into, its ids, its layers and its steps.

    maps_layers: whether what root owns in them shall belong to the cell's root.
    """

    namespaces: int
    uid_map: bytes
    gid_map: bytes
    layers: tuple[str, ...]
    maps_layers: bool
    operations: tuple[Operation, ...]
    steps: bytes  # the operations, encoded

    def encode(self, identity: int, cgroup: int = -1) -> bytes:
        """The order to the spawner. cgroup: which of the descriptors sent with it is the cgroup to be born in."""
        layers = b"".join(_text(layer) for layer in self.layers)
        sizes = (len(self.uid_map), len(self.gid_map), len(self.layers), len(layers))
        head = SPAWN.pack(identity, self.namespaces, cgroup, *sizes, self.maps_layers, len(self.operations))
        return head + self.uid_map + self.gid_map + layers + self.steps


@dataclass(frozen=True, slots=True)
class Bind:
    """A folder, or a file, of the host that a cell sees at `target`, read-only unless it says otherwise."""

    source: str
    target: str
    is_writable: bool = False
    is_file: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """A root file system. Every cell has its own writable layer above it.

    layers: folders of the host laid over one another, the first on top; without any, the root starts empty. A name
    without a slash at its beginning is a layer that the spawner keeps.
    binds: what else is seen. links: path and target of symbolic links. files: path and content.
    env: variables of every program. working_folder: where programs start; made if it is missing.
    """

    layers: tuple[str, ...] = ()
    binds: tuple[Bind, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, bytes], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    working_folder: str = WORK


@dataclass(frozen=True, slots=True)
class Grants:
    """What of the machine one cell gets.

    uid, gid: what its root is outside; num_ids: how many ids it has from there on.
    cores: those it may run on. join: the descriptors, by position, of cgroup v1 `tasks` files to enter.
    has_memory_limit, has_process_limit: whether a cgroup keeps them. allow_clone3: the agent needs it for cgroups.
    own_network: a network namespace with a loopback of its own; otherwise it shares its spawner's.
    has_sockets: whether programs may make other sockets than local ones.
    limits_inotify: whether this kernel can limit what watches files.
    """

    uid: int
    gid: int
    num_ids: int
    cores: frozenset[int]
    join: tuple[int, ...] = ()
    has_memory_limit: bool = False
    has_process_limit: bool = False
    allow_clone3: bool = False
    own_network: bool = True
    has_sockets: bool = True
    scopes_abstract_sockets: bool = False
    masked: tuple[str, ...] = MASKED
    limits_inotify: bool = True


def plan_cell(spec: SandboxSpec, image: Image, grants: Grants, binds: Sequence[Bind] = ()) -> Plan:
    """The steps from a fresh clone to the agent of a cell. `ValueError` for more binds or layers than there may be."""
    if len(image.layers) > MAX_LAYERS or len(image.binds) + len(binds) > MAX_BINDS:
        raise ValueError(f"an image of more than {MAX_LAYERS} layers or {MAX_BINDS} binds; make fewer of them")
    namespaces = NEW_USERS | NEW_MOUNTS | NEW_PIDS | NEW_IPC | NEW_UTS | (NEW_NETWORK if grants.own_network else 0)
    operations = (
        *(Operation(Code.JOIN, a=index) for index in grants.join),
        *_root(spec, image, (*image.binds, *binds), grants),
        Operation(Code.HOSTNAME, HOSTNAME.encode()),
        *_confine(spec, grants),
        Operation(Code.BECOME_AGENT),
    )
    uid_map, gid_map = id_maps(grants)
    return Plan(
        namespaces=namespaces,
        uid_map=uid_map,
        gid_map=gid_map,
        layers=image.layers,
        maps_layers=grants.num_ids > 1,
        steps=encode_operations(operations),
        operations=operations,
    )


def id_maps(grants: Grants) -> tuple[bytes, bytes]:
    """The user and group ids inside and outside, as the kernel wants them."""
    return f"0 {grants.uid} {grants.num_ids}\n".encode(), f"0 {grants.gid} {grants.num_ids}\n".encode()


def plan_spawner(*, is_unprivileged: bool, uid: int, gid: int, own_network: bool) -> tuple[Operation, ...]:
    """What the spawner does to itself first: a view of mounts that nothing of the host's changes any more.

    own_network: an empty network, which all its cells without one of their own share, and a few for those that get one.
    """
    namespaces = NEW_MOUNTS | (NEW_NETWORK if own_network else 0) | (NEW_USERS if is_unprivileged else 0)
    identity = (
        Operation(Code.WRITE, b"/proc/self/setgroups\0deny"),
        Operation(Code.WRITE, b"/proc/self/uid_map\0" + f"{uid} {uid} 1\n".encode()),
        Operation(Code.WRITE, b"/proc/self/gid_map\0" + f"{gid} {gid} 1\n".encode()),
    )
    return (
        Operation(Code.UNSHARE, a=namespaces),
        *(identity if is_unprivileged else ()),
        mount("", "/", "", RECURSIVE | PRIVATE),
        # Every cell copies the mounts there are. An unprivileged user may not take away what others mounted.
        *(() if is_unprivileged else (Operation(Code.UNMOUNT, _text(STAGE)),)),
        mount("tmpfs", STAGE, "tmpfs", NO_SETUID, "size=1m,nr_inodes=64,mode=755"),
        _folder(f"{STAGE}/nothing", 0o555),
        *_devices(f"{STAGE}/devices"),
        *((Operation(Code.NETWORKS, a=NUM_NETWORKS),) if own_network else ()),
    )


def _devices(folder: str) -> Iterator[Operation]:
    """The /dev of all cells, with places for what is their own."""
    yield _folder(folder)
    for name in DEVICES:
        yield Operation(Code.WRITE, _text(f"{folder}/{name}"), a=0o666)
        yield Operation(Code.TAKE_TREE, _text(f"/dev/{name}"), a=MASK)
        yield Operation(Code.PUT_TREE, _text(f"{folder}/{name}"), a=MASK, b=ATTRIBUTE_NO_SETUID | ATTRIBUTE_NO_PROGRAMS)
    for name, target in DEVICE_LINKS.items():
        yield Operation(Code.LINK, _text(target) + _text(f"{folder}/{name}"))
    yield _folder(f"{folder}/shm")
    yield _folder(f"{folder}/pts")


def encode_operations(operations: Sequence[Operation]) -> bytes:
    """The wire format: header, data, padding to 8 bytes, one after the other."""
    return b"".join(
        OPERATION.pack(operation.code, len(operation.data), operation.a, operation.b)
        + operation.data
        + bytes(-len(operation.data) % 8)
        for operation in operations
    )


def _root(spec: SandboxSpec, image: Image, binds: Sequence[Bind], grants: Grants) -> Iterator[Operation]:
    """A root of its own, put together in place of a folder of the host, and then made the only thing there is.

    Sources are taken with the host's ids and put in place with the cell's: the host's may be all that can reach a
    source, the cell's are all that can own anything in its file systems. What is put in place after the pivot cannot
    be led outside by symbolic links in the image; /proc, whose links lead anywhere, comes last.
    """
    yield Operation(Code.TAKE_TREE, _text(f"{STAGE}/devices"), a=DEVICE_FOLDER, b=1)
    yield Operation(Code.TAKE_TREE, _text(f"{STAGE}/nothing"), a=NOTHING)
    for slot, bind in enumerate(binds, start=FIRST_BIND):
        yield Operation(Code.TAKE_TREE, _text(bind.source), a=slot, b=1)
    yield Operation(Code.IDENTITY)
    size = f"size={spec.disk_mb}m,nr_inodes={max(4096, spec.disk_mb * INODES_PER_MB)},mode=755"
    yield mount("tmpfs", STAGE, "tmpfs", NO_SETUID | NO_DEVICES, size)
    if image.layers:
        yield from _layers(len(image.layers))
    else:
        yield _folder(f"{STAGE}/shm", 0o1777)
        yield Operation(Code.TAKE_TREE, _text(f"{STAGE}/shm"), a=SHARED_MEMORY)
        yield Operation(Code.KEEP, _text(STAGE))
        yield Operation(Code.PIVOT, _text(STAGE))
    tree = _Tree()
    yield from tree.folder("/dev", is_mounted_on=True)
    yield Operation(Code.PUT_TREE, _text("/dev"), a=DEVICE_FOLDER, b=ATTRIBUTE_READ_ONLY)
    yield Operation(Code.PUT_TREE, _text("/dev/shm"), a=SHARED_MEMORY, b=ATTRIBUTE_NO_SETUID | ATTRIBUTE_NO_DEVICES)
    yield mount("devpts", "/dev/pts", "devpts", NO_SETUID | NO_PROGRAMS, "newinstance,ptmxmode=0666,mode=620")
    yield from tree.folder("/tmp", 0o1777)
    for path, content in image.files:
        yield from tree.file(path, content)
    for slot, bind in enumerate(binds, start=FIRST_BIND):
        yield from tree.bind(slot, bind)
    for path, target in image.links:
        yield from tree.link(path, target)
    yield from tree.folder(image.working_folder)
    yield from tree.folder("/proc", is_mounted_on=True)
    yield mount("proc", "/proc", "proc", NO_SETUID | NO_DEVICES | NO_PROGRAMS)
    yield Operation(Code.WRITE, _text("/proc/sys/user/max_user_namespaces") + b"0")
    if grants.limits_inotify:
        for what, number in MAX_INOTIFY.items():
            yield Operation(Code.WRITE, _text(f"/proc/sys/user/max_inotify_{what}") + str(number).encode())
    # Its owner inside could make the agent the kernel's first choice when memory runs out.
    yield Operation(Code.PUT_TREE, _text("/proc/1"), a=NOTHING, b=ATTRIBUTE_READ_ONLY)
    for name in grants.masked:
        yield Operation(Code.TAKE_TREE, _text("/dev/null"), a=MASK)
        yield Operation(Code.PUT_TREE, _text(f"/proc/{name}"), a=MASK, b=ATTRIBUTE_READ_ONLY)
    yield Operation(Code.LEAVE)


def _layers(num_layers: int) -> Iterator[Operation]:
    """The layers, which are there as trees, below one of its own."""
    for name in ("layer", "scratch", "root"):
        yield _folder(f"{STAGE}/{name}")
    yield _folder(f"{STAGE}/shm", 0o1777)
    for number in range(num_layers):
        yield _folder(f"{STAGE}/{number}")
        yield Operation(Code.PUT_TREE, _text(f"{STAGE}/{number}"), a=FIRST_LAYER + number)
    lower = ":".join(f"{STAGE}/{number}" for number in range(num_layers))
    options = f"lowerdir={lower},upperdir={STAGE}/layer,workdir={STAGE}/scratch,userxattr"
    yield mount("overlay", f"{STAGE}/root", "overlay", NO_SETUID | NO_DEVICES, options)
    yield Operation(Code.KEEP, _text(f"{STAGE}/layer"))
    yield Operation(Code.TAKE_TREE, _text(f"{STAGE}/shm"), a=SHARED_MEMORY)
    yield Operation(Code.PIVOT, _text(f"{STAGE}/root"))


def _confine(spec: SandboxSpec, grants: Grants) -> Iterator[Operation]:
    """What holds for the agent and everything it starts."""
    for kind, value in resource_limits(spec, grants).items():
        yield Operation(Code.LIMIT, a=kind, b=value)
    yield affinity(grants.cores)
    yield Operation(Code.DROP_POWERS)
    if grants.scopes_abstract_sockets:
        yield Operation(Code.LANDLOCK, struct.pack("=QQQ", 0, 0, 1), a=24)
    yield Operation(Code.FILTER, seccomp.instructions(has_network=grants.has_sockets, allow_clone3=grants.allow_clone3))


def resource_limits(spec: SandboxSpec, grants: Grants) -> dict[int, int]:
    """Of each process, by RLIMIT_...; those of memory and processes stand in for cgroups."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_MEMLOCK: 64 << 10,
        resource.RLIMIT_MSGQUEUE: 64 << 10,
    }
    if not grants.has_memory_limit:
        limits[resource.RLIMIT_AS] = spec.memory_mb << 20
    if not grants.has_process_limit:
        limits[resource.RLIMIT_NPROC] = spec.max_processes
    return limits


def affinity(cores: frozenset[int]) -> Operation:
    """The step that keeps a process to some cores."""
    mask = sum(1 << core for core in cores)
    return Operation(Code.CORES, mask.to_bytes(math.ceil((mask.bit_length() + 1) / 64) * 8, "little"))


class _Tree:
    """The root while it is put together: which folders there are for certain."""

    def __init__(self) -> None:
        self._made = {"/"}

    def folder(self, path: str, mode: int = 0o755, *, is_mounted_on: bool = False) -> Iterator[Operation]:
        """It and those above it; one that the image has will do, and a link to one where nothing is mounted on it.

        What else is there is removed: it may be what the programs of an earlier cell have left in a layer.
        """
        for part in [*reversed(PurePosixPath(path).parents), PurePosixPath(path)]:
            if str(part) not in self._made:
                self._made.add(str(part))
                is_last = str(part) == path
                will_do = 3 if is_last and is_mounted_on else 2
                yield Operation(Code.MAKE_FOLDER, _text(str(part)), a=mode if is_last else 0o755, b=will_do)

    def link(self, path: str, target: str) -> Iterator[Operation]:
        yield from self.folder(str(PurePosixPath(path).parent))
        yield Operation(Code.LINK, _text(target) + _text(path))

    def file(self, path: str, content: bytes) -> Iterator[Operation]:
        yield from self.folder(str(PurePosixPath(path).parent))
        yield Operation(Code.WRITE, _text(path) + content, a=0o644)

    def bind(self, slot: int, bind: Bind) -> Iterator[Operation]:
        yield from self.file(bind.target, b"") if bind.is_file else self.folder(bind.target, is_mounted_on=True)
        attributes = ATTRIBUTE_NO_SETUID | ATTRIBUTE_NO_DEVICES | (0 if bind.is_writable else ATTRIBUTE_READ_ONLY)
        yield Operation(Code.PUT_TREE, _text(bind.target), a=slot, b=attributes)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> Operation:
    """The step that mounts a file system."""
    return Operation(Code.MOUNT, _text(source) + _text(target) + _text(kind) + _text(options), a=flags)


def _folder(path: str, mode: int = 0o755) -> Operation:
    return Operation(Code.MAKE_FOLDER, _text(path), a=mode)


def _text(text: str) -> bytes:
    encoded = text.encode()
    if b"\0" in encoded:
        raise ValueError(f"{text!r} has a zero byte")
    return encoded + b"\0"
