"""Which system calls a cell's programs may make: an allow-list per architecture, turned into BPF instructions."""

import functools
import platform
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from hone.sandbox.cells.syscalls import AARCH64, X86_64

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
AUDIT_X86_64, AUDIT_AARCH64 = 0xC000003E, 0xC00000B7
LOAD, EQUAL, GREATER_EQUAL, ANY_BIT, JUMP, RETURN = 0x20, 0x15, 0x35, 0x45, 0x05, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
CLONE_NAMESPACES = 0x7E020000  # new mount, cgroup, uts, ipc, user, pid and network namespaces
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # typing into a terminal for somebody else

# What no program of a sandbox needs, and what most escapes from containers were made of: namespaces and mounts, other
# processes' memory, keys, kernel programs and tracing, modules, clocks, devices, handles that go around paths.
FORBIDDEN = frozenset(
    [
        "_sysctl",
        "acct",
        "add_key",
        "adjtimex",
        "afs_syscall",
        "bpf",
        "chroot",
        "clock_adjtime",
        "clock_settime",
        "create_module",
        "delete_module",
        "fanotify_init",
        "fanotify_mark",
        "finit_module",
        "fsconfig",
        "fsmount",
        "fsopen",
        "fspick",
        "get_kernel_syms",
        "getpmsg",
        "init_module",
        "io_uring_enter",
        "io_uring_register",
        "io_uring_setup",
        "ioperm",
        "iopl",
        "kcmp",
        "kexec_file_load",
        "kexec_load",
        "keyctl",
        "lookup_dcookie",
        "lsm_get_self_attr",
        "lsm_list_modules",
        "lsm_set_self_attr",
        "migrate_pages",
        "mount",
        "mount_setattr",
        "move_mount",
        "move_pages",
        "name_to_handle_at",
        "nfsservctl",
        "open_by_handle_at",
        "open_tree",
        "open_tree_attr",
        "perf_event_open",
        "personality",
        "pidfd_getfd",
        "pivot_root",
        "process_madvise",
        "process_vm_readv",
        "process_vm_writev",
        "ptrace",
        "putpmsg",
        "query_module",
        "quotactl",
        "quotactl_fd",
        "reboot",
        "request_key",
        "sched_setattr",
        "security",
        "setdomainname",
        "sethostname",
        "setns",
        "settimeofday",
        "statmount",
        "listmount",
        "swapoff",
        "swapon",
        "sysfs",
        "syslog",
        "tuxcall",
        "umount2",
        "unshare",
        "uselib",
        "userfaultfd",
        "ustat",
        "vhangup",
        "vserver",
    ]
)


# What the machine's other processes are reached by where a sandbox has no namespaces of its own.
SHARED = frozenset(
    [
        *("shmget", "shmat", "shmctl", "shmdt", "semget", "semop", "semtimedop", "semctl"),
        *("msgget", "msgsnd", "msgrcv", "msgctl", "mq_open", "mq_unlink"),
    ]
)
# What Landlock does not keep from the files and processes of a user whom a sandbox's programs run as.
OF_THE_USER = frozenset(
    [
        *("chmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchownat", "utime", "utimes", "futimesat", "utimensat"),
        *("setxattr", "lsetxattr", "setxattrat", "removexattr", "lremovexattr", "removexattrat", "inotify_add_watch"),
        *("setpriority", "ioprio_set"),
    ]
)
OF_THE_CALLER_ONLY = ("prlimit64", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr")


@dataclass(frozen=True, slots=True)
class Architecture:
    """How the kernel calls it, and the numbers of its system calls."""

    audit: int
    numbers: dict[str, int]


ARCHITECTURES = {"x86_64": Architecture(AUDIT_X86_64, X86_64), "aarch64": Architecture(AUDIT_AARCH64, AARCH64)}


@functools.cache
def instructions(
    *,
    has_network: bool = True,
    allow_clone3: bool = False,
    has_namespaces: bool = True,
    has_own_user: bool = True,
    machine: str | None = None,
) -> bytes:
    """The filter for programs of a cell.

    Allowed is what is known and not forbidden; the forbidden fails with EPERM, the unknown with ENOSYS, as on an older
    kernel. clone is allowed without new namespaces. clone3, whose flags a filter cannot see, is ENOSYS, so that libc
    falls back to clone, unless the cell's agent itself needs it.

    has_network: whether other sockets than those of one machine's files (AF_UNIX) may be made.
    has_namespaces: without, no local sockets, System V IPC or message queues either, as they would be the machine's.
    has_own_user: without, nothing that changes other processes or, by a path, the attributes of files.
    machine: an architecture; by default this machine's. `ValueError` for one that is not known.
    """
    name = machine or platform.machine()
    if name not in ARCHITECTURES:
        raise ValueError(f"no system call filter for {name}; known: {', '.join(sorted(ARCHITECTURES))}")
    architecture = ARCHITECTURES[name]
    numbers = architecture.numbers
    families = (*((AF_UNIX,) if has_namespaces else ()), *((AF_INET, AF_INET6) if has_network else ()))
    forbidden = FORBIDDEN | (frozenset() if has_namespaces else SHARED) | (frozenset() if has_own_user else OF_THE_USER)
    special = {
        numbers["clone"]: _clone(),
        numbers["ioctl"]: _ioctl(),
        numbers["socket"]: _socket(families),
        numbers["socketpair"]: _socket((AF_UNIX,)),
    }
    answers = {number: _return(ERRNO | EPERM if call in forbidden else ALLOW) for call, number in numbers.items()}
    if not has_own_user:
        special.update({numbers[call]: _zero_first() for call in OF_THE_CALLER_ONLY})
    if not allow_clone3:
        answers[numbers["clone3"]] = _return(ERRNO | ENOSYS)
    answers.update(special)
    return b"".join(
        (
            _instruction(LOAD, ARCHITECTURE),
            _instruction(EQUAL, architecture.audit, 1, 0),
            _return(KILL),
            _instruction(LOAD, NUMBER),
            *((_instruction(GREATER_EQUAL, 0x40000000, 0, 1), _return(KILL)) if name == "x86_64" else ()),  # x32
            _search(_ranges(answers)),
        )
    )


def _ranges(answers: dict[int, bytes]) -> list[tuple[int, bytes]]:
    """(first number, what to do from there on), ascending from 0; neighbours differ."""
    unknown = _return(ERRNO | ENOSYS)
    ranges: list[tuple[int, bytes]] = []
    for number in range(max(answers) + 2):
        answer = answers.get(number, unknown)
        if not ranges or ranges[-1][1] != answer:
            ranges.append((number, answer))
    return ranges


def _search(ranges: list[tuple[int, bytes]]) -> bytes:
    """A binary search over the ranges: about eight comparisons for any system call."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    low, high = _search(ranges[:middle]), _search(ranges[middle:])
    num_low = len(low) // 8
    if num_low < 256:
        return _instruction(GREATER_EQUAL, ranges[middle][0], num_low, 0) + low + high
    return _instruction(GREATER_EQUAL, ranges[middle][0], 0, 1) + _instruction(JUMP, num_low) + low + high


def _clone() -> bytes:
    return (
        _instruction(LOAD, FIRST_ARGUMENT)
        + _instruction(ANY_BIT, CLONE_NAMESPACES, 1, 0)
        + _return(ALLOW)
        + _return(ERRNO | EPERM)
    )


def _zero_first() -> bytes:
    return _instruction(LOAD, FIRST_ARGUMENT) + _instruction(EQUAL, 0, 1, 0) + _return(ERRNO | EPERM) + _return(ALLOW)


def _ioctl() -> bytes:
    return _instruction(LOAD, FIRST_ARGUMENT + 8) + _unless((TIOCSTI, TIOCLINUX), EPERM)


def _unless(values: Iterable[int], errno: int) -> bytes:
    tests = b"".join(_instruction(EQUAL, value, 0, 1) + _return(ERRNO | errno) for value in values)
    return tests + _return(ALLOW)


def _socket(families: Iterable[int]) -> bytes:
    tests = b"".join(_instruction(EQUAL, family, 0, 1) + _return(ALLOW) for family in families)
    return _instruction(LOAD, FIRST_ARGUMENT) + tests + _return(ERRNO | EAFNOSUPPORT)


def _return(action: int) -> bytes:
    return _instruction(RETURN, action)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
