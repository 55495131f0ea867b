"""Functions run in processes of their own: nothing that they do, not even a hang in C, reaches the event loop.

A few processes live long and take one call after the other. One that is late is killed, one that died is replaced.
`hone.envs.isolated` is what runs in them.
"""

import asyncio
import atexit
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from hone.envs.blocking import in_thread
from hone.envs.failures import RolloutFailure

MAX_PROCESSES = min(8, os.cpu_count() or 1)
LOAD_SECONDS = 120.0
"""A process has this long to start and to import the function's module, before the deadline of the call begins."""

HEADER = struct.Struct("<Q")


class IsolatedError(Exception):
    """The function raised; the text says what and where."""


class ProcessDied(Exception):
    """The process ended while the function ran. exit_code: as of `subprocess`, so -9 for signal 9."""

    def __init__(self, exit_code: int) -> None:
        reason = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
        super().__init__(f"its process ended with {reason}")
        self.exit_code = exit_code

    @property
    def used_up_cpu(self) -> bool:
        """Whether it had used its CPU time."""
        return self.exit_code == -signal.SIGPROF

    @property
    def was_killed(self) -> bool:
        """Whether somebody else ended it: a person, or a machine that is out of memory."""
        return self.exit_code in (-signal.SIGKILL, -signal.SIGTERM)


class Place(NamedTuple):
    """Where another process finds a function: its module, its name there, and the module's file."""

    module: str
    name: str
    path: str | None = None


class Request(NamedTuple):
    """One call as it is sent. real_seconds: the process ends itself then, should nobody be left to kill it."""

    place: Place
    arguments: dict[str, Any]
    real_seconds: float
    cpu_seconds: float | None


def place_of(function: Callable[..., Any]) -> Place:
    """Where other processes find this function; `ValueError` if they cannot."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name:
        raise ValueError(f"{function!r} has no name under which another process could import it; write a function")
    if "<" in name or module == "__main__":
        raise ValueError(f"{name} of {module} cannot be imported by another process; define it at the top of a module")
    return Place(module, name, getattr(sys.modules.get(module), "__file__", None))


async def call_isolated(
    function: Callable[..., Any] | Place,
    arguments: Mapping[str, Any],
    deadline_seconds: float,
    *,
    cpu_seconds: float | None = None,
) -> Any:
    """What `function(**arguments)` returns in another process; arguments and result are pickled.

    A function whose module shall not be imported here is given by its place.

    Raises `IsolatedError` for what the function raised (a `RolloutFailure` and a `TimeoutError` come as such),
    `TimeoutError` when the deadline passes, and `ProcessDied` when its process ends. cpu_seconds: the process is ended
    when it has worked for so long, whether or not others slow the machine down.
    """
    place = function if isinstance(function, Place) else place_of(function)
    async with _free.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(MAX_PROCESSES)):
        call = _Call(Request(place, dict(arguments), deadline_seconds, cpu_seconds))
        outcome = in_thread(call.run)
        try:
            value, error = await outcome
        finally:
            call.abandon()
    if error is not None:
        raise error
    return value


_free: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
_idle: list["_Process"] = []


class _Call:
    """One call, carried out in a thread. Abandoning it ends its process, if it is still under way."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._process: _Process | None = None
        self._is_abandoned = False

    def run(self) -> Any:
        message = _packed(self._request)
        process = self._process = self._started(message)
        try:
            outcome, value = process.receive(time.monotonic() + self._request.real_seconds)
        except EOFError:
            raise ProcessDied(process.exit_code()) from None
        except TimeoutError:
            process.end()
            raise TimeoutError(f"took longer than {self._request.real_seconds:g} s") from None
        self._process = None
        _idle.append(process)
        return _unpacked(outcome, value)

    def abandon(self) -> None:
        self._is_abandoned = True
        if self._process is not None:
            self._process.kill()

    def _started(self, message: bytes) -> "_Process":
        """A process that has begun with the call. One that died in its sleep is nobody's fault: take another."""
        while True:
            process, is_new = _take()
            self._process = process
            if self._is_abandoned:
                process.kill()
            try:
                process.send(message, time.monotonic() + LOAD_SECONDS)
                outcome, value = process.receive(time.monotonic() + LOAD_SECONDS)
            except TimeoutError:
                process.end()
                raise TimeoutError(f"{self._request.place.module} was not imported within {LOAD_SECONDS:g} s") from None
            except (EOFError, OSError):
                exit_code = process.exit_code()
                if is_new or self._is_abandoned:
                    raise ProcessDied(exit_code) from None
                continue
            if outcome == "begun":
                return process
            self._process = None
            _idle.append(process)
            _unpacked(outcome, value)


@dataclass(frozen=True, slots=True)
class _Process:
    popen: "subprocess.Popen[bytes]"
    socket: socket.socket

    @classmethod
    def start(cls) -> "_Process":
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "hone.envs.isolated", str(theirs.fileno())]
            # What is importable here is importable there, however it came to be.
            paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=_STANDARD_ERROR,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": paths},
            )
        atexit.unregister(_end_idle)
        atexit.register(_end_idle)
        return cls(popen, ours)

    def send(self, message: bytes, until: float) -> None:
        self.socket.settimeout(max(0.001, until - time.monotonic()))
        self.socket.sendall(message)

    def receive(self, until: float) -> tuple[str, Any]:
        """The next message; `EOFError` when the process is gone, `TimeoutError` when it does not come in time."""
        message: tuple[str, Any] = pickle.loads(self._read(HEADER.unpack(self._read(HEADER.size, until))[0], until))
        return message

    def _read(self, num_bytes: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            self.socket.settimeout(max(0.001, until - time.monotonic()))
            try:
                piece = self.socket.recv(min(num_bytes - len(data), 1 << 20))
            except ConnectionError:
                piece = b""
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def kill(self) -> None:
        self.popen.kill()

    def end(self) -> None:
        """Kill the process and wait until it is gone."""
        self.kill()
        self.exit_code()

    def exit_code(self) -> int:
        """How a process ended that has closed its end of the socket."""
        self.socket.close()
        try:
            return self.popen.wait(_FAREWELL_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.popen.wait()


_STANDARD_ERROR = 2
_FAREWELL_SECONDS = 1.0


def _take() -> tuple[_Process, bool]:
    """A process that waits for work, or a new one."""
    while True:
        try:
            process = _idle.pop()
        except IndexError:
            return _Process.start(), True
        if process.popen.poll() is None:
            return process, False
        process.socket.close()


def _packed(request: Request) -> bytes:
    try:
        data = pickle.dumps(request)
    except Exception as error:  # classes decide themselves how they refuse
        raise TypeError(f"the arguments of {request.place.name} cannot be sent to another process: {error}") from error
    return HEADER.pack(len(data)) + data


def _unpacked(outcome: str, value: Any) -> Any:
    if outcome == "failure":
        raise RolloutFailure(*value)
    if outcome == "timeout":
        raise TimeoutError(value)
    if outcome == "error":
        raise IsolatedError(value)
    return value


def _end_idle() -> None:
    while _idle:
        _idle.pop().end()
