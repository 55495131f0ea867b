"""A zygote: a Python of the node that has imported what cells shall find imported, and forks itself into them.

It runs nothing that comes from a cell. Its child enters the cell's namespaces, gives up everything the cell's own
processes gave up, in the same steps, and only then becomes the cell's warm Python. Until then nothing in the cell can
look into it: it is not dumpable.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import pathlib
import resource
import signal
import socket
import struct
import sys

_specification = importlib.util.spec_from_file_location("warm", pathlib.Path(__file__).with_name("warm.py"))
assert _specification is not None
assert _specification.loader is not None
warm = importlib.util.module_from_spec(_specification)
sys.modules["warm"] = warm
_specification.loader.exec_module(warm)

ORDER = struct.Struct("=III")  # whether cells have ranges of ids, whether there is a cgroup, how many v1 files
OPERATION = struct.Struct("=IIQQ")
FAILED = 2
LIMIT, FILTER, DROP_POWERS, CORES, LANDLOCK = 11, 12, 13, 16, 17  # of native/protocol.h: those a plan confines with
NEW_PIDS = 0x20000000
OTHER_NAMESPACES = 0x10000000 | 0x00020000 | 0x08000000 | 0x04000000 | 0x40000000  # user, mnt, ipc, uts, net
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
CAPABILITY_VERSION = 0x20080522
X86 = os.uname().machine == "x86_64"
CAPSET, SECCOMP, SETGROUPS = (126, 317, 116) if X86 else (91, 277, 159)
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446

libc = warm.libc


def checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def enter(order: bytes, descriptors: list[int], own_pids: int) -> None:
    """Have a child of this process become the warm Python of a cell."""
    has_ranges, has_cgroup, num_tasks = ORDER.unpack_from(order)
    pidfd, control = descriptors[:2]
    cgroup = descriptors[2] if has_cgroup else -1
    tasks = descriptors[2 + has_cgroup : 2 + has_cgroup + num_tasks]
    operations = order[ORDER.size :]
    if has_ranges:  # root may have its children born in the cell's process namespace, which saves a fork
        checked(libc.setns(pidfd, NEW_PIDS))
        pid = -1
        try:
            pid = warm.fork(cgroup)
        finally:
            if pid != 0:
                checked(libc.setns(own_pids, NEW_PIDS))
    else:
        pid = os.fork()
    if pid == 0:
        try:
            for descriptor in tasks:
                os.write(descriptor, b"0")
            checked(libc.setns(pidfd, OTHER_NAMESPACES | (0 if has_ranges else NEW_PIDS)))
            if not has_ranges and warm.fork(cgroup) > 0:
                os._exit(0)
            become(control, operations)
        except BaseException as error:
            tell(control, error)
        finally:
            os._exit(1)


def tell(control: int, error: BaseException) -> None:
    """Say on the cell's socket what went wrong."""
    number = error.errno if isinstance(error, OSError) and error.errno else 1
    os.write(control, warm.REPORT.pack(FAILED, 0, 0, number, 0, 0, 0))


def become(control: int, operations: bytes) -> None:
    """In the cell: confine this process as the plan says, and listen."""
    os.setsid()
    os.closerange(3, control)
    os.closerange(control + 1, 4096)
    libc.syscall(SETGROUPS, 0, None)  # refused, and needless, where only one id is mapped
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    checked(libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0))
    confine(operations)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warm.main(socket.socket(fileno=control))


def confine(operations: bytes) -> None:
    position = 0
    while position < len(operations):
        code, size, a, b = OPERATION.unpack_from(operations, position)
        position += OPERATION.size
        carry_out(code, operations[position : position + size], a, b)
        position += size + -size % 8


def carry_out(code: int, data: bytes, a: int, b: int) -> None:
    if code == LIMIT:
        hard = resource.getrlimit(a)[1]
        value = b if hard == resource.RLIM_INFINITY else min(b, hard)
        resource.setrlimit(a, (value, value))
    elif code == CORES:
        mask = int.from_bytes(data, "little")
        os.sched_setaffinity(0, {core for core in range(mask.bit_length()) if mask >> core & 1})
    elif code == DROP_POWERS:
        drop_powers()
    elif code == LANDLOCK:
        restrict(data, a)
    elif code == FILTER:
        program = ctypes.create_string_buffer(data, len(data))
        checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        checked(libc.syscall(SECCOMP, 1, 0, ctypes.byref(Program(len(data) // 8, ctypes.addressof(program)))))
    else:
        raise OSError(38, f"operation {code} is none that confines")


class Program(ctypes.Structure):
    _fields_ = (("num_instructions", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def drop_powers() -> None:
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    checked(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    checked(libc.syscall(CAPSET, header, bytes(24)))


def restrict(attributes: bytes, size: int) -> None:
    if len(attributes) != 24:
        raise OSError(38, "rules for files are not for cells")
    ruleset = checked(libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    checked(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def main(control: socket.socket, modules: list[str]) -> None:
    """Import, and serve until the node hangs up."""
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; a cell is not gone before that
    own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    control.send(b"ready")
    while True:
        order, descriptors, _, _ = socket.recv_fds(control, warm.MESSAGE_BYTES, 16)
        if not order:
            return
        try:
            enter(order, descriptors, own_pids)
        except OSError as error:
            tell(descriptors[1], error)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
