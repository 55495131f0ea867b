"""The guardians of local sandboxes: each starts its programs behind limits, kills whole trees, dies with its owner.

    python -I -S guardian.py    (stdin: a SOCK_SEQPACKET socket)

The process that is started so is the *spawner*: for every message with a descriptor, which is the end of another such
socket, it forks a guardian, which talks over that socket in marshalled dicts. It ends when its socket does.

Owner to guardian: first the options; then {"start": id, argv, env, cwd} with the descriptors of stdin, stdout and
stderr, {"signal": id, kill} (else an interrupt). Guardian to owner: first {"protections", pid}; then
{"ended": id, status, cpu_seconds, peak_memory_bytes} (status None: nobody knows, the keeper was killed) and
{"over": reason}. When the owner shuts the socket or the lease ends, everything in the sandbox dies, and only then the
guardian's end is closed.

Three kinds of processes: the guardian; one *keeper* per program, which adopts whatever the program leaves behind; the
programs. With namespaces the guardian is process 1 of the sandbox and a keeper process 1 of its program, so that the
kernel kills the tree below; without them both are subreapers and walk the tree. The guardian trusts its owner and
nothing that runs below a keeper.
"""

from __future__ import annotations

# What the modules signal and socket are made of: those take longer to import than all the rest.
import _signal as signal  # type: ignore[import-not-found]
import ctypes
import marshal
import os
import resource
import select
import sys
import time
from _socket import AF_UNIX, CMSG_SPACE, SOCK_SEQPACKET
from _socket import socket as Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MESSAGE_BYTES = 1 << 18

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
PR_CAPBSET_DROP = 24
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
LANDLOCK_READ, LANDLOCK_WRITE_FILE = 0b1101, 0b10  # execute, read file, read directory; write
LANDLOCK_TRUNCATE = 1 << 14
LANDLOCK_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # by ABI; 16 from 5 on
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix", "/proc", "/sys", "/dev")
SYSTEM_FILES = (
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/mime.types"),
    *("/etc/localtime", "/etc/timezone", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"),
    *("/etc/hosts", "/etc/resolv.conf", "/run/systemd/resolve", "/etc/ssl"),
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/shm")

libc = ctypes.CDLL(None, use_errno=True)


class suppress:
    def __init__(self, *kinds: type[BaseException]) -> None:
        self.kinds = kinds

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, self.kinds)


def main() -> None:
    """Fork a guardian for every request."""
    os.setsid()
    os.closerange(1, 4096)
    requests = Socket(AF_UNIX, SOCK_SEQPACKET, 0, 0)
    nothing = [os.open(os.devnull, os.O_RDWR) for _ in (1, 2)]
    are_granted = are_namespaces_granted()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for guardians
    while True:
        data, ancillary, _, _ = requests.recvmsg(1, CMSG_SPACE(4))
        if not data:
            os._exit(0)
        control = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
        with suppress(OSError):  # no room for a process: the owner sees the end of the socket
            if not os.fork():
                os.dup2(nothing[0], 0)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                guard(Socket(AF_UNIX, SOCK_SEQPACKET, 0, control), are_granted)
        os.close(control)


def are_namespaces_granted() -> bool:
    """Whether a guardian can enter namespaces and make more; tried out in a process that ends, for there is no way back.

    Some systems let everybody enter a user namespace and refuse what makes it useful.
    """
    child = os.fork()
    if not child:
        with suppress(OSError):
            if enter_namespaces("none"):
                inner = os.fork()
                if not inner:
                    os._exit(1 if libc.unshare(CLONE_NEWPID) else 0)
                os._exit(os.waitpid(inner, 0)[1] != 0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def guard(control: Socket, are_granted: bool) -> None:
    """Be the guardian of one sandbox. Never returns."""
    has_namespaces = False
    options: dict[str, Any] = {}
    try:
        options = marshal.loads(control.recv(MESSAGE_BYTES))
        pid = os.getpid()
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        with suppress(OSError):
            os.sched_setaffinity(0, options["cores"])
        has_namespaces = are_granted and options["namespaces"] and enter_namespaces(options["network"])
        if has_namespaces:
            inner = os.fork()
            if inner:
                os.waitpid(inner, 0)  # returns when process 1 and with it everything in the sandbox is gone
                remove(options["folder"])
                os._exit(0)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        else:
            libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        landlock = options["landlock"] and landlock_version() > 0
        control.send(marshal.dumps({"protections": {"namespaces": has_namespaces, "files": landlock}, "pid": pid}))
        reason = Guardian(control, options, has_namespaces, landlock).serve()
        control.send(marshal.dumps({"over": reason}))
    except (OSError, EOFError):
        pass  # the owner is gone
    finally:
        if not has_namespaces:  # else the kernel kills them, and /proc, which is the host's, shows other numbers
            kill_descendants()
            remove(options.get("folder", ""))
        os._exit(0)


class Guardian:
    def __init__(self, control: Socket, options: dict[str, Any], has_namespaces: bool, landlock: bool) -> None:
        self.control = control
        self.options = options
        self.has_namespaces = has_namespaces
        self.landlock = landlock
        self.own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC) if has_namespaces else -1
        self.keepers: dict[int, int] = {}  # program's id -> keeper's pid
        self.reports: dict[int, int] = {}  # read end of a keeper's report -> program's id
        self.poll = select.poll()
        self.poll.register(control.fileno(), select.POLLIN)

    def serve(self) -> str:
        ends = time.monotonic() + self.options["ttl_seconds"]
        while (left := ends - time.monotonic()) > 0:
            for descriptor, _ in self.poll.poll(min(left, 3600.0) * 1000 + 1):
                if descriptor != self.control.fileno():
                    self.report(descriptor)
                elif not self.obey():
                    return "its owner closed it"
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        return f"its lease of {self.options['ttl_seconds']:g} s is over"

    def obey(self) -> bool:
        data, ancillary, _, _ = self.control.recvmsg(MESSAGE_BYTES, CMSG_SPACE(3 * 4))
        if not data:
            return False
        request: dict[str, Any] = marshal.loads(data)
        if "start" in request:
            raw = ancillary[0][2]
            self.start(request, [int.from_bytes(raw[i : i + 4], sys.byteorder) for i in range(0, 12, 4)])
        elif (keeper := self.keepers.get(request["signal"])) is not None:
            os.kill(keeper, signal.SIGTERM if request["kill"] else signal.SIGINT)
        return True

    def start(self, request: dict[str, Any], stdio: list[int]) -> None:
        report, written = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # until the keeper can obey them
        if self.has_namespaces:
            libc.unshare(CLONE_NEWPID)
        keeper = os.fork()
        if not keeper:
            self.control.close()
            keep(request, stdio, written, self.options, self.has_namespaces, self.landlock)
        if self.has_namespaces:
            libc.setns(self.own_namespace, CLONE_NEWPID)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        for descriptor in (*stdio, written):
            os.close(descriptor)
        self.keepers[request["start"]] = keeper
        self.reports[report] = request["start"]
        self.poll.register(report, select.POLLIN)

    def report(self, descriptor: int) -> None:
        """Pass on how a program ended. What it left behind lives on below its keeper."""
        data = os.read(descriptor, 4096)
        program = self.reports.pop(descriptor)
        self.poll.unregister(descriptor)
        os.close(descriptor)
        del self.keepers[program]
        ending = marshal.loads(data) if data else {"status": None, "cpu_seconds": 0.0, "peak_memory_bytes": 0}
        self.control.send(marshal.dumps({"ended": program, **ending}))


def keep(
    request: dict[str, Any],
    stdio: list[int],
    report: int,
    options: dict[str, Any],
    has_namespaces: bool,
    landlock: bool,
) -> None:
    """Run one program; report how it ends; stay for what it leaves behind. Never returns."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not has_namespaces:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    program = os.fork()
    if not program:
        run(request, stdio, options, has_namespaces, landlock)
    for descriptor in stdio:
        os.close(descriptor)

    is_killed = False

    def kill(number: int, frame: object) -> None:
        nonlocal is_killed
        is_killed = True
        if has_namespaces:
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            kill_descendants()

    def interrupt(number: int, frame: object) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(program, signal.SIGINT)

    signal.signal(signal.SIGTERM, kill)
    signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    ending: dict[str, Any] | None = None
    cpu_seconds, peak_memory_bytes = 0.0, 0
    while True:
        try:
            child, status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            if ending is not None:
                os.write(report, marshal.dumps(ending))
            os._exit(0)
        cpu_seconds += usage.ru_utime + usage.ru_stime
        peak_memory_bytes = max(peak_memory_bytes, usage.ru_maxrss * 1024)
        if child == program:
            ending = {"status": status, "cpu_seconds": cpu_seconds, "peak_memory_bytes": peak_memory_bytes}
            if not is_killed:  # otherwise the end is when all that it started is dead
                os.write(report, marshal.dumps(ending))
                os.close(report)
                ending = None


def run(
    request: dict[str, Any], stdio: list[int], options: dict[str, Any], has_namespaces: bool, landlock: bool
) -> None:
    """Become the program. Never returns."""
    try:
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores these two, and exec hands that on
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        for descriptor, target in zip(stdio, (0, 1, 2), strict=True):
            os.dup2(descriptor, target)
        os.closerange(3, 1024)
        for capability in range(64):  # or root would keep its powers where there are no namespaces
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.chdir(request["cwd"])
        if landlock:
            confine(options, has_namespaces)
        limit(options, has_namespaces)
        os.execvpe(request["argv"][0], request["argv"], request["env"])
    except (OSError, ValueError) as error:
        os.write(2, f"{request['argv'][0]}: {error}\n".encode())
    finally:
        os._exit(127)


def limit(options: dict[str, Any], has_namespaces: bool) -> None:
    limits = {
        resource.RLIMIT_AS: options["memory_bytes"],
        resource.RLIMIT_FSIZE: options["disk_bytes"],
        resource.RLIMIT_CPU: options["cpu_seconds"],
        resource.RLIMIT_NOFILE: 1024,
        resource.RLIMIT_CORE: 0,
    }
    if has_namespaces:  # outside of a user namespace the limit would count all processes of this user
        limits[resource.RLIMIT_NPROC] = options["max_processes"]
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def enter_namespaces(network: str) -> bool:
    """New user, process and IPC namespaces, and a network of its own unless it is the host's. False: not allowed."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWIPC | (0 if network == "host" else CLONE_NEWNET)
    if libc.unshare(flags):
        return False
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self would not be ours to write
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid or 1000} {uid} 1"),
        ("gid_map", f"{gid or 1000} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - pathlib takes 5 ms to import
            file.write(text)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if network != "host":
        bring_loopback_up()
    return True


def bring_loopback_up() -> None:
    import fcntl  # needed for a network of its own only

    interface = Socket()
    request = b"lo".ljust(16, b"\0") + (0x1 | 0x40).to_bytes(2, sys.byteorder)  # up, running
    with suppress(OSError):
        fcntl.ioctl(interface.fileno(), 0x8914, request.ljust(40, b"\0"))  # SIOCSIFFLAGS
    interface.close()


def landlock_version() -> int:
    return int(libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def confine(options: dict[str, Any], has_namespaces: bool) -> None:
    """Let this process see the system's programs and its own folder only, and signal nobody outside.

    It also keeps it from the memory and the environment of every process outside, its keeper and guardian among them.
    """
    version = landlock_version()
    everything = (1 << LANDLOCK_FS_BITS.get(version, 16)) - 1
    is_exposed = options["network"] == "none" and not has_namespaces
    network = 0b11 if version >= 4 and is_exposed else 0  # no TCP; there is no better without namespaces
    scopes = 0b11 if version >= 6 else 0
    attributes = (ctypes.c_uint64 * 3)(everything, network, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "the kernel refused a landlock ruleset")
    for path in (*SYSTEM_FOLDERS, *SYSTEM_FILES, *options["readable"]):
        allow(ruleset, path, LANDLOCK_READ)
    for path in DEVICES:
        allow(ruleset, path, everything if path == "/dev/shm" else 0b1110 & everything)
    allow(ruleset, options["folder"], everything)
    if libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "the kernel refused to apply a landlock ruleset")
    os.close(ruleset)


def allow(ruleset: int, path: str, access: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):  # noqa: PTH112 - pathlib takes 5 ms to import
        access &= 0b111 | LANDLOCK_TRUNCATE
    rule = access.to_bytes(8, sys.byteorder) + beneath.to_bytes(4, sys.byteorder)
    libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, ctypes.c_char_p(rule), 0)
    os.close(beneath)


def kill_descendants() -> None:
    """Kill every process below this one, also those that keep forking, by walking the tree until it is empty."""
    own = os.getpid()
    while True:
        parents = process_parents()
        below = [pid for pid in parents if pid != own and is_below(pid, own, parents)]
        if not below:
            return
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in below:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)


def remove(folder: str) -> None:
    """Remove a folder with all that is in it, whatever its programs did to the permissions."""
    with suppress(OSError):
        os.chmod(folder, 0o700)  # noqa: PTH101 - pathlib takes 5 ms to import
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    remove(entry.path)
                else:
                    os.unlink(entry.path)  # noqa: PTH108
        os.rmdir(folder)  # noqa: PTH106


def process_parents() -> dict[int, int]:
    """The parent of every process that is not a zombie."""
    parents = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib takes 5 ms to import
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat") as file:  # noqa: PTH123
                state, parent = file.read().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(name)] = int(parent)
    return parents


def is_below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == root:
            return True
    return False


if __name__ == "__main__":
    main()
