"""A warm Python in a cell: forks itself for every snippet, session and fork of a session, as the node asks for them.

The process that listens never runs what it is sent. Requests and reports are those of the agent (native/protocol.h).
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import ctypes
import gc
import linecache
import os
import pathlib
import select
import signal
import socket
import struct
import sys
import traceback
from types import ModuleType

REQUEST = struct.Struct("=IIIIII")
REPORT = struct.Struct("=IIiiQQQ")
START, SIGNAL, KILL_TREE = 1, 2, 3
READY, ENDED = 1, 3
MESSAGE_BYTES = 176 << 10
MAX_MESSAGE_BYTES = 64 << 20
KEPT_BYTES = 64 << 10
SESSION, SNIPPET, FORK = "session", "snippet", "fork"
FINE, RAISED = b"o", b"e"
KNOWN = b"known"  # what a fork of a session hears before it says that it is there
LINE = 3  # where a session finds its socket to the process that forked it

OWN_FILE = sys._getframe().f_code.co_filename  # as tracebacks name it; there is no __file__ behind -c
SET_DUMPABLE = 4
CLONE_PARENT = 0x8000
CLONE = {"x86_64": 56, "aarch64": 220}[os.uname().machine]

libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: a clone must not lose it


class Start:
    """A request to start something, with its descriptors: stdin, stdout and stderr."""

    def __init__(
        self, identity: int, folder: str, arguments: list[str], variables: dict[str, str], fds: list[int]
    ) -> None:
        self.identity = identity
        self.folder = folder
        self.arguments = arguments
        self.variables = variables
        self.stdio = fds


def parse(message: bytes, descriptors: list[int]) -> Start:
    """Read a START request."""
    _, identity, _, num_arguments, num_variables, _ = REQUEST.unpack_from(message)
    parts = message[REQUEST.size :].decode(errors="surrogateescape").split("\0")[:-1]
    variables = dict(part.partition("=")[::2] for part in parts[1 + num_arguments : 1 + num_arguments + num_variables])
    return Start(identity, parts[0], parts[1 : 1 + num_arguments], variables, descriptors)


def fork(*, as_sibling: bool = False) -> int:
    """os.fork, maybe with this process's parent as the parent."""
    flags = CLONE_PARENT if as_sibling else 0
    ctypes.pythonapi.PyOS_BeforeFork()
    pid: int = libc.syscall(CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number))
    return pid


class Server:
    """Listens to the node, forks, reaps and reports."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.pids: dict[int, int] = {}  # by identity
        self.sessions: dict[int, socket.socket] = {}  # by identity: who can be asked to fork
        self.woken, self.waking = socket.socketpair()

    def serve(self) -> None:
        """Until the node hangs up; in a child, returns nothing and ends the process."""
        for end in (self.woken, self.waking):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self.waking.fileno(), warn_on_full_buffer=False)
        self.control.send(REPORT.pack(READY, 0, 0, 0, 0, 0, 0))
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.woken, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self.woken.fileno():
                    self.woken.recv(4096)
                    self.reap()
                elif not self.hear():
                    return

    def hear(self) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self.control, MESSAGE_BYTES, 8)
        if not message:
            return False
        kind, identity, flags, *_ = REQUEST.unpack_from(message)
        pid = self.pids.get(identity)
        if kind == START:
            self.start(parse(message, descriptors))
        elif kind == SIGNAL and pid is not None:
            signal_group(pid, flags)
        elif kind == KILL_TREE and pid is not None:
            kill_session(pid)
        return True

    def start(self, start: Start) -> None:
        try:
            if start.arguments[0] == FORK:
                pid = self.fork_session(start)
            else:
                pid = self.fork_self(start)
            self.pids[start.identity] = pid
        except OSError as error:
            self.report(start.identity, 0, error.errno or 1)
        finally:
            for descriptor in start.stdio:
                os.close(descriptor)

    def fork_self(self, start: Start) -> int:
        ours = theirs = None
        if start.arguments[0] == SESSION:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = fork()
        if pid == 0:
            self.become(start, theirs)
        if ours is not None and theirs is not None:
            theirs.close()
            ours.settimeout(10)
            self.sessions[start.identity] = ours
        return pid

    def become(self, start: Start, line: socket.socket | None) -> None:
        """In the child: be the snippet or the session; never returns."""
        try:
            descriptor = settle(start, line)
            if line is not None:
                Session(descriptor).serve()
            else:
                run_program(start.arguments[1])
        except BaseException:  # a child ends here, whatever it met
            traceback.print_exc()
        finally:
            os._exit(1)

    def fork_session(self, start: Start) -> int:
        """Ask an idle session to fork itself; it answers with the pid, as we see it, of our new child."""
        line = self.sessions.get(int(start.arguments[1]))
        if line is None:
            raise ProcessLookupError(3, "there is no such session")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(line, [b"fork"], [theirs.fileno(), *start.stdio])
        pid: int
        pid, number = struct.unpack("=ii", line.recv(8))
        if pid <= 0:
            ours.close()
            raise OSError(number, os.strerror(number))
        ours.settimeout(10)
        self.sessions[start.identity] = ours
        ours.send(KNOWN)
        return pid

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
                    if (line := self.sessions.pop(identity, None)) is not None:
                        line.close()
                    self.report(identity, status, 0, usage.ru_utime, usage.ru_stime, usage.ru_maxrss)

    def report(self, identity: int, status: int, error: int, user: float = 0, system: float = 0, peak: int = 0) -> None:
        self.control.send(REPORT.pack(ENDED, identity, status, error, int(user * 1e6), int(system * 1e6), peak))


def settle(start: Start, line: socket.socket | None) -> int:
    """In the child: take the streams, folder and variables; hold nothing of the server's. Returns where `line` is."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.default_int_handler)
    os.setsid()
    for standard, descriptor in enumerate(start.stdio):
        os.dup2(descriptor, standard)
    kept = -1
    if line is not None:
        kept = os.dup2(line.detach(), LINE, inheritable=False)
    os.closerange(LINE + 1 if kept >= 0 else LINE, 4096)
    libc.prctl(SET_DUMPABLE, 1, 0, 0, 0)
    os.environ.clear()
    os.environ.update(start.variables)
    try:
        os.chdir(start.folder)
    except OSError as error:
        os.write(2, f"{start.folder}: {error.strerror}\n".encode())
        os._exit(127)
    set_up()
    add_paths()
    reseed()
    return kept


def set_up() -> None:
    """What `python -c` finds, whatever its variables."""
    sys.path.insert(0, "")
    sys.argv = ["-c"]


def add_paths() -> None:
    """Where it looks for modules by its variables."""
    if paths := os.environ.get("PYTHONPATH"):
        sys.path[1:1] = filter(None, paths.split(os.pathsep))


def begin(message: bytes, is_session: bool, known_variables: bytes) -> None:
    """In a process of native/warm.c that has its streams and folder: be the snippet or the session; never returns."""
    try:
        num_arguments = REQUEST.unpack_from(message)[3]
        parts = message[REQUEST.size :].split(b"\0", num_arguments + 1)
        if parts[-1] != known_variables:
            os.environ.clear()
            os.environ.update(parse(message, []).variables)
            add_paths()
        reseed()
        if is_session:
            Session(LINE).serve()
        else:
            run_program(parts[2].decode(errors="surrogateescape"))
    except BaseException:  # a child ends here, whatever it met
        traceback.print_exc()
    finally:
        os._exit(1)


def reseed() -> None:
    """What draws numbers must not draw those of its siblings; `random` sees to itself."""
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()


def new_main() -> ModuleType:
    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    return module


def run_program(code: str) -> None:
    """As `python -c` does; ends the process."""
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), new_main().__dict__)
    except SystemExit as stop:
        status = exit_status(stop)
    except KeyboardInterrupt:
        show_error(sys.exc_info()[1])
        flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:  # a program may raise anything; it is shown as an interpreter does
        show_error(error)
        status = 1
    try:
        if (threading := sys.modules.get("threading")) is not None:
            threading._shutdown()  # waits for the program's threads, as an interpreter does
        atexit._run_exitfuncs()
    finally:
        flush()
        os._exit(status)


def exit_status(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def show_error(error: BaseException | None) -> None:
    """The traceback, without the frames of this module, to stderr."""
    assert error is not None
    shown = traceback.TracebackException.from_exception(error)
    shown.stack = traceback.StackSummary.from_list([frame for frame in shown.stack if frame.filename != OWN_FILE])
    print("".join(shown.format()), end="", file=sys.stderr)


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 - of all that a snippet passes through, what runs least Python copies the fewest pages
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass


class Session:
    """Snippets in one namespace. They come behind four bytes of length on stdin, and what they showed goes to stdout.

    What is printed, by children too, goes into a file in memory, so that no reader has to keep up with it.
    """

    def __init__(self, line: int) -> None:
        self.line = socket.socket(fileno=line)
        self.module = new_main()
        self.num_snippets = 0
        self.take_streams()

    def take_streams(self) -> None:
        self.source, self.sink = (os.dup(standard) for standard in (0, 1))
        self.printed = os.memfd_create("printed")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        for standard in (1, 2):
            os.dup2(self.printed, standard)

    def serve(self) -> None:
        """Answer each snippet. An interrupt ends the snippet, never the session."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.send(FINE)
        while True:
            ready, _, _ = select.select([self.source, self.line.fileno()], [], [])
            if self.line.fileno() in ready:
                self.hear()
            elif self.source in ready:
                code = self.receive()
                if code is None:
                    flush()
                    os._exit(0)
                self.answer(code)

    def answer(self, code: str) -> None:
        if os.fstat(self.printed).st_size:
            os.ftruncate(self.printed, 0)
            os.lseek(self.printed, 0, os.SEEK_SET)
        is_fine = self.run(code)
        self.send((FINE if is_fine else RAISED) + self.shown())

    def send(self, message: bytes) -> None:
        write_all(self.sink, len(message).to_bytes(4, "big") + message)

    def run(self, code: str) -> bool:
        self.num_snippets += 1
        name = f"<snippet {self.num_snippets}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                self.execute(code, name)
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                flush()
        except BaseException as error:  # SystemExit and KeyboardInterrupt end the snippet only
            show_error(error)
            flush()
            return False
        return True

    def execute(self, code: str, name: str) -> None:
        """Run the snippet; show the value of its last line, if that is an expression."""
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), self.module.__dict__)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), self.module.__dict__)
            if value is not None:
                self.module.__dict__["_"] = value
                print(repr(value))

    def shown(self) -> bytes:
        size = os.fstat(self.printed).st_size
        if size <= KEPT_BYTES:
            return os.pread(self.printed, size, 0)
        head = os.pread(self.printed, KEPT_BYTES // 2, 0)
        tail = os.pread(self.printed, KEPT_BYTES // 2, size - KEPT_BYTES // 2)
        return head + f"\n[... {size - KEPT_BYTES} bytes left out ...]\n".encode() + tail

    def receive(self) -> str | None:
        head = read_exactly(self.source, 4)
        if head is None:
            return None
        body = read_exactly(self.source, min(int.from_bytes(head, "big"), MAX_MESSAGE_BYTES))
        return None if body is None else body.decode("utf-8", "surrogatepass")

    def hear(self) -> None:
        """Fork: the child goes on with everything this session has in memory, on the streams that came along."""
        message, descriptors, _, _ = socket.recv_fds(self.line, 16, 8)
        if not message:
            os._exit(0)
        line, *streams = descriptors
        try:
            pid, number = fork(as_sibling=True), 0
        except OSError as error:
            pid, number = -1, error.errno or 1
        if pid == 0:
            self.move(line, streams)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        self.line.send(struct.pack("=ii", pid, number))

    def move(self, line: int, streams: list[int]) -> None:
        os.setsid()
        self.line.close()
        self.line = socket.socket(fileno=line)
        for descriptor in (self.source, self.sink, self.printed):
            os.close(descriptor)
        for standard, descriptor in enumerate(streams):
            os.dup2(descriptor, standard)
        for descriptor in streams:
            os.close(descriptor)
        self.take_streams()
        reseed()
        if self.line.recv(16) != KNOWN:  # the session that forked this one ended before it could tell of it
            os._exit(1)
        self.send(FINE)


def read_exactly(descriptor: int, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        piece = os.read(descriptor, size - len(data))
        if not piece:
            return None
        data += piece
    return data


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def kill_session(top: int) -> None:
    """Kill what is in the session of a process; all of it is stopped first, so that nothing new appears meanwhile."""
    members = {top}  # it may not have begun its session yet
    send(top, signal.SIGSTOP)
    while found := {pid for pid, session in sessions() if session == top} - members:
        for pid in found:
            send(pid, signal.SIGSTOP)
        members |= found
    for pid in members:
        send(pid, signal.SIGKILL)


def sessions() -> list[tuple[int, int]]:
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                found.append((int(folder.name), int(fields[3])))
    return found


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main(control: socket.socket) -> None:
    """Serve on a socket until the node hangs up."""
    gc.freeze()  # what the collector would write to is shared with the children
    Server(control).serve()
    os._exit(0)


def serve_alone() -> None:
    """Be a session that nobody asks to fork, until its end of stdin."""
    sys.path.insert(0, "")
    ours, _theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    Session(ours.detach()).serve()


if __name__ == "__main__":
    inherited = socket.socket(fileno=os.dup(0))
    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull, stream)
    libc.prctl(SET_DUMPABLE, 0, 0, 0, 0)
    main(inherited)
