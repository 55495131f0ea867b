"""The runtime `bwrap`: bubblewrap makes the namespaces and the root, and starts the agent as process 1 behind our filter."""

import itertools
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hone.sandbox.cells import seccomp
from hone.sandbox.cells.host import Host
from hone.sandbox.cells.plan import (
    ATTRIBUTE_NO_SETUID,
    ATTRIBUTE_READ_ONLY,
    FIRST_BIND,
    HOSTNAME,
    NEW_MOUNTS,
    NO_SETUID,
    STAGE,
    Bind,
    Code,
    Image,
    Operation,
    affinity,
    mount,
    plan_spawner,
    resource_limits,
)
from hone.sandbox.cells.runtimes.runtime import AGENT, Birth, Feature, Launch, launch_plan, require, texts
from hone.schema.sandboxes import SandboxSpec

FIRST_DATA = 200
"""The first of the descriptors by which bubblewrap reads what is not a path."""
NAMESPACES = ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
ROOT_INSIDE = ("--uid", "0", "--gid", "0", "--disable-userns", "--cap-drop", "ALL")


class BwrapRuntime:
    """Bubblewrap as the only one that makes namespaces: for machines that let it and nobody else."""

    name = "bwrap"
    features = frozenset(
        {Feature.TERMINAL, Feature.PROCESSES, Feature.LOOPBACK, Feature.HOST_NETWORK, Feature.MOVED_BINDS}
    )

    def missing(self, host: Host) -> str:
        """What this machine lacks for it, in a clause; empty where it works."""
        if "bwrap" not in host.programs:
            return "the program bwrap (package bubblewrap)"
        if not host.has_seccomp:
            return "a kernel that filters system calls"
        return ""

    def prelude(self, host: Host) -> tuple[Operation, ...]:
        """As root, a view of mounts of its own; nothing for users whom only bubblewrap makes a namespace for."""
        if not host.has_id_ranges:
            return ()
        return plan_spawner(is_unprivileged=False, uid=host.uid, gid=host.gid, own_network=False)

    def launch(self, birth: Birth, host: Host) -> Launch:
        """How a sandbox is started; raises `Unsupported` for what it asks for and this runtime cannot give."""
        require(self.name, self.features, birth.spec, birth.image)
        binds = (*birth.image.binds, *birth.binds, Bind(str(birth.agent), AGENT, is_file=True))
        grants, data = birth.grants, _Data()
        command = arguments(
            birth.spec, birth.image, binds if not host.has_id_ranges else _staged(binds), grants.masked, data
        )
        limits = resource_limits(birth.spec, grants)
        late = {}
        if not host.has_id_ranges and resource.RLIMIT_NPROC in limits:  # of its user, whom it shares until it is inside
            late[resource.RLIMIT_NPROC] = limits.pop(resource.RLIMIT_NPROC)
        operations = [
            *(Operation(Code.JOIN, a=index) for index in grants.join),
            Operation(Code.GUARD),  # bubblewrap's child, if killed with its parent at a bad moment, would wait for ever
            *(_stage(binds) if host.has_id_ranges else ()),
            *(Operation(Code.LIMIT, a=kind, b=value) for kind, value in limits.items()),
            affinity(grants.cores),
            *((Operation(Code.IDENTITY, a=grants.uid, b=grants.gid),) if host.has_id_ranges else ()),
            *data.operations,
            Operation(Code.EXECUTE, texts([str(host.programs["bwrap"]), *command]), a=birth.said),
        ]
        plan = launch_plan(operations, namespaces=NEW_MOUNTS if host.has_id_ranges else 0)
        return Launch(plan, birth.image, late_limits=late)


@dataclass(slots=True)
class _Data:
    """Contents that the command line names by descriptors."""

    operations: list[Operation] = field(default_factory=list)

    def add(self, content: bytes) -> str:
        number = FIRST_DATA + len(self.operations)
        self.operations.append(Operation(Code.DATA, content, a=number))
        return str(number)


def arguments(spec: SandboxSpec, image: Image, binds: Sequence[Bind], masked: Sequence[str], data: _Data) -> list[str]:
    """The command line of bubblewrap, after its name."""
    size = str(spec.disk_mb << 20)
    network = () if spec.network == "host" else ("--unshare-net",)
    filtered = data.add(seccomp.instructions(has_network=spec.network != "off"))
    words: Iterator[Sequence[str]] = itertools.chain(
        [NAMESPACES, network, ROOT_INSIDE, ("--hostname", HOSTNAME, "--as-pid-1", "--die-with-parent", "--clearenv")],
        [("--size", size, "--perms", "1777", "--tmpfs", "/tmp", "--size", size, "--tmpfs", image.working_folder)],
        [("--bind" if bind.is_writable else "--ro-bind", bind.source, bind.target) for bind in binds],
        [("--file", data.add(content), path) for path, content in image.files],
        [("--symlink", target, path) for path, target in image.links],
        [("--dev", "/dev", "--size", size, "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev")],
        [("--proc", "/proc")],
        [("--ro-bind", "/dev/null", f"/proc/{name}") for name in masked],
        [("--remount-ro", "/", "--chdir", "/")],
        [("--seccomp", filtered, "--", AGENT)],
    )
    return [word for part in words for word in part]


def _stage(binds: Sequence[Bind]) -> Iterator[Operation]:
    """What is to be seen inside, put where users without powers can reach it: bubblewrap is run by one of them."""
    for slot, bind in enumerate(binds, start=FIRST_BIND):
        yield Operation(Code.TAKE_TREE, texts([bind.source]), a=slot, b=1)
    yield mount("tmpfs", STAGE, "tmpfs", NO_SETUID, "size=1m,nr_inodes=256,mode=755")
    for slot, (bind, staged) in enumerate(zip(binds, _staged(binds), strict=True), start=FIRST_BIND):
        if bind.is_file:
            yield Operation(Code.WRITE, texts([staged.source]), a=0o444)
        else:
            yield Operation(Code.MAKE_FOLDER, texts([staged.source]), a=0o755)
        attributes = ATTRIBUTE_NO_SETUID | (0 if bind.is_writable else ATTRIBUTE_READ_ONLY)
        yield Operation(Code.PUT_TREE, texts([staged.source]), a=slot, b=attributes)


def _staged(binds: Sequence[Bind]) -> list[Bind]:
    return [
        Bind(str(Path(STAGE, str(number))), bind.target, bind.is_writable, bind.is_file)
        for number, bind in enumerate(binds)
    ]
