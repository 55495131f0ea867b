"""The runtime `gvisor`: runsc puts a kernel of its own between programs and this machine's; the agent calls back by a socket."""

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import PurePosixPath

import msgspec

from hone.sandbox.cells.host import Host
from hone.sandbox.cells.plan import (
    INODES_PER_MB,
    NEW_MOUNTS,
    NO_DEVICES,
    NO_SETUID,
    STAGE,
    Bind,
    Code,
    Operation,
    affinity,
    mount,
    plan_spawner,
    resource_limits,
)
from hone.sandbox.cells.runtimes.oci import folders
from hone.sandbox.cells.runtimes.oci_config import JSON, mounted, rlimit
from hone.sandbox.cells.runtimes.runtime import AGENT, Birth, Feature, Launch, launch_plan, require, texts
from hone.sandbox.errors import Unsupported

ROOT, BUNDLE, FILES, STATE = f"{STAGE}/root", f"{STAGE}/bundle", f"{STAGE}/files", f"{STAGE}/state"
CONTROL_FOLDER, CONTROL = "/.control", "socket"
WORK = "/work"


class GvisorRuntime:
    """For code of an enemy: what it asks of a kernel, one in Go answers. Every system call costs more."""

    name = "gvisor"
    features = frozenset({Feature.LOOPBACK, Feature.DISK_SUM, Feature.MOVED_BINDS})

    def missing(self, host: Host) -> str:
        """What this machine lacks for it, in a clause; empty where it works."""
        if "runsc" not in host.programs:
            return "the program runsc (package runsc, or gvisor.dev)"
        if not host.has_id_ranges:
            return "root, as whom runsc makes its own namespaces"
        return ""

    def prelude(self, host: Host) -> tuple[Operation, ...]:
        """A view of mounts of its own, and a network in which runsc's control sockets, which have no owner, are alone."""
        return plan_spawner(is_unprivileged=False, uid=host.uid, gid=host.gid, own_network=True)

    def launch(self, birth: Birth, host: Host) -> Launch:
        """How a sandbox is started; raises `Unsupported` for what it asks for and this runtime cannot give."""
        require(self.name, self.features, birth.spec, birth.image)
        if birth.spec.network == "off":
            raise Unsupported("runtime 'gvisor' cannot take sockets away: say network=\"none\", a loopback of its own")
        birth.folder.mkdir(mode=0o700)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            listener.bind(str(birth.folder / CONTROL))
            for path in (birth.folder / CONTROL, birth.folder):
                os.chown(path, birth.grants.uid, birth.grants.gid)
            listener.listen(1)
        except BaseException:  # a cancellation too: undo, then pass it on
            listener.close()
            raise
        return Launch(
            plan=launch_plan([*_steps(birth, str(host.programs["runsc"]))], namespaces=NEW_MOUNTS),
            image=birth.image,
            folder=birth.folder,
            listener=listener,
            inner_files=FILES,
            files_folder=WORK,
            program_flags=0,
            has_program_cgroups=False,
        )


def _steps(birth: Birth, runsc: str) -> Iterator[Operation]:
    grants, spec = birth.grants, birth.spec
    yield from (Operation(Code.JOIN, a=index) for index in grants.join)
    yield Operation(Code.GUARD)
    size = f"size={spec.disk_mb}m,nr_inodes={max(4096, spec.disk_mb * INODES_PER_MB)},mode=755"
    yield mount("tmpfs", STAGE, "tmpfs", NO_SETUID | NO_DEVICES, size)
    for path, mode in ((ROOT, 0o755), (BUNDLE, 0o700), (STATE, 0o700), (FILES, 0o755)):
        yield Operation(Code.MAKE_FOLDER, texts([path]), a=mode)
    for path, mode in ((f"{FILES}{WORK}", 0o777), (f"{FILES}/tmp", 0o1777)):
        yield Operation(Code.MAKE_FOLDER, texts([path]), a=mode)
    for bind in _binds(birth):
        base = FILES if bind.target.startswith(f"{WORK}/") else ROOT
        yield from folders(base, str(PurePosixPath(bind.target).parent) if bind.is_file else bind.target)
        if bind.is_file:
            yield Operation(Code.WRITE, texts([base + bind.target]), a=0o644)
    yield from folders(ROOT, "/proc")
    for path, target in birth.image.links:
        yield Operation(Code.LINK, texts([target, ROOT + path]))
    yield Operation(Code.WRITE, texts([f"{BUNDLE}/config.json"]) + _configuration(birth), a=0o600)
    yield affinity(grants.cores)
    options = ("--root", STATE, "--network=none", "--host-uds=open", "--ignore-cgroups")
    yield Operation(Code.EXECUTE, texts([runsc, *options, "run", "-bundle", BUNDLE, _container(birth)]), a=birth.said)


def _container(birth: Birth) -> str:
    """A name that no other container of this machine has: runsc names its control socket after it."""
    return f"{birth.folder.parent.name}-{birth.name}"


def _binds(birth: Birth) -> tuple[Bind, ...]:
    """What is seen, that which others are seen in first."""
    return (
        Bind(f"{FILES}{WORK}", WORK, is_writable=True),
        Bind(f"{FILES}/tmp", "/tmp", is_writable=True),
        *birth.image.binds,
        *birth.binds,
        Bind(str(birth.agent), AGENT, is_file=True),
        Bind(str(birth.folder), CONTROL_FOLDER),
    )


def _configuration(birth: Birth) -> bytes:
    grants = birth.grants
    limits = {**resource_limits(birth.spec, grants), resource.RLIMIT_AS: birth.spec.memory_mb << 20}
    document: JSON = {
        "ociVersion": "1.0.2",
        "hostname": "sandbox",
        "root": {"path": ROOT, "readonly": True},
        "process": {
            "user": {"uid": grants.uid, "gid": grants.gid},
            "args": [AGENT, f"{CONTROL_FOLDER}/{CONTROL}"],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")},
            "rlimits": [rlimit(kind, value) for kind, value in limits.items()],
        },
        "mounts": [
            mounted("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
            *(
                mounted(bind.target, "bind", bind.source, ["rbind", "rw" if bind.is_writable else "ro"])
                for bind in _binds(birth)
            ),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]},
    }
    return msgspec.json.encode(document)
