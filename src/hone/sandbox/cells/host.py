"""What this machine can do for cells, and the image that is the machine itself."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hone.sandbox.cells.plan import MASKED, MAX_INOTIFY, Bind, Image
from hone.sandbox.native.build import cache_folder, can_build

LANDLOCK_CREATE_RULESET, LANDLOCK_CREATE_RULESET_VERSION = 444, 1
LANDLOCK_ABSTRACT_SOCKETS = 6  # the ABI that can keep programs from other cells' abstract sockets
CAP_SYS_ADMIN, CAP_SETUID = 21, 7
MIN_KERNEL = (5, 14)
MIN_KERNEL_FOR_SHARED_LAYERS = (6, 3)  # the first whose tmpfs can be seen with other ids
FIRST_ID, LAST_ID = 1 << 20, 1 << 31  # the ids that cells get ranges of
PROGRAMS = ("bwrap", "crun", "runc", "runsc")
SYSTEM_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC = (
    *("ld.so.cache", "alternatives", "ssl/certs", "ssl/openssl.cnf", "mime.types", "localtime", "timezone"),
    *("nsswitch.conf", "services", "protocols", "shells", "magic", "debian_version", "os-release"),
)
ETC_PATTERNS = ("java-*-openjdk",)  # named by version
PASSWD = b"root:x:0:0:root:/work:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
GROUP = b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"
HOSTS = b"127.0.0.1 localhost sandbox\n::1 localhost\n"


@dataclass(frozen=True, slots=True)
class CgroupFolders:
    """Where this process may make cgroups: its own folder in the v2 tree, and by v1 controller. None: nowhere."""

    unified: Path | None = None
    unified_controllers: frozenset[str] = frozenset()
    v1: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Host:
    """The facts that plans depend on."""

    kernel: tuple[int, int]
    machine: str
    uid: int
    gid: int
    has_id_ranges: bool
    has_user_namespaces: bool
    has_network_namespaces: bool
    can_build: bool
    has_overlay: bool
    has_seccomp: bool
    landlock: int
    cores: frozenset[int]
    masked: tuple[str, ...]
    cgroups: CgroupFolders
    has_whole_proc: bool = True
    limits_inotify: bool = True
    programs: Mapping[str, Path] = field(default_factory=dict)
    """Other runtimes' programs that are installed, by name."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `hone sandbox doctor`. lost: what cells do without where it is missing; empty if nothing."""

    name: str
    is_there: bool
    lost: str = ""


def look() -> Host:
    """This machine, as this process may use it. Reads a few files and changes nothing."""
    numbers = platform.release().split("-")[0].split(".")
    capabilities = _capabilities()
    return Host(
        kernel=(int(numbers[0]), int(numbers[1])),
        machine=platform.machine(),
        uid=os.geteuid(),
        gid=os.getegid(),
        has_id_ranges=os.geteuid() == 0
        and bool(capabilities >> CAP_SETUID & 1)
        and bool(capabilities >> CAP_SYS_ADMIN & 1)
        and _has_all_ids(Path("/proc/self/uid_map")),
        has_user_namespaces=_allows_user_namespaces(),
        has_network_namespaces=Path("/proc/self/ns/net").exists()
        and _words("/proc/sys/user/max_net_namespaces") != ["0"],
        can_build=can_build(),
        has_overlay="overlay" in _words("/proc/filesystems"),
        has_seccomp="errno" in _words("/proc/sys/kernel/seccomp/actions_avail"),
        landlock=max(0, _landlock()),
        cores=frozenset(os.sched_getaffinity(0)),
        masked=tuple(name for name in MASKED if _is_open_to_all(Path("/proc", name))),
        cgroups=find_cgroups(),
        limits_inotify=all(Path(f"/proc/sys/user/max_inotify_{what}").exists() for what in MAX_INOTIFY),
        has_whole_proc=_has_whole_proc(Path("/proc/self/mountinfo")),
        programs=_find_programs(),
    )


def examine(host: Host) -> tuple[Finding, ...]:
    """What is there, and what is lost without what is not."""
    folders = host.cgroups
    controllers = folders.unified_controllers | frozenset(folders.v1)
    return (
        Finding(
            f"Linux {MIN_KERNEL[0]}.{MIN_KERNEL[1]}",
            host.kernel >= MIN_KERNEL,
            "cells: they need mounts by descriptor and processes born in a cgroup",
        ),
        Finding(
            "programs in C",
            host.can_build,
            "little weight: without a C compiler, and without a wheel that has them compiled, spawner and agents are in "
            "Python, an interpreter for each sandbox, without kept layers, ports and a warm Python that is ready at once",
        ),
        Finding("user namespaces", host.has_user_namespaces, "cells; what is left are processes behind Landlock"),
        Finding(
            "network namespaces",
            host.has_network_namespaces,
            'sandboxes but those with network="host": empty networks, allow-lists and published ports',
        ),
        Finding(
            "whole /proc",
            host.has_whole_proc,
            "cells: the kernel gives no new /proc to whom parts of the old one are hidden, as in most containers",
        ),
        Finding("seccomp", host.has_seccomp, "cells: system calls could not be filtered"),
        Finding("overlay", host.has_overlay, "images other than the host's"),
        Finding(
            "layers of one cell below another",
            can_share_layers(host),
            "snapshots without copies: files are copied into each sandbox that begins from one",
        ),
        Finding("id ranges", host.has_id_ranges, "ids of their own: a cell's programs have this user's id outside"),
        Finding("cgroup v2", folders.unified is not None, "pause, and the death of daemons at a timeout of their exec"),
        Finding("cgroup memory", "memory" in controllers, "a limit on the sum of memory; each process has its own"),
        Finding("cgroup pids", "pids" in controllers, "nothing: the kernel counts processes by user namespace"),
        Finding("cgroup cpu", "cpu" in controllers, "parts of cores; whole cores are kept by affinity"),
        Finding(
            f"Landlock ABI {LANDLOCK_ABSTRACT_SOCKETS}",
            host.landlock >= LANDLOCK_ABSTRACT_SOCKETS,
            'the cheap network="off": such cells get a network namespace each',
        ),
    )


def can_share_layers(host: Host) -> bool:
    """Whether cells of this machine can lie over what others have written, whose ids are others outside."""
    return (
        host.can_build and host.has_overlay and (not host.has_id_ranges or host.kernel >= MIN_KERNEL_FOR_SHARED_LAYERS)
    )


def find_cgroups(
    mountinfo: Path = Path("/proc/self/mountinfo"), membership: Path = Path("/proc/self/cgroup")
) -> CgroupFolders:
    """This process's own folders in the cgroup trees that it may write to."""
    own = {}
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    unified, v1 = None, {}
    for line in _lines(mountinfo):
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        root, target = left.split(" ")[3:5]
        if kind == "cgroup2":
            unified = _writable(target, root, own.get("")) or unified
        elif kind == "cgroup":
            for controllers, path in own.items():
                for controller in {"memory", "pids", "cpu"} & set(controllers.split(",")) & set(options.split(",")):
                    if (folder := _writable(target, root, path)) is not None:
                        v1[controller] = folder
    available = set(_words(str(unified / "cgroup.controllers"))) if unified else set()
    return CgroupFolders(unified, frozenset(available & {"memory", "pids", "cpu"}), v1)


@functools.cache
def host_image() -> Image:
    """The machine's own programs and this Python, read-only, below a root with nothing else of the machine's."""
    links, binds = [], [Bind("/usr", "/usr"), Bind(str(_etc()), "/etc")]
    for name in SYSTEM_LINKS:
        path = Path(name)
        if path.is_symlink():
            links.append((name, str(path.readlink())))
        elif path.is_dir():
            binds.append(Bind(name, name))
    for prefix in sorted({sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)}):
        if not any(Path(prefix).is_relative_to(bind.source) for bind in binds):
            binds.append(Bind(prefix, prefix))
    folders = dict.fromkeys([str(Path(sys.prefix) / "bin"), "/usr/local/bin", "/usr/bin", "/bin"])
    return Image(binds=tuple(binds), links=tuple(links), env={"PATH": ":".join(folders)})


def _etc() -> Path:
    """A folder with what programs need of /etc and nothing that is this machine's alone, kept in the cache folder.

    One folder to see instead of a dozen files: every file would cost a cell a tenth of a millisecond's worth of mounts.
    """
    digest = hashlib.sha256(repr((_etc_names(), PASSWD, GROUP, HOSTS, os.geteuid())).encode())
    for name in _etc_names():
        with contextlib.suppress(OSError):
            digest.update(f"{name} {Path('/etc', name).stat().st_mtime_ns}".encode())
    folder = cache_folder() / f"etc-{digest.hexdigest()[:24]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unfinished = Path(temporary) / "etc"
            unfinished.mkdir()
            _copy_etc(unfinished)
            unfinished.chmod(0o755)
            with contextlib.suppress(OSError):  # somebody else was faster
                unfinished.rename(folder)
    return folder


def _etc_names() -> list[str]:
    found = (path.name for pattern in ETC_PATTERNS for path in Path("/etc").glob(pattern))
    return [*ETC, *sorted(found)]


def _copy_etc(to: Path) -> None:
    for name in _etc_names():
        source, target = Path("/etc", name), to / name
        with contextlib.suppress(OSError, shutil.Error):
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            elif source.exists():
                shutil.copy(source, target)
    for name, content in (("passwd", PASSWD), ("group", GROUP), ("hosts", HOSTS), ("resolv.conf", b"")):
        (to / name).write_bytes(content)
    (to / "mtab").symlink_to("/proc/self/mounts")


def _find_programs() -> dict[str, Path]:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    found = {name: shutil.which(name, path=path) for name in PROGRAMS}
    return {name: Path(path) for name, path in found.items() if path is not None}


def _is_open_to_all(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o006)
    except OSError:
        return False


def _writable(target: str, root: str, own: str | None) -> Path | None:
    """The folder of cgroup `own` in a tree of which `target` shows what lies below `root`."""
    if own is None or not Path(own).is_relative_to(root):
        return None
    folder = Path(target) / Path(own).relative_to(root)
    return folder if os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK) else None


def _allows_user_namespaces() -> bool:
    for path, refused in (
        ("/proc/sys/user/max_user_namespaces", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        is_about_all = path.endswith("max_user_namespaces")
        if _words(path) == [refused] and (is_about_all or os.geteuid() != 0):
            return False
    return Path("/proc/self/ns/user").exists()


def _landlock() -> int:
    return int(
        ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_CREATE_RULESET_VERSION)
    )


def _capabilities() -> int:
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _has_whole_proc(mountinfo: Path) -> bool:
    """Whether nothing is mounted over parts of /proc. What is mounted on an empty folder hides nothing."""
    targets = [line.split()[4] for line in _lines(mountinfo)]
    return not any(one.startswith("/proc/") and not one.startswith("/proc/sys/fs/binfmt_misc") for one in targets)


def _has_all_ids(id_map: Path) -> bool:
    """Whether ids of cells are there to be had: a user namespace, as of a container, may have a few thousand only."""
    spans = [(int(first), int(count)) for first, _, count in (line.split() for line in _lines(id_map))]
    return any(first <= FIRST_ID and first + count >= LAST_ID for first, count in spans)


def _words(path: str) -> list[str]:
    return [word for line in _lines(Path(path)) for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
