"""Programs that fetch and build images, in threads of their own, and that all end when nobody wants their images any more."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence

from hone.sandbox.errors import ImageError

_own = threading.local()


class Children:
    """The programs that the threads run that have adopted it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_over = False

    def adopt(self) -> None:
        """Whatever this thread runs from now on is one of these."""
        _own.children = self

    def end(self) -> None:
        """Kill all of them, with what they started, and let no more begin."""
        with self._lock:
            self._is_over = True
            for one in self._running:
                _kill(one)

    @contextlib.contextmanager
    def begun(self, command: Sequence[str], env: Mapping[str, str] | None) -> "Iterator[subprocess.Popen[str]]":
        """One more, until it is left."""
        with self._lock:
            if self._is_over:
                raise ImageError(f"{command[0]} is not run any more: the node was stopped")
            child = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                process_group=0,
            )
            self._running.add(child)
        try:
            with child:
                yield child
        finally:
            with self._lock:
                self._running.discard(child)


def run(
    command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, with nothing to read. Late, it is killed with all that it started: `subprocess.TimeoutExpired`."""
    children: Children = getattr(_own, "children", None) or Children()
    with children.begun(command, env) as child:
        try:
            stdout, stderr = child.communicate(timeout=seconds)
        except BaseException:  # an interrupt too: no child outlives its caller
            _kill(child)
            raise
    return subprocess.CompletedProcess(list(command), child.returncode, stdout, stderr)


def _kill(child: "subprocess.Popen[str]") -> None:
    if child.poll() is None:  # until it is waited for, its number is its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
