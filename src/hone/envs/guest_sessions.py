"""A Python session as a guest of a sandbox: what one snippet defines, the next one finds."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from hone.envs.failures import RolloutFailure, deadline
from hone.envs.guest_processes import MessageStream
from hone.envs.sandboxes import Process
from hone.schema.sandboxes import ExecResult, PythonResult
from hone.schema.traces import FailureClass

START_SECONDS = 60.0
INTERRUPT_SECONDS = 2.0
FINE = b"o"


class Host(Protocol):
    """What a sandbox must be able to do for a session in it."""

    async def exec(self, argv: Sequence[str]) -> ExecResult:
        """Run a program to its end."""

    async def start_python(self, code: str) -> Process:
        """Start a program to talk with."""


class GuestSession:
    """Snippets of Python that run one after another in one process, which starts with the first.

    A provider whose sandboxes have no Python session of their own makes `Sandbox.python` with it.
    """

    def __init__(self, sandbox: Host) -> None:
        self._sandbox = sandbox
        self._stream: MessageStream | None = None
        self._turn = asyncio.Lock()

    async def run(self, code: str, timeout_seconds: float) -> PythonResult:
        """As `Sandbox.python`. Raises a `RolloutFailure` of class sandbox for trouble that is not the snippet's."""
        async with self._turn:
            try:
                return await self._run(code, timeout_seconds)
            except BaseException:  # a cancellation too: undo, then pass it on
                await self.close()
                raise

    async def close(self) -> None:
        """End the process; the next snippet would begin a new session."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.process.close()

    async def _run(self, code: str, timeout_seconds: float) -> PythonResult:
        if self._stream is None:
            self._stream = await self._start()
        stream, is_late = self._stream, False
        try:
            await stream.send(code.encode("utf-8", "surrogatepass"))
            try:
                async with asyncio.timeout(timeout_seconds):
                    answer = await stream.receive()
            except TimeoutError:
                is_late = True
                stream.process.interrupt()
                async with asyncio.timeout(INTERRUPT_SECONDS):
                    answer = await stream.receive()
        except (TimeoutError, BrokenPipeError, ValueError):
            answer = None
        if answer is None:
            await self._sandbox.exec(["true"])  # or it is the sandbox that is gone
            await self.close()
            return PythonResult("", is_success=False, is_late=is_late, is_over=True)
        return PythonResult(answer[1:].decode(errors="replace"), is_success=answer[:1] == FINE, is_late=is_late)

    async def _start(self) -> MessageStream:
        from hone.sandbox.client import session_program  # `import hone.envs` stays light

        stream = MessageStream(await self._sandbox.start_python(session_program()))
        try:
            async with deadline(START_SECONDS):
                is_ready = await stream.receive() is not None
        except TimeoutError:
            is_ready = False
        if not is_ready:
            await stream.process.close()
            raise RolloutFailure(FailureClass.SANDBOX, "python session", "Python does not start")
        return stream
