"""A zygote: a Python of the node that has imported what cells shall find imported, and forks itself into them.

It runs nothing that comes from a cell. Its children enter the cell's namespaces, give up everything the cell's own processes
gave up, in the same steps, and wait there for what is to be run; all of that is native/warm.c, which comes back here in
a process that is to run something. Until then nothing in the cell can look into it: it is not dumpable.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import os
import signal
import socket
import sys

_folder = os.path.dirname(__file__)  # noqa: PTH120 - pathlib would be half a megabyte in every cell
_specification = importlib.util.spec_from_file_location("warm", f"{_folder}/warm.py")
assert _specification is not None
assert _specification.loader is not None
warm = importlib.util.module_from_spec(_specification)
sys.modules["warm"] = warm
_specification.loader.exec_module(warm)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36


class Program(ctypes.Structure):
    """Of native/warm.c."""

    _fields_ = (("message", ctypes.c_void_p), ("size", ctypes.c_int64), ("is_session", ctypes.c_int32))


def main(control: socket.socket, library: str, modules: list[str]) -> None:
    """Import, and serve until the node hangs up; in a process that is to run something, do that."""
    for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_DUMPABLE, 0), (PR_SET_CHILD_SUBREAPER, 1)):
        if warm.libc.prctl(option, int(value), 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl {option}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also below a node that ignores it
    for module in modules:
        importlib.import_module(module)
    serve = ctypes.PyDLL(library).serve  # keeps the interpreter's lock: its forks must not lose it
    program = Program()
    variables = b"".join(key + b"=" + value + b"\0" for key, value in os.environb.items())
    warm.set_up()
    gc.freeze()  # what the collector would write to is shared with the children
    after_fork = ctypes.pythonapi.PyOS_AfterFork_Child  # looked up once for all
    ctypes.pythonapi.PyOS_BeforeFork()
    control.send(b"ready")
    if serve(control.fileno(), ctypes.byref(program)):
        after_fork()
        warm.begin(ctypes.string_at(program.message, program.size), bool(program.is_session), variables)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3:])
