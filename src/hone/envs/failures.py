"""Failures typed at the boundary where they happen: `failures_as` turns an exception into a `RolloutFailure`."""

import asyncio
import contextlib
import logging
import traceback
from collections.abc import AsyncIterator
from types import TracebackType

from hone.schema.traces import Failure, FailureClass

logger = logging.getLogger("hone.envs.failures")


class RolloutFailure(Exception):
    """Why a rollout has no valid reward; environment code raises it to name the class of a failure itself."""

    def __init__(self, kind: FailureClass, where: str, message: str) -> None:
        super().__init__(f"{kind}: {where}: {message}")
        self.failure = Failure(kind, where, sendable(message))


class failures_as:
    """Whatever the body raises becomes a `RolloutFailure` of this class; typed failures pass as they are.

    Example::

        with failures_as(FailureClass.JUDGE, "ask the judge"):
            verdict = await judge.ask(answer)

    Environment code that passes a deadline of its own (TimeoutError) is a failure of class timeout. SystemExit counts
    as any other error, because one environment may not end the process that runs many. So does a CancelledError that
    nobody asked for; a real cancellation passes.
    """

    __slots__ = ("_kind", "_where")

    def __init__(self, kind: FailureClass, where: str) -> None:
        self._kind = kind
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, RolloutFailure) or not _is_own_fault(error):
            return
        is_late = isinstance(error, TimeoutError) and self._kind is FailureClass.ENVIRONMENT
        failure_class = FailureClass.TIMEOUT if is_late else self._kind
        logger.debug("%s: %s", failure_class, self._where, exc_info=error)
        raise RolloutFailure(failure_class, self._where, describe(error)) from error


@contextlib.asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """Cancel the body after `seconds` and raise a `TimeoutError` that says how long it was given."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError:
        if timeout.expired():
            raise TimeoutError(f"took longer than {seconds:g} s") from None
        raise


def describe(error: BaseException) -> str:
    """The error's type and text and the line that raised it."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    last = frames[-1]
    return f"{text} ({last.filename.rpartition('/')[2]}:{last.lineno} in {last.name})"


def sendable(text: str) -> str:
    """Without what UTF-8 cannot carry, such as the bytes of a strange file name: a failure must reach its reader."""
    return text.encode("utf-8", "backslashreplace").decode()


def _is_own_fault(error: BaseException) -> bool:
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() == 0
    return isinstance(error, Exception | SystemExit)
