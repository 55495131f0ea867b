"""Where untrusted programs run: the protocols of a sandbox and its provider, and one whose creation hides itself."""

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from hone.envs.failures import RolloutFailure, deadline, failures_as
from hone.schema.sandboxes import ExecResult, PythonResult, SandboxSpec
from hone.schema.traces import FailureClass


class Process(Protocol):
    """A program under way in a sandbox, with its streams. It dies with the sandbox."""

    async def write(self, data: bytes) -> None:
        """Give it input; returns when the program's pipe has taken all of it. `BrokenPipeError` if nobody reads."""

    async def read(self) -> bytes:
        """The next piece of its stdout; empty at the end."""

    def interrupt(self) -> None:
        """Send SIGINT to its process group."""

    def kill(self) -> None:
        """Kill it and all that it started."""

    async def close(self) -> None:
        """Kill it and let go of its streams."""


class Sandbox(Protocol):
    """An isolated machine for one rollout.

    Paths are relative to its working folder, which is where programs start. Infrastructure trouble, and any use after
    the end of the lease, is a `RolloutFailure` of class sandbox; what a program does wrong is a result.
    """

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        timeout_seconds: float = 60.0,
        kept_bytes: int = 64 << 10,
    ) -> ExecResult:
        """Run a program to its end. At the timeout it is killed with all that it started.

        kept_bytes: of each of stdout and stderr, half of it from the beginning and half from the end.
        Background processes of a program that ended by itself live on until the sandbox is closed.
        """

    async def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = ".") -> Process:
        """Start a program to talk with over its stdin and stdout; its stderr goes nowhere."""

    async def start_python(self, code: str) -> Process:
        """Start what `python -I -c CODE` would, or a fork of a warm interpreter that does the same. As `start`."""

    async def python(self, code: str, *, timeout_seconds: float = 60.0) -> PythonResult:
        """Run a snippet in the sandbox's Python session, which begins with the first one and keeps its variables.

        One that is late is interrupted, and the session goes on. If it does not heed that, or ends its process, the next
        one begins a new session.
        """

    async def read(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """A regular file's content; `OSError` when there is none, `ValueError` when it is longer than `max_bytes`."""

    async def write(self, path: str, data: bytes) -> None:
        """Write a file, with the folders above it. A link at the path is replaced or refused (`OSError`), never followed."""

    async def list(self, path: str = ".") -> tuple[str, ...]:
        """The names in a folder, sorted, those of folders with a slash at the end; `OSError` when there is none."""

    async def close(self) -> None:
        """Kill everything in it and remove its files. Harmless when repeated."""


class SandboxProvider(Protocol):
    """Makes sandboxes: a local runtime, or the client of a service."""

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """A sandbox that is ready. Whoever gets it closes it; a cancelled creation leaves nothing behind."""


class LazySandbox:
    """A sandbox whose creation starts at once and is awaited at the first call, so that the first turn hides it.

    Example::

        async def setup(self, rollout):
            rollout.state = LazySandbox(self.sandboxes, SandboxSpec(memory_mb=1024))

        async def teardown(self, rollout):
            await rollout.state.close()

    A creation that fails, or takes longer than `create_seconds`, is a `RolloutFailure` of class sandbox at every call.
    """

    def __init__(
        self, provider: SandboxProvider, spec: SandboxSpec = SandboxSpec(), create_seconds: float = 60.0
    ) -> None:
        self._creation = asyncio.create_task(_create(provider, spec, create_seconds))
        self._is_closed = False

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        timeout_seconds: float = 60.0,
        kept_bytes: int = 64 << 10,
    ) -> ExecResult:
        """As `Sandbox.exec`."""
        sandbox = await self._ready()
        return await sandbox.exec(
            argv, stdin=stdin, env=env, cwd=cwd, timeout_seconds=timeout_seconds, kept_bytes=kept_bytes
        )

    async def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = ".") -> Process:
        """As `Sandbox.start`."""
        return await (await self._ready()).start(argv, env=env, cwd=cwd)

    async def start_python(self, code: str) -> Process:
        """As `Sandbox.start_python`."""
        return await (await self._ready()).start_python(code)

    async def python(self, code: str, *, timeout_seconds: float = 60.0) -> PythonResult:
        """As `Sandbox.python`."""
        return await (await self._ready()).python(code, timeout_seconds=timeout_seconds)

    async def read(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """As `Sandbox.read`."""
        return await (await self._ready()).read(path, max_bytes=max_bytes)

    async def write(self, path: str, data: bytes) -> None:
        """As `Sandbox.write`."""
        await (await self._ready()).write(path, data)

    async def list(self, path: str = ".") -> tuple[str, ...]:
        """As `Sandbox.list`."""
        return await (await self._ready()).list(path)

    async def close(self) -> None:
        """Give up a creation under way, close what was created. Never raises for a creation that failed."""
        self._is_closed = True
        if not self._creation.done():
            self._creation.cancel()
            await asyncio.wait([self._creation])
        if not self._creation.cancelled() and self._creation.exception() is None:
            await self._creation.result().close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ready(self) -> Sandbox:
        if self._is_closed:
            raise RolloutFailure(FailureClass.SANDBOX, "sandbox", "it is closed")
        try:
            return await asyncio.shield(self._creation)
        except asyncio.CancelledError:
            if self._is_closed:
                raise RolloutFailure(FailureClass.SANDBOX, "sandbox", "it was closed") from None
            raise
        except RolloutFailure as error:  # a new one for each caller: tracebacks would pile up on one
            raise RolloutFailure(error.failure.kind, error.failure.where, error.failure.message) from error


async def _create(provider: SandboxProvider, spec: SandboxSpec, create_seconds: float) -> Sandbox:
    with failures_as(FailureClass.SANDBOX, "create sandbox"):
        async with deadline(create_seconds):
            return await provider.create(spec)
