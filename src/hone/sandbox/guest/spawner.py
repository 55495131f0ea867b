"""The spawner in Python, for machines without a C compiler: clones sandboxes and lets each carry out its plan.

    python -I -S spawner.py SOCKET AGENT     (descriptors; AGENT is the source of the agent in Python)

It does what native/spawner.c does, in the same messages and steps, but for layers that are kept and sockets in networks of
sandboxes. It decides nothing, and holds nothing that a sandbox may not see: what it clones becomes another program before
it runs anything of the sandbox's.
"""

# A path is bytes of a plan's here, and every module that is not imported is time and memory in every sandbox.
# ruff: noqa: PTH102, PTH123, PTH208, PTH211, SIM105

import array
import ctypes
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys

SPAWN, SPAWNED = struct.Struct("=QQiIIIIII4x"), struct.Struct("=Qii")
OPERATION, REPORT = struct.Struct("=IIQQ"), struct.Struct("=IIiiQQQ")
FAILED = 2
EINVAL, ENOSYS = 22, 38
MESSAGE_BYTES, MAX_DESCRIPTORS = 176 << 10, 64
CONTROL, LAYER, FIRST_LAYER = 3, 4, 64
NEW_NETWORK = 0x40000000
CLONE_PIDFD, CLONE_INTO_CGROUP = 0x1000, 0x200000000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CAPABILITY_VERSION = 0x20080522
NUMBERS = {
    "x86_64": {"mount": 165, "umount2": 166, "pivot_root": 155, "capset": 126, "seccomp": 317, "setgroups": 116,
               "setresgid": 119, "setresuid": 117, "setns": 308, "unshare": 272, "sched_setaffinity": 203},
    "aarch64": {"mount": 40, "umount2": 39, "pivot_root": 41, "capset": 91, "seccomp": 277, "setgroups": 159,
                "setresgid": 149, "setresuid": 147, "setns": 268, "unshare": 97, "sched_setaffinity": 122},
}[os.uname().machine]  # fmt: skip
CLONE3, OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 435, 428, 429, 442
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, MOVE_MOUNT_FROM_EMPTY_PATH, DETACH = 1, 4, 2
MOUNT_ATTR_IDMAP = 0x00100000
SIOCSIFFLAGS, UP_AND_RUNNING = 0x8914, 0x41
# Those that a sandbox may have: this one, where its image is this machine, or its own.
PYTHONS = (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3")

libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: a clone must not lose it


class Program(ctypes.Structure):
    _fields_ = (("num_instructions", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def call(number: int, *arguments: "int | bytes | None") -> int:
    """A system call; `OSError` if it fails."""
    result = libc.syscall(number, *[ctypes.c_long(one) if isinstance(one, int) else one for one in arguments])
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(result)


def clone(flags: int, cgroup: int) -> "tuple[int, int]":
    """Fork into namespaces and a cgroup; pid and pidfd of the child, and 0, -1 in it."""
    pidfd = ctypes.c_int(-1)
    wanted = struct.pack(
        "=11Q",
        flags | CLONE_PIDFD | (CLONE_INTO_CGROUP if cgroup >= 0 else 0),
        ctypes.addressof(pidfd),
        *(0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0),
        max(cgroup, 0),
    )
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = libc.syscall(CLONE3, wanted, ctypes.c_size_t(len(wanted)))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    error = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(error, os.strerror(error))
    return pid, pidfd.value


def receive(end: socket.socket, size: int) -> "tuple[bytes, list[int]]":
    """The next message and its descriptors, which no program inherits."""
    message, ancillary, _, _ = end.recvmsg(size, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % 4])
    return message, list(descriptors)


class Order:
    """What the node sends: a plan, or with the identity 0 steps for this process itself."""

    def __init__(self, message: bytes, descriptors: "list[int]") -> None:
        (
            self.identity,
            self.namespaces,
            cgroup,
            uids,
            gids,
            self.num_layers,
            layers,
            self.maps_layers,
            self.num_steps,
        ) = SPAWN.unpack_from(message)
        rest = message[SPAWN.size :]
        self.uid_map, self.gid_map = rest[:uids], rest[uids : uids + gids]
        self.layers = rest[uids + gids : uids + gids + layers].split(b"\0")[:-1]
        self.steps = rest[uids + gids + layers :]
        self.descriptors = descriptors
        self.cgroup = descriptors[cgroup] if cgroup >= 0 else -1

    def operations(self) -> "list[tuple[int, bytes, int, int]]":
        found, position = [], 0
        for _ in range(self.num_steps):
            code, size, a, b = OPERATION.unpack_from(self.steps, position)
            position += OPERATION.size
            found.append((code, self.steps[position : position + size], a, b))
            position += size + -size % 8
        return found


class Spawner:
    """Takes orders until the node hangs up."""

    def __init__(self, control: socket.socket, agent: bytes) -> None:
        self.control = control
        self.steps = Steps(agent)
        self.own_network = -1

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(os.pidfd_open(os.getppid()), select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor != self.control.fileno():
                    return
                message, descriptors = receive(self.control, MESSAGE_BYTES)
                if not message:
                    return
                try:
                    self.obey(Order(message, descriptors))
                finally:
                    for one in descriptors:
                        os.close(one)

    def obey(self, order: Order) -> None:
        if order.identity == 0:
            done, error = self.steps.carry_out_all(order)
            self.control.send(SPAWNED.pack(0, done, error))
            return
        pid, pidfd, error = 0, -1, 0
        try:
            pid, pidfd = self.spawn(order)
        except OSError as problem:
            error = problem.errno or 1
        reply = SPAWNED.pack(order.identity, pid, error)
        if pidfd < 0:
            self.control.send(reply)
            return
        socket.send_fds(self.control, [reply], [pidfd])
        os.close(pidfd)

    def spawn(self, order: Order) -> "tuple[int, int]":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            pid, pidfd = clone(order.namespaces, order.cgroup)
            if pid == 0:
                ours.close()
                self.be_born(order, theirs)
            try:
                self.release(pid, order, ours)
            except OSError:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
                raise
        return pid, pidfd

    def be_born(self, order: Order, gate: socket.socket) -> None:
        """What the clone does: it waits until it has its ids, and layers that belong to them, and obeys."""
        try:
            byte, layers = receive(gate, 1)
            if byte:
                self.control.close()
                if order.namespaces & NEW_NETWORK:
                    bring_loopback_up()
                self.steps.trees.update(enumerate(layers, start=FIRST_LAYER))
                done, error = self.steps.carry_out_all(order)
                os.write(order.descriptors[0], REPORT.pack(FAILED, done, 0, error, 0, 0, 0))
        finally:
            os._exit(1)

    def release(self, pid: int, order: Order, gate: socket.socket) -> None:
        if order.uid_map:
            write(f"/proc/{pid}/uid_map", order.uid_map)
            if os.geteuid():
                write(f"/proc/{pid}/setgroups", b"deny")
            write(f"/proc/{pid}/gid_map", order.gid_map)
        layers: list[int] = []
        try:
            for path in order.layers:
                layers.append(copy_layer(pid, path, is_mapped=bool(order.maps_layers)))
            socket.send_fds(gate, [b"x"], layers)
        finally:
            for layer in layers:
                os.close(layer)


class Steps:
    """The operations of native/protocol.h, by number."""

    def __init__(self, agent: bytes) -> None:
        self.agent = agent
        self.trees: dict[int, int] = {}
        self.descriptors: list[int] = []
        self.known = {
            1: self.mount, 2: self.make_folder, 3: self.link, 4: self.write, 5: self.take_tree, 6: self.put_tree,
            7: self.keep, 8: self.pivot, 9: self.hostname, 10: self.networks, 11: self.limit, 12: self.filter,
            13: self.drop_powers, 14: self.identity, 15: self.join, 16: self.cores, 17: self.landlock, 18: self.unshare,
            19: self.leave, 20: self.unmount, 21: self.become_agent, 32: self.execute, 33: self.data, 34: self.guard,
        }  # fmt: skip

    def carry_out_all(self, order: Order) -> "tuple[int, int]":
        """How many were carried out, and what stopped that."""
        self.descriptors = order.descriptors
        for number, (code, data, a, b) in enumerate(order.operations()):
            step = self.known.get(code)
            if step is None:
                return number, ENOSYS
            try:
                step(data, a, b)
            except OSError as error:
                return number, error.errno or EINVAL
            except (LookupError, ValueError, struct.error):
                return number, EINVAL
        return order.num_steps, 0

    def mount(self, data: bytes, a: int, b: int) -> None:
        source, target, kind, options = data.split(b"\0")[:4]
        call(NUMBERS["mount"], source or None, target, kind or None, a, options or None)

    def make_folder(self, data: bytes, a: int, b: int) -> None:
        path = data[:-1]
        try:
            os.mkdir(path, a)
        except FileExistsError:
            if not b:
                raise
            if b > 1 and not is_folder(path, may_be_link=b == 2):
                os.unlink(path)  # noqa: PTH108
                os.mkdir(path, a)

    def link(self, data: bytes, a: int, b: int) -> None:
        target, path = data.split(b"\0")[:2]
        os.symlink(target, path)

    def write(self, data: bytes, a: int, b: int) -> None:
        path, _, content = data.partition(b"\0")
        flags = os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW if a else 0
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, a)
        try:
            if content:
                os.write(descriptor, content)
        finally:
            os.close(descriptor)

    def take_tree(self, data: bytes, a: int, b: int) -> None:
        flags = OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if b else 0)
        self.trees[a] = call(OPEN_TREE, AT_FDCWD, data[:-1], flags)

    def put_tree(self, data: bytes, a: int, b: int) -> None:
        tree = self.trees.pop(a)
        if b:
            attributes = struct.pack("=4Q", b, 0, 0, 0)
            call(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, attributes, len(attributes))
        call(MOVE_MOUNT, tree, b"", AT_FDCWD, data[:-1], MOVE_MOUNT_FROM_EMPTY_PATH)
        os.close(tree)

    def keep(self, data: bytes, a: int, b: int) -> None:
        kept = call(OPEN_TREE, AT_FDCWD, data[:-1], OPEN_TREE_CLONE | os.O_CLOEXEC)
        os.dup2(kept, LAYER)
        os.close(kept)

    def pivot(self, data: bytes, a: int, b: int) -> None:
        os.chdir(data[:-1])
        call(NUMBERS["pivot_root"], b".", b".")

    def leave(self, data: bytes, a: int, b: int) -> None:
        call(NUMBERS["umount2"], b".", DETACH)
        os.chdir("/")

    def unmount(self, data: bytes, a: int, b: int) -> None:
        call(NUMBERS["umount2"], data[:-1], DETACH)

    def hostname(self, data: bytes, a: int, b: int) -> None:
        socket.sethostname(data.decode())

    def networks(self, data: bytes, a: int, b: int) -> None:
        """None is kept ready: each sandbox makes its own."""

    def limit(self, data: bytes, a: int, b: int) -> None:
        hard = resource.getrlimit(a)[1]
        value = b if hard == resource.RLIM_INFINITY else min(b, hard)
        resource.setrlimit(a, (value, value))

    def filter(self, data: bytes, a: int, b: int) -> None:
        program = ctypes.create_string_buffer(data, len(data))
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        described = Program(len(data) // 8, ctypes.addressof(program))
        call(NUMBERS["seccomp"], 1, 0, ctypes.addressof(described))

    def drop_powers(self, data: bytes, a: int, b: int) -> None:
        capability = 0
        while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            capability += 1
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        call(NUMBERS["capset"], struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24))

    def identity(self, data: bytes, a: int, b: int) -> None:
        try:
            call(NUMBERS["setgroups"], 0, None)
        except PermissionError:  # denied where only one id is mapped
            pass
        call(NUMBERS["setresgid"], b, b, b)
        call(NUMBERS["setresuid"], a, a, a)

    def join(self, data: bytes, a: int, b: int) -> None:
        os.write(self.descriptors[a], b"0")

    def cores(self, data: bytes, a: int, b: int) -> None:
        call(NUMBERS["sched_setaffinity"], 0, len(data), data)

    def landlock(self, data: bytes, a: int, b: int) -> None:
        ruleset = call(LANDLOCK_CREATE_RULESET, data[:24], a, 0)
        position = 24
        while position < len(data):
            rights, size = struct.unpack_from("=QQ", data, position)
            path = data[position + 16 : position + 16 + size].split(b"\0")[0]
            position += 16 + size
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, parent), 0)
            os.close(parent)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        call(LANDLOCK_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)

    def unshare(self, data: bytes, a: int, b: int) -> None:
        call(NUMBERS["unshare"], a)

    def become_agent(self, data: bytes, a: int, b: int) -> None:
        self.prepare()
        problem: OSError | None = None
        for python in PYTHONS:
            try:
                os.execve(python, [python, "-I", "-S", "-c", self.agent.decode()], {})
            except OSError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def execute(self, data: bytes, a: int, b: int) -> None:
        os.dup2(self.descriptors[a], 2)
        self.prepare()
        words = data.split(b"\0")[:-1]
        os.execve(words[0], words, {b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})

    def prepare(self) -> None:
        """What the next program has of this one: the control socket, and signals as they are at first."""
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(self.descriptors[0], CONTROL)

    def data(self, data: bytes, a: int, b: int) -> None:
        content = os.memfd_create("data", 0)
        os.write(content, data)
        os.lseek(content, 0, os.SEEK_SET)
        os.dup2(content, a)
        os.close(content)

    def guard(self, data: bytes, a: int, b: int) -> None:
        """The child goes on with the plan; this process stays, and ends what the child leaves behind."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        awaited = {signal.SIGCHLD, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
        first = os.fork()
        if first == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
            return
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            os.closerange(0, 4096)
            while not has_ended(first) and signal.sigwait(awaited) != signal.SIGTERM:
                pass
            end_all(awaited)
        finally:
            os._exit(0)


def is_folder(path: bytes, *, may_be_link: bool) -> bool:
    """Whether a folder is there, or a link to one in the root's own file system."""
    try:
        there = os.lstat(path)
        if stat.S_ISLNK(there.st_mode):
            there = os.stat(path)  # noqa: PTH116
            may_be_link = may_be_link and there.st_dev == os.stat("/").st_dev  # noqa: PTH116
        else:
            may_be_link = True
    except OSError:
        return False
    return may_be_link and stat.S_ISDIR(there.st_mode)


def has_ended(first: int) -> bool:
    """Reap what is to be reaped; whether that was the first process, or nothing is left at all."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid in (0, first):
            return pid == first


def end_all(awaited: "set[signal.Signals]") -> None:
    """Until there are no children any more: whatever descends from this process becomes its child before it ends."""
    while True:
        known = {os.getpid(): 0}
        while found := {pid: parent for pid, parent in parents().items() if parent in known and pid not in known}:
            for pid, parent in found.items():
                signal_child(pid, parent, signal.SIGSTOP)
            known.update(found)
        now = parents()
        for pid in known:
            if now.get(pid, -1) in known:
                signal_child(pid, now[pid], signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        signal.sigtimedwait(awaited, 0.002)


def parents() -> "dict[int, int]":
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (parent := parent_of(int(name))) > 0:
            found[int(name)] = parent
    return found


def parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return -1
    return int(fields[1]) if fields and fields[0] not in (b"Z", b"X") else -1


def signal_child(pid: int, parent: int, number: int) -> None:
    """By a descriptor, and only if it still is who it was: another process may have its number meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if parent_of(pid) == parent:
            signal.pidfd_send_signal(pidfd, number)
    except OSError:
        pass
    finally:
        os.close(pidfd)


def copy_layer(pid: int, path: bytes, *, is_mapped: bool) -> int:
    """A copy of a layer, in which files of root belong to the root of a cell where there are ids for that."""
    if not path.startswith(b"/"):
        raise OSError(95, "layers of other sandboxes are kept by the spawner in C only")
    layer = call(OPEN_TREE, AT_FDCWD, path, OPEN_TREE_CLONE | os.O_CLOEXEC)
    if is_mapped:
        users = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            attributes = struct.pack("=4Q", MOUNT_ATTR_IDMAP, 0, 0, users)
            call(MOUNT_SETATTR, layer, b"", AT_EMPTY_PATH, attributes, len(attributes))
        except OSError:
            os.close(layer)
            raise
        finally:
            os.close(users)
    return layer


def bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = ctypes.create_string_buffer(struct.pack("=16sH22x", b"lo", UP_AND_RUNNING), 40)
        if libc.ioctl(any_socket.fileno(), ctypes.c_ulong(SIOCSIFFLAGS), request) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


def prctl(option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def write(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def main(control: int, agent: int) -> None:
    source = os.pread(agent, os.fstat(agent).st_size, 0)
    os.close(agent)
    control = move_up(control)
    devnull = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for reserved in (CONTROL, LAYER):  # keeps the places where a sandbox's agent looks
        if devnull != reserved:
            os.dup2(devnull, reserved, inheritable=False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; a pidfd still tells of the end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal they are meant for the node
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    os.umask(0)
    Spawner(socket.socket(fileno=control), source).serve()


def move_up(descriptor: int) -> int:
    """To a number that nothing else has a use for."""
    import fcntl  # only here

    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, LAYER + 8)
    os.close(descriptor)
    return int(moved)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
