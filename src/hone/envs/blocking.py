"""Blocking code under a deadline: in a daemon thread, a bounded number at once, abandoned when it is late."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from hone.envs.failures import deadline

MAX_RUNNING = 2 * (os.cpu_count() or 1)

_free: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def call_blocking(function: Callable[..., Any], arguments: Mapping[str, Any], deadline_seconds: float) -> Any:
    """What `function(**arguments)` returns or raises; `TimeoutError` when it runs longer than the deadline.

    A late thread cannot be stopped: it goes on without anybody waiting for it, and its place is given to the next. The
    deadline counts from when the function starts, not while it waits for a place.
    """
    loop = asyncio.get_running_loop()
    async with _free.setdefault(loop, asyncio.Semaphore(MAX_RUNNING)):
        outcome = in_thread(lambda: function(**arguments))
        async with deadline(deadline_seconds):
            value, error = await outcome
    if error is not None:
        raise error
    return value


Outcome = tuple[Any, BaseException | None]


def in_thread(work: Callable[[], Any]) -> asyncio.Future[Outcome]:
    """Begin `work` in a daemon thread of its own; the future tells what it returned, or else what it raised."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Outcome] = loop.create_future()
    threading.Thread(target=_run, args=(loop, outcome, work), daemon=True).start()
    return outcome


def _run(loop: asyncio.AbstractEventLoop, outcome: asyncio.Future[Outcome], work: Callable[[], Any]) -> None:
    try:
        result: Outcome = (work(), None)
    except BaseException as error:  # carried to the caller, who sorts it
        result = (None, error)
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_settle, outcome, result)


def _settle(outcome: asyncio.Future[Outcome], result: Outcome) -> None:
    if not outcome.done():
        outcome.set_result(result)
