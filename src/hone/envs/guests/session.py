"""A Python session: runs one snippet after another in the same namespace, and says what each printed or raised."""

from __future__ import annotations

import ast
import linecache
import os
import signal
import sys
import traceback
from types import ModuleType

from hone.envs.guests.channel import Channel

KEPT_BYTES = 64 << 10
FINE, RAISED = b"o", b"e"


class Session:
    """The namespace of the snippets, and the file that takes what they and their children print."""

    def __init__(self) -> None:
        self.module = ModuleType("__main__")
        self.module.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = self.module
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - a text is wanted; modules that were written into the sandbox
        self.printed = os.memfd_create("printed")
        for standard in (1, 2):
            os.dup2(self.printed, standard)
        self.num_snippets = 0

    def serve(self, channel: Channel) -> None:
        """Answer each snippet with what it showed. An interrupt ends the snippet, never the session."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        channel.send(b"")
        while True:
            code = channel.receive().decode("utf-8", "surrogatepass")
            os.ftruncate(self.printed, 0)
            os.lseek(self.printed, 0, os.SEEK_SET)
            is_fine = self.run(code)
            channel.send((FINE if is_fine else RAISED) + self.shown())

    def run(self, code: str) -> bool:
        """Whether it raised nothing."""
        self.num_snippets += 1
        name = f"<snippet {self.num_snippets}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                self.execute(code, name)
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                sys.stdout.flush()
        except BaseException as error:  # SystemExit and KeyboardInterrupt end the snippet only
            own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != "<string>"]
            lines = traceback.TracebackException.from_exception(error)
            lines.stack = traceback.StackSummary.from_list(own)
            print("".join(lines.format()), end="", file=sys.stderr, flush=True)
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


if __name__ == "__main__":
    start = Channel()
    Session().serve(start)
