"""The agent in Python, for machines without a C compiler: the first process of a sandbox, as native/agent.c.

It is a fresh interpreter that was exec'd inside: nothing of the node is in its memory. It trusts its control socket and
nothing else, and runs on the standard library of whatever Python 3 the sandbox has.
"""

# A path is bytes of a plan's here, and every module that is not imported is time and memory in every sandbox.
# ruff: noqa: PTH123, PTH208, SIM105

import array
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import termios

CONTROL, LAYER = 3, 4
REQUEST, REPORT = struct.Struct("=IIIIII"), struct.Struct("=IIiiQQQ")
START, SIGNAL, KILL_TREE = 1, 2, 3
READY, ENDED = 1, 3
TERMINAL, JOINS, APART = 1, 2, 4
MESSAGE_BYTES = 176 << 10
DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
PR_SET_DUMPABLE = 4
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
SCOPE_SIGNALS = struct.pack("=QQQ", 0, 0, 2)

libc = ctypes.CDLL(None, use_errno=True)


def receive(end: socket.socket, size: int) -> "tuple[bytes, list[int]]":
    """The next message and its descriptors, which no program inherits."""
    message, ancillary, _, _ = end.recvmsg(size, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % 4])
    return message, list(descriptors)


class Agent:
    """Starts programs with the descriptors it is given, reaps, and reports."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.pids: dict[int, int] = {}  # by identity

    def serve(self, woken: int, *, has_layer: bool) -> None:
        """Until the node hangs up."""
        descriptors = [os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        if has_layer:
            descriptors.append(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=LAYER))
        socket.send_fds(self.control, [REPORT.pack(READY, 0, 0, 0, 0, 0, 0)], [] if sys.argv[1:] else descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(woken, select.POLLIN)
        while True:
            happened = [descriptor for descriptor, _ in poll.poll()]
            if woken in happened:
                os.read(woken, 4096)
                self.reap()
            if self.control.fileno() in happened and not self.hear():
                return

    def hear(self) -> bool:
        """Obey one request; False at the end of them."""
        message, descriptors = receive(self.control, MESSAGE_BYTES)
        if len(message) < REQUEST.size:
            return False
        kind, identity, flags, num_arguments, _, _ = REQUEST.unpack_from(message)
        pid = self.pids.get(identity)
        if kind == START:
            parts = message[REQUEST.size :].split(b"\0")[:-1]
            self.start(identity, flags, parts[0], parts[1 : 1 + num_arguments], parts[1 + num_arguments :], descriptors)
        elif pid is not None and kind == SIGNAL:
            send(-pid, flags)
        elif pid is not None and kind == KILL_TREE:
            kill_tree(pid)
        return True

    def start(
        self,
        identity: int,
        flags: int,
        folder: bytes,
        arguments: "list[bytes]",
        variables: "list[bytes]",
        descriptors: "list[int]",
    ) -> None:
        try:
            pid = os.fork()
            if pid == 0:
                become(flags, folder, arguments, variables, descriptors)
            self.pids[identity] = pid
        except OSError as error:
            self.report(identity, 0, error.errno or 1)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for identity, known in list(self.pids.items()):
                if known == pid:
                    del self.pids[identity]
                    self.report(identity, status, 0, usage.ru_utime, usage.ru_stime, usage.ru_maxrss)

    def report(
        self, identity: int, status: int, error: int, user: float = 0.0, system: float = 0.0, peak: int = 0
    ) -> None:
        self.control.send(REPORT.pack(ENDED, identity, status, error, int(user * 1e6), int(system * 1e6), peak))


def become(
    flags: int, folder: bytes, arguments: "list[bytes]", variables: "list[bytes]", descriptors: "list[int]"
) -> None:
    """In the child: be the program; never returns."""
    try:
        settle(flags, descriptors)
        try:
            os.chdir(folder)
        except OSError:
            complain(folder, b": no such folder\n", 127)
        execute(arguments, dict(variable.partition(b"=")[::2] for variable in variables))
    finally:
        os._exit(126)


def settle(flags: int, descriptors: "list[int]") -> None:
    signal.set_wakeup_fd(-1)
    os.setsid()
    if flags & JOINS and len(descriptors) > 3:
        os.write(descriptors[3], b"0")
    if flags & APART:
        set_apart()
    for standard, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, standard)
    if flags & TERMINAL:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


def set_apart() -> None:
    """A Landlock domain within the agent's, out of which no signal gets."""
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, SCOPE_SIGNALS, ctypes.c_size_t(len(SCOPE_SIGNALS)), 0)
    if ruleset < 0 or libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) < 0:
        os._exit(126)
    os.close(ruleset)


def execute(arguments: "list[bytes]", variables: "dict[bytes, bytes]") -> None:
    """As execvpe, but saying what stood in the way as native/agent.c does."""
    name, problem = arguments[0], FileNotFoundError.__name__
    folders = variables.get(b"PATH", DEFAULT_PATH.encode()).split(b":") if b"/" not in name else [b""]
    for folder in filter(lambda one: one or b"/" in name, folders):
        try:
            os.execve(folder + b"/" + name if folder else name, arguments, variables)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            problem = type(error).__name__
        except OSError:
            complain(name, b": cannot be run\n", 126)
    if problem == PermissionError.__name__:
        complain(name, b": not a program that may be run\n", 126)
    complain(name, b": no such program\n", 127)


def complain(what: bytes, why: bytes, status: int) -> None:
    os.write(2, what + why)
    os._exit(status)


def kill_tree(top: int) -> None:
    """Stop everything below a program, or in its session, until nothing new appears; then kill it."""
    known: set[int] = set()
    while found := below(top, known) - known:
        for pid in found:
            send(pid, signal.SIGSTOP)
        known |= found
    for pid in known:
        send(pid, signal.SIGKILL)
    send(-top, signal.SIGKILL)  # where there is no /proc to look into


def below(top: int, known: "set[int]") -> "set[int]":
    entries = list(processes())
    found = known | {top}
    while new := {pid for pid, parent, session in entries if parent in found or session == top} - found:
        found |= new
    return found & {pid for pid, _, _ in entries}


def processes() -> "list[tuple[int, int, int]]":
    """Pid, parent and session of all but this one."""
    found = []
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields and fields[0] not in (b"Z", b"X"):
                found.append((int(name), int(fields[1]), int(fields[3])))
    return found


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass


def has_descriptor(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    except OSError:
        return False
    return True


def connect_to(path: str) -> None:
    """A control socket by its path, where it cannot be inherited."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.connect(path)
    if control.fileno() == CONTROL:
        control.detach()
    else:
        os.dup2(control.fileno(), CONTROL)


def main() -> None:
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.closerange(LAYER + 1, 4096)
    if sys.argv[1:]:
        connect_to(sys.argv[1])
    has_layer = has_descriptor(LAYER)  # before anything else has its place
    woken, waking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    has_descriptor(CONTROL)
    try:
        Agent(socket.socket(fileno=CONTROL)).serve(woken, has_layer=has_layer)
    except OSError:
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main()
