"""The runtime `process`: programs of this machine behind Landlock, a system call filter and limits; no namespaces."""

import os
import resource
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hone.sandbox.cells import seccomp
from hone.sandbox.cells.host import ETC, LANDLOCK_ABSTRACT_SOCKETS, Host
from hone.sandbox.cells.plan import DEVICES, Code, Operation, affinity, resource_limits
from hone.sandbox.cells.runtimes.runtime import (
    APART,
    JOINS,
    Birth,
    Feature,
    Launch,
    launch_plan,
    require,
    with_variables,
)
from hone.sandbox.errors import Unsupported

EXECUTE, WRITE_FILE, READ_FILE, READ_FOLDER = 1, 2, 4, 8  # LANDLOCK_ACCESS_FS_...
MAKE_CHARACTER_DEVICE, MAKE_BLOCK_DEVICE = 1 << 6, 1 << 11
IOCTL_DEVICE = 1 << 15
NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by ABI; 16 from 5 on
BIND_TCP, CONNECT_TCP = 1, 2
SCOPE_ABSTRACT_SOCKETS, SCOPE_SIGNALS = 1, 2
NETWORK_ABI = 4
FILES = (*(f"/etc/{name}" for name in ETC), "/etc/passwd", "/etc/group", "/etc/hosts", "/etc/mtab")
WORK, TEMPORARY = "work", "tmp"


class ProcessRuntime:
    """A guardian, and below it the agent and its programs, which see this machine's processes and no file but a few."""

    name = "process"
    features = frozenset({Feature.TERMINAL, Feature.PROCESSES, Feature.HOST_NETWORK})

    def missing(self, host: Host) -> str:
        """What this machine lacks for it, in a clause; empty where it works."""
        if not host.has_seccomp:
            return "a kernel that filters system calls"
        if host.landlock < 1:
            return "Landlock, without which programs would reach all files of their user"
        if host.landlock < LANDLOCK_ABSTRACT_SOCKETS and not host.has_id_ranges:
            return f"Landlock ABI {LANDLOCK_ABSTRACT_SOCKETS}, without which programs could signal their user's other processes"
        return ""

    def prelude(self, host: Host) -> tuple[Operation, ...]:
        """Nothing: its sandboxes see what the node sees."""
        return ()

    def launch(self, birth: Birth, host: Host) -> Launch:
        """How a sandbox is started; raises `Unsupported` for what it asks for and this runtime cannot give."""
        require(self.name, self.features, birth.spec, birth.image)
        if moved := [bind for bind in birth.binds if bind.source != bind.target]:
            raise Unsupported(
                f"runtime 'process' shows folders where they are: {moved[0].source} is not {moved[0].target}"
            )
        owner = birth.grants.uid if host.has_id_ranges else -1
        for folder in (birth.folder, birth.folder / WORK, birth.folder / TEMPORARY):
            folder.mkdir(mode=0o700)
            os.chown(folder, owner, owner)
        variables = {"HOME": str(birth.folder / WORK), "TMPDIR": str(birth.folder / TEMPORARY)}
        return Launch(
            plan=launch_plan([*_steps(birth, host)]),
            image=replace(
                birth.image,
                working_folder=str(birth.folder / WORK),
                env=with_variables(birth.image, variables),
            ),
            folder=birth.folder,
            files=birth.folder,
            files_folder=f"/{WORK}",
            program_flags=JOINS | (APART if host.landlock >= LANDLOCK_ABSTRACT_SOCKETS else 0),
        )


def _steps(birth: Birth, host: Host) -> Iterator[Operation]:
    grants = birth.grants
    yield from (Operation(Code.JOIN, a=index) for index in grants.join)
    yield Operation(Code.GUARD)
    limits = resource_limits(birth.spec, grants)
    limits[resource.RLIMIT_FSIZE] = birth.spec.disk_mb << 20
    if not grants.has_process_limit and not host.has_id_ranges:
        limits[resource.RLIMIT_NPROC] += _num_processes(host.uid)
    for kind, value in limits.items():
        yield Operation(Code.LIMIT, a=kind, b=value)
    yield affinity(grants.cores)
    yield landlock(birth, host.landlock)
    if host.has_id_ranges:
        yield Operation(Code.IDENTITY, a=grants.uid, b=grants.gid)
    yield Operation(Code.DROP_POWERS)
    yield Operation(
        Code.FILTER,
        seccomp.instructions(
            has_network=birth.spec.network == "host",
            has_namespaces=False,
            has_own_user=host.has_id_ranges or birth.is_weak_allowed,
        ),
    )
    yield Operation(Code.BECOME_AGENT)


def landlock(birth: Birth, abi: int) -> Operation:
    """The step after which only these files are left: programs to read, the sandbox's own folder to write."""
    everything = (1 << NUM_RIGHTS.get(abi, 16)) - 1
    own = everything & ~(MAKE_CHARACTER_DEVICE | MAKE_BLOCK_DEVICE)
    rules = [(str(birth.folder), own)]
    for bind in (*birth.image.binds, *birth.binds):
        if bind.source == bind.target:
            rules.append((bind.source, own if bind.is_writable else EXECUTE | READ_FILE | READ_FOLDER))
    rules += [(path, EXECUTE | READ_FILE | READ_FOLDER) for path in FILES]
    rules += [(f"/dev/{name}", WRITE_FILE | READ_FILE | (IOCTL_DEVICE & everything)) for name in DEVICES]
    network = BIND_TCP | CONNECT_TCP if abi >= NETWORK_ABI and birth.spec.network != "host" else 0
    scopes = SCOPE_ABSTRACT_SOCKETS | SCOPE_SIGNALS if abi >= LANDLOCK_ABSTRACT_SOCKETS else 0
    size = 24 if abi >= LANDLOCK_ABSTRACT_SOCKETS else 16 if abi >= NETWORK_ABI else 8
    encoded = [struct.pack("=QQQ", everything, network, scopes)]
    for path, rights in rules:
        if not Path(path).exists():
            continue
        if not Path(path).is_dir():
            rights &= ~READ_FOLDER if path.startswith("/dev/") else EXECUTE | READ_FILE | WRITE_FILE
        name = path.encode() + b"\0"
        name += bytes(-len(name) % 8)
        encoded.append(struct.pack("=QQ", rights, len(name)) + name)
    return Operation(Code.LANDLOCK, b"".join(encoded), a=size)


def _num_processes(uid: int) -> int:
    """Threads that this user has already: without a user namespace the kernel counts them against the limit."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == uid:
                count += sum(1 for _ in (folder / "task").iterdir())
        except OSError:
            continue  # it has ended
    return count
