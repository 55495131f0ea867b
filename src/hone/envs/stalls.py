"""How long the event loop stands still, and in which code: environments share one loop, and one may block all."""

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from types import FrameType, TracebackType
from typing import Self

logger = logging.getLogger("hone.envs.stalls")

TICK_SECONDS = 0.05
STANDARD_ERROR = 2
STALLED = 70
"""The exit code of a process whose loop stood still for too long."""
DUMP_SECONDS = 5.0
"""So long after the deadline the interpreter ends the process itself, where code that holds its lock stops all threads."""


class StallMeter:
    """Measures the longest stall of the running event loop; a stall over `report_seconds` is logged with its place.

    A stall over `deadline_seconds` ends the process: nothing else stops code that never comes back.
    """

    def __init__(self, *, report_seconds: float = 1.0, deadline_seconds: float | None = None) -> None:
        self._report_seconds = report_seconds
        self._deadline_seconds = deadline_seconds
        self._armed_at = 0.0
        self._longest = 0.0
        self._closed = threading.Event()

    def take_longest(self) -> float:
        """Seconds of the longest stall since the last call."""
        longest, self._longest = self._longest, 0.0
        return longest

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._due = time.monotonic() + TICK_SECONDS
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        self._watcher = threading.Thread(target=self._watch, name="stalls", daemon=True)
        self._watcher.start()
        self._arm(time.monotonic())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._closed.set()
        if self._deadline_seconds is not None:
            faulthandler.cancel_dump_traceback_later()
        self._watcher.join(timeout=2 * self._report_seconds)

    def _tick(self) -> None:
        now = time.monotonic()
        self._longest = max(self._longest, now - self._due)
        self._due = now + TICK_SECONDS
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        if now - self._armed_at > self._report_seconds:
            self._arm(now)

    def _arm(self, now: float) -> None:
        """Begin the deadline anew. The interpreter's own alarm needs no lock; it starts a thread each time."""
        if self._deadline_seconds is not None:
            self._armed_at = now
            faulthandler.dump_traceback_later(self._deadline_seconds + DUMP_SECONDS, exit=True, file=STANDARD_ERROR)

    def _watch(self) -> None:
        """In a thread of its own: once per stall, say where the loop's thread is; end the process at the deadline."""
        reported = 0.0
        while not self._closed.wait(self._report_seconds / 2):
            due = self._due
            seconds = time.monotonic() - due
            if self._deadline_seconds is not None and seconds > self._deadline_seconds:
                logger.error("the event loop stands still for %.0f s in %s; ending the process", seconds, self._where())
                os._exit(STALLED)
            if due != reported and seconds > self._report_seconds:
                reported = due
                logger.warning(
                    "the event loop stands still for more than %g s in %s", self._report_seconds, self._where()
                )

    def _where(self) -> str:
        return _place(sys._current_frames().get(self._loop_thread))


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "a thread that has ended"
    calls = [call for call in traceback.extract_stack(frame) if "/asyncio/" not in call.filename]
    return " > ".join(f"{call.name} ({call.filename.rpartition('/')[2]}:{call.lineno})" for call in calls[-4:])
