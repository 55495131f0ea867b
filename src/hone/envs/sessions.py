"""A persistent Python session in a sandbox: what one snippet defines, the next one finds."""

import asyncio

from hone.envs.failures import RolloutFailure, deadline
from hone.envs.guest_processes import MessageStream, guest_command
from hone.envs.sandboxes import Sandbox
from hone.schema.traces import FailureClass

START_SECONDS = 60.0
INTERRUPT_SECONDS = 2.0


class PythonSession:
    """Snippets of Python that run one after another in one process, which starts with the first.

    timeout_seconds: for each snippet.

    A snippet that is late is interrupted, and the session goes on; if it does not heed the interrupt, or ends its process,
    the session starts anew. The output says so. The session ends with its sandbox.
    """

    def __init__(self, sandbox: Sandbox, timeout_seconds: float = 30.0) -> None:
        self._sandbox = sandbox
        self._timeout_seconds = timeout_seconds
        self._stream: MessageStream | None = None
        self._turn = asyncio.Lock()

    async def run(self, code: str) -> str:
        """What a snippet prints, the value of its last line if that is an expression, and the traceback if it raises.

        Raises a `RolloutFailure` of class sandbox for trouble that is not the snippet's.
        """
        async with self._turn:
            try:
                return await self._run(code)
            except BaseException:  # a cancellation too: undo, then pass it on
                await self._drop()
                raise

    async def close(self) -> None:
        """End the process; the next snippet would begin a new session."""
        await self._drop()

    async def _run(self, code: str) -> str:
        if self._stream is None:
            self._stream = await self._start()
        stream = self._stream
        try:
            await stream.send(code.encode("utf-8", "surrogatepass"))
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    return _text(await stream.receive())
            except TimeoutError:
                return await self._interrupt(stream)
        except (BrokenPipeError, EOFError, ValueError):
            await self._sandbox.exec(["true"])  # or it is the sandbox that is gone
            await self._drop()
            return NEW_SESSION.format("The code ended the session's process")

    async def _interrupt(self, stream: MessageStream) -> str:
        stream.process.interrupt()
        try:
            async with asyncio.timeout(INTERRUPT_SECONDS):
                shown = _text(await stream.receive())
        except TimeoutError:
            await self._drop()
            return NEW_SESSION.format(f"Killed after {self._timeout_seconds:g} s")
        return f"{shown}[Interrupted after {self._timeout_seconds:g} s. The session goes on with all its variables.]"

    async def _start(self) -> MessageStream:
        stream = MessageStream(await self._sandbox.start(guest_command("session")))
        try:
            async with deadline(START_SECONDS):
                is_ready = await stream.receive() is not None
        except TimeoutError:
            is_ready = False
        if not is_ready:
            await stream.process.close()
            raise RolloutFailure(FailureClass.SANDBOX, "python session", "Python does not start")
        return stream

    async def _drop(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.process.close()


NEW_SESSION = "[{}. The next call begins a new session; all variables are gone.]"


def _text(message: bytes | None) -> str:
    if message is None:
        raise EOFError
    return message.decode(errors="replace")
