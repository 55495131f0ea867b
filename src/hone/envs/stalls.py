"""The event loop that all rollouts of a process share: how long it stands still, in which code, and how it goes on.

Three watchers, each for what the one before cannot see. A thread samples the stack of the loop's thread during a stall
and names the code. A signal interrupts code that stands still for too long, where the interpreter looks at signals:
in Python code, in `time.sleep`, in a regular expression; its rollout fails, the others go on. What is left, code in C
that answers to nothing, ends with the process, which is started again.
"""

import asyncio
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Self

from hone.envs.rollout import Underway, underway
from hone.schema.traces import Failure, FailureClass

logger = logging.getLogger("hone.envs.stalls")

TICK_SECONDS = 0.05
STANDARD_ERROR = 2
STALLED = 70
"""The exit code of a process whose loop stood still for too long."""
AGAIN_SECONDS = 1.0
"""Between two looks at a loop that is late: one that was stopped as a whole, and goes on, is not interrupted."""
GRACE_SECONDS = 5.0
"""So long after the first interruption the process is given up, from a thread where one can run..."""
DUMP_SECONDS = 5.0
"""...and so much later by the interpreter itself, where code that holds its lock stops all threads."""


class LoopStalled(TimeoutError):
    """Raised inside the code that kept the event loop from all other rollouts for too long."""


@dataclass(frozen=True, slots=True)
class Stall:
    """A stall of the loop. place: functions with file and line, outermost first; environment: whose rollout it was in."""

    seconds: float = 0.0
    place: str = ""
    environment: str = ""


class StallMeter:
    """Measures the stalls of the running event loop and names the code of those over `report_seconds`. Use as a context.

    deadline_seconds: a rollout whose code stands still for longer is interrupted and fails with class timeout (in the
    main thread; elsewhere there are no signals). If that does not help, the process ends. last_words: called then, in
    another thread, with the rollout that stands still and its failure.
    """

    def __init__(
        self,
        *,
        report_seconds: float = 0.5,
        deadline_seconds: float | None = None,
        last_words: Callable[[Underway, Failure], None] | None = None,
    ) -> None:
        self._report_seconds = report_seconds
        self._deadline_seconds = deadline_seconds
        self._last_words = last_words
        self._armed_at = 0.0
        self._alarmed_at = 0.0
        self._longest = Stall()
        self._named: tuple[float, Stall] = (0.0, Stall())
        self._closed = threading.Event()

    def take_longest(self) -> Stall:
        """The longest stall since the last call."""
        longest, self._longest = self._longest, Stall()
        return longest

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._has_signals = self._deadline_seconds is not None and threading.current_thread() is threading.main_thread()
        self._due = time.monotonic() + TICK_SECONDS
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        if self._has_signals:
            self._handler_before = signal.signal(signal.SIGALRM, self._interrupt)
        self._watcher = threading.Thread(target=self._watch, name="stalls", daemon=True)
        self._watcher.start()
        self._arm(time.monotonic())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._closed.set()
        if self._has_signals:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._handler_before)
        if self._deadline_seconds is not None:
            faulthandler.cancel_dump_traceback_later()
        self._watcher.join(timeout=2 * self._report_seconds)

    def _tick(self) -> None:
        now = time.monotonic()
        due, seconds = self._due, now - self._due
        if seconds > self._longest.seconds:
            named_due, named = self._named
            place, environment = (named.place, named.environment) if named_due == due else ("", "")
            self._longest = Stall(seconds, place, environment)
        self._due = now + TICK_SECONDS
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        if now - self._armed_at > self._report_seconds or seconds > self._report_seconds:
            self._arm(now)

    def _arm(self, now: float) -> None:
        """Begin the deadlines anew."""
        if self._deadline_seconds is None:
            return
        self._armed_at = now
        if self._has_signals:
            signal.setitimer(signal.ITIMER_REAL, self._deadline_seconds, AGAIN_SECONDS)
        # The interpreter's own alarm needs no lock; it starts a thread each time.
        last = self._deadline_seconds + AGAIN_SECONDS + GRACE_SECONDS + DUMP_SECONDS
        faulthandler.dump_traceback_later(last, exit=True, file=STANDARD_ERROR)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler: runs between two instructions of whatever stands still, in the context of its task."""
        assert self._deadline_seconds is not None, "no deadline, no signal"
        due, seconds = self._due, time.monotonic() - self._due
        found = underway.get()
        if seconds < self._deadline_seconds - 2 * TICK_SECONDS or found is None:
            return
        if self._alarmed_at != due:  # the first look
            self._alarmed_at = due
            return
        failure = failure_of(found, seconds, _place(frame))
        found.rollout.failure = failure  # holds even where the environment's code catches what is raised here
        raise LoopStalled(failure.message)

    def _watch(self) -> None:
        """In a thread of its own: name the code of a stall; end the process where nothing else has helped."""
        while not self._closed.wait(self._report_seconds / 2):
            due = self._due
            seconds = time.monotonic() - due
            if seconds > self._report_seconds and self._named[0] != due:
                stall = self._look(seconds)
                self._named = due, stall
                logger.warning(
                    "the event loop stands still for more than %g s in %s%s",
                    self._report_seconds,
                    f"environment {stall.environment!r}: " if stall.environment else "",
                    stall.place,
                )
            if self._deadline_seconds is not None:
                last = self._deadline_seconds + (AGAIN_SECONDS + GRACE_SECONDS if self._has_signals else 0.0)
                if seconds > last and self._due == due:
                    self._end(seconds)

    def _end(self, seconds: float) -> None:
        stall = self._look(seconds)
        logger.error("the event loop stands still for %.0f s in %s; ending the process", seconds, stall.place)
        found = _underway_of(sys._current_frames().get(self._loop_thread))
        try:
            if found is not None and self._last_words is not None:
                self._last_words(found, failure_of(found, seconds, stall.place))
        finally:
            os._exit(STALLED)

    def _look(self, seconds: float) -> Stall:
        frame = sys._current_frames().get(self._loop_thread)
        found = _underway_of(frame)
        return Stall(seconds, _place(frame), "" if found is None else found.environment)


def failure_of(found: Underway, seconds: float, place: str) -> Failure:
    """The failure of a rollout whose code kept the event loop."""
    return Failure(
        FailureClass.TIMEOUT,
        "event loop",
        f"environment {found.environment!r} kept the event loop of all rollouts for {seconds:.1f} s in {place};"
        " declare slow rewards with blocking=True, and await or move to a thread what is slow elsewhere",
    )


def _underway_of(frame: FrameType | None) -> Underway | None:
    """The rollout in whose context the loop runs what it runs now: its callback is a frame of the stack."""
    while frame is not None:
        if frame.f_code is asyncio.Handle._run.__code__:
            context = frame.f_locals["self"]._context
            return context.get(underway)  # type: ignore[no-any-return]
        frame = frame.f_back
    return None


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "a thread that has ended"
    calls = [call for call in traceback.extract_stack(frame) if "/asyncio/" not in call.filename]
    return " > ".join(f"{call.name} ({call.filename.rpartition('/')[2]}:{call.lineno})" for call in calls[-4:])
