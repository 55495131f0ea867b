"""The configuration of an OCI bundle for a sandbox: its mounts, namespaces, limits and system call filter, as JSON."""

import platform
import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from hone.sandbox.cells import seccomp
from hone.sandbox.cells.plan import HOSTNAME

ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
LIMITS = ("AS", "CORE", "CPU", "DATA", "FSIZE", "MEMLOCK", "MSGQUEUE", "NOFILE", "NPROC", "STACK")
LIMIT_NAMES: dict[int, str] = {getattr(resource, f"RLIMIT_{name}"): f"RLIMIT_{name}" for name in LIMITS}
DEVICE_BYTES = 64 << 10
JSON = dict[str, object]


@dataclass(frozen=True, slots=True)
class Seen:
    """A folder or file from outside that the sandbox sees at `target`."""

    source: str
    target: str
    is_writable: bool


@dataclass(frozen=True, slots=True)
class Bundle:
    """What the configuration is made of. root: the folder that becomes the root. shared_memory: the one for /dev/shm."""

    root: str
    shared_memory: str
    program: str
    seen: tuple[Seen, ...]
    masked: tuple[str, ...]
    limits: Mapping[int, int]
    has_sockets: bool
    has_own_network: bool


def configuration(bundle: Bundle) -> bytes:
    """The content of `config.json`. No user namespace: the runtime's program is started in that of the sandbox."""
    own = ["pid", "mount", "ipc", "uts", *(["network"] if bundle.has_own_network else [])]
    document: JSON = {
        "ociVersion": "1.0.2",
        "hostname": HOSTNAME,
        "root": {"path": bundle.root, "readonly": False},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [bundle.program],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")},
            "rlimits": [rlimit(kind, value) for kind, value in bundle.limits.items()],
        },
        "mounts": _mounts(bundle),
        "linux": {
            "namespaces": [{"type": kind} for kind in own],
            "maskedPaths": [f"/proc/{name}" for name in bundle.masked],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"],
            "seccomp": profile(has_sockets=bundle.has_sockets),
        },
    }
    return msgspec.json.encode(document)


def profile(*, has_sockets: bool, machine: str | None = None) -> JSON:
    """The filter of `seccomp.instructions` in the words of OCI; clone3 does not exist for these sandboxes."""
    name = machine or platform.machine()
    known = seccomp.ARCHITECTURES[name].numbers
    special = {"clone", "clone3", "ioctl", "socket", "socketpair"}
    families = (seccomp.AF_UNIX, seccomp.AF_INET, seccomp.AF_INET6) if has_sockets else (seccomp.AF_UNIX,)
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": seccomp.ENOSYS,
        "architectures": [ARCHITECTURES[name]],
        "syscalls": [
            _rule(sorted(known.keys() - seccomp.FORBIDDEN - special)),
            _rule(sorted(seccomp.FORBIDDEN & known.keys()), errno=seccomp.EPERM),
            _rule(["clone"], (0, seccomp.CLONE_NAMESPACES, 0, "SCMP_CMP_MASKED_EQ")),
            _rule(["ioctl"], (1, seccomp.TIOCSTI, 0, "SCMP_CMP_NE"), (1, seccomp.TIOCLINUX, 0, "SCMP_CMP_NE")),
            *(_rule(["socket"], (0, family, 0, "SCMP_CMP_EQ")) for family in families),
            _rule(["socketpair"], (0, seccomp.AF_UNIX, 0, "SCMP_CMP_EQ")),
        ],
    }


def _rule(names: Sequence[str], *tests: tuple[int, int, int, str], errno: int | None = None) -> JSON:
    rule: JSON = {"names": list(names), "action": "SCMP_ACT_ALLOW"}
    if errno is not None:
        rule |= {"action": "SCMP_ACT_ERRNO", "errnoRet": errno}
    if tests:
        rule["args"] = [
            {"index": index, "value": value, "valueTwo": other, "op": test} for index, value, other, test in tests
        ]
    return rule


def _mounts(bundle: Bundle) -> list[JSON]:
    return [
        mounted("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        mounted("/dev", "tmpfs", "tmpfs", ["nosuid", "noexec", "mode=755", f"size={DEVICE_BYTES}"]),
        mounted("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        mounted("/dev/shm", "none", bundle.shared_memory, ["bind", "nosuid", "nodev"]),
        *(
            mounted(one.target, "none", one.source, ["rbind", "nosuid", "nodev", "rw" if one.is_writable else "ro"])
            for one in bundle.seen
        ),
    ]


def mounted(target: str, kind: str, source: str, options: Iterable[str]) -> JSON:
    """A mount of a configuration."""
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def rlimit(kind: int, value: int) -> JSON:
    """A limit of a configuration, no higher than this process's own."""
    hard = resource.getrlimit(kind)[1]
    kept = value if hard == resource.RLIM_INFINITY else min(value, hard)
    return {"type": LIMIT_NAMES[kind], "soft": kept, "hard": kept}
