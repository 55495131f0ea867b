"""The process that forks the guardians of local sandboxes."""

import contextlib
import os
import signal
import socket
import sys
import weakref
from pathlib import Path

GUARDIAN = Path(__file__).parent / "guests" / "guardian.py"


class Spawner:
    """The process that forks guardians, and that ends with this object or with this process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(GUARDIAN)],
                {},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)],
            )
        self._socket = ours.detach()
        weakref.finalize(self, _stop, os.getpid(), self.pid, self._socket)

    def spawn(self, control: socket.socket) -> None:
        """Fork a guardian; `OSError` when the process is gone."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, control.fileno().to_bytes(4, sys.byteorder))]
        ours = socket.socket(fileno=self._socket)
        try:
            ours.sendmsg([b"+"], rights)
        finally:
            ours.detach()


def _stop(owner: int, pid: int, ours: int) -> None:
    if os.getpid() == owner:  # and no fork of it
        with contextlib.suppress(OSError):
            os.close(ours)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
