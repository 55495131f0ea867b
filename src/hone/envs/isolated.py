"""The process in which isolated functions run: takes calls from a socket, one after the other, until it is closed.

`hone.envs.isolation` starts it as `python -m hone.envs.isolated DESCRIPTOR`.
"""

import functools
import importlib
import importlib.util
import inspect
import operator
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hone.envs.failures import RolloutFailure, describe
from hone.envs.isolation import HEADER, Place, Request

ORPHAN_SECONDS = 5.0
"""So long after the deadline the kernel ends this process, should the one that would kill it be gone."""


def main(descriptor: int) -> None:
    """Serve the calls that come through the socket at `descriptor`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rb") as requests:
        while header := requests.read(HEADER.size):
            request: Request = pickle.loads(requests.read(HEADER.unpack(header)[0]))
            _serve(request, channel)


def _serve(request: Request, channel: socket.socket) -> None:
    try:
        function = _function_at(request.place)
    except BaseException as error:  # a module may raise anything while it is imported
        _send(channel, "error", f"{request.place.name} of {request.place.module} cannot be imported: {describe(error)}")
        return
    _send(channel, "begun", None)
    _set_timers(request.real_seconds + ORPHAN_SECONDS, request.cpu_seconds or 0.0)
    outcome, value = _outcome(function, request.arguments)
    _set_timers(0.0, 0.0)
    _send(channel, outcome, value)


def _outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any]:
    try:
        value = function(**arguments)
        pickle.dumps(value)
    except RolloutFailure as error:
        return "failure", (error.failure.kind, error.failure.where, error.failure.message)
    except TimeoutError as error:
        return "timeout", describe(error)
    except BaseException as error:  # told to the caller, who sorts it
        return "error", describe(error)
    return "value", value


@functools.cache
def _function_at(place: Place) -> Callable[..., Any]:
    found = operator.attrgetter(place.name)(_module(place))
    function: Callable[..., Any] = inspect.unwrap(found)  # a declared reward is its function
    return function


def _module(place: Place) -> ModuleType:
    try:
        return importlib.import_module(place.module)
    except ModuleNotFoundError as error:
        # A module that was loaded from its file, as scripts and tests are.
        if place.path is None or error.name is None or not f"{place.module}.".startswith(f"{error.name}."):
            raise
    spec = importlib.util.spec_from_file_location(place.module, place.path)
    assert spec is not None, f"{place.path} is Python source"
    assert spec.loader is not None, f"{place.path} is Python source"
    module = sys.modules[place.module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _set_timers(real_seconds: float, cpu_seconds: float) -> None:
    """Timers of the kernel, which end the process also where no Python code runs any more; 0 stops them."""
    for timer, number, seconds in (
        (signal.ITIMER_REAL, signal.SIGALRM, real_seconds),
        (signal.ITIMER_PROF, signal.SIGPROF, cpu_seconds),
    ):
        signal.signal(number, signal.SIG_DFL)
        signal.setitimer(timer, seconds)


def _limit_memory() -> None:
    """Half of the machine's memory: a function that wants more gets a MemoryError before others are killed for it."""
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (half if hard == resource.RLIM_INFINITY else min(half, hard), hard))


def _send(channel: socket.socket, outcome: str, value: Any) -> None:
    data = pickle.dumps((outcome, value))
    channel.sendall(HEADER.pack(len(data)) + data)


if __name__ == "__main__":
    main(int(sys.argv[1]))
