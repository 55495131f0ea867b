"""Where the programs of environments run, by name; trouble of nodes becomes a failure of the rollout here, and only here."""

import asyncio
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from hone.envs.failures import RolloutFailure, failures_as
from hone.envs.local_processes import LocalProcesses
from hone.envs.rollout import underway
from hone.envs.sandboxes import Process, Sandbox, SandboxProvider
from hone.schema.sandboxes import MAX_ROLLOUT, ExecResult, PythonResult, SandboxSpec, Usage
from hone.schema.traces import FailureClass

if TYPE_CHECKING:
    from hone.sandbox import client


HERE = "here"
"""The default: cells of this process where this machine can have them, otherwise processes, with a warning."""
SILENCE = "import os; os.dup2(os.open(os.devnull, os.O_WRONLY), 2)\n"
PROBE = SandboxSpec(memory_mb=64, disk_mb=4, max_processes=16)

logger = logging.getLogger("hone.envs.providers")


def sandboxes_at(where: str, token: str = "") -> SandboxProvider:
    """A provider by name: "here", "cells" of this process, "processes", or the address of a node or a gateway.

    "here" is cells where this machine can have them, and otherwise processes, with a warning of what that loses.
    token: for an address; by default that of the environment variable HONE_SANDBOX_TOKEN.

    Example::

        SandboxToolUse(..., sandboxes=sandboxes_at("tls://gateway:7300", token))
    """
    if where == HERE:
        return SandboxesHere()
    if where == "processes":
        return LocalProcesses()
    if where == "cells" or where.startswith(("unix:", "tcp:", "tls:")):
        return NodeSandboxes(None if where == "cells" else where, token or None)
    raise ValueError(f"no sandboxes at {where!r}; say here, cells, processes, unix:/path, tcp:// or tls://host:port")


def provider_of(sandboxes: SandboxProvider | str) -> SandboxProvider:
    """The provider itself, or the one of a name or an address (`sandboxes_at`)."""
    return sandboxes_at(sandboxes) if isinstance(sandboxes, str) else sandboxes


class SandboxesHere:
    """A `SandboxProvider` of this machine: cells, or processes where cells cannot be had. The first creation decides."""

    def __init__(self) -> None:
        self._deciding = asyncio.Lock()
        self._chosen: SandboxProvider | None = None

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """A sandbox that is ready; raises a `RolloutFailure` of class sandbox."""
        if self._chosen is None:
            async with self._deciding:
                self._chosen = self._chosen or await _best_here()
        return await self._chosen.create(spec)


async def _best_here() -> SandboxProvider:
    """Only a machine that cannot have cells is given less: what else goes wrong with one is a failure."""
    from hone.sandbox.client import Outcome, SandboxError  # `import hone.envs` stays light

    cells = NodeSandboxes()
    try:
        await (await cells.create(PROBE)).close()
    except RolloutFailure as failure:
        cause = failure.__cause__
        if not isinstance(cause, SandboxError) or cause.outcome is not Outcome.POLICY_DENIED:
            raise
        logger.warning(
            "programs run as processes of this user, which is no boundary against hostile code, because this machine"
            " cannot have cells (%s); `hone sandbox doctor` says more, and sandboxes='processes' accepts it",
            cause,
        )
        return LocalProcesses()
    return cells


class NodeSandboxes:
    """A `SandboxProvider` on a node: the one inside this process, or the one at `address`."""

    def __init__(self, address: str | None = None, token: str | None = None) -> None:
        self._address = address
        self._token = token

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """A sandbox that is ready; raises a `RolloutFailure` of class sandbox."""
        from hone.sandbox import client  # `import hone.envs` stays light

        spec = msgspec.structs.replace(spec, rollout=spec.rollout or _rollout_name())
        sandbox = client.Sandbox(spec=spec, node=self._address, token=self._token)
        with failures_as(FailureClass.SANDBOX, "create sandbox"), _Boundary("create sandbox"):
            try:
                await sandbox.open()
                await sandbox.ready()
            except BaseException:  # a cancellation too: undo, then pass it on
                await sandbox.close()
                raise
        return ProvidedSandbox(sandbox)


class ProvidedSandbox:
    """A `Sandbox` of `NodeSandboxes`."""

    def __init__(self, inner: "client.Sandbox") -> None:
        self._inner = inner

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
        """As `Sandbox.exec`. Where earlier programs brought the sandbox to its end, theirs is the outcome of later ones."""
        from hone.sandbox.client import SandboxError  # `import hone.envs` stays light

        with _Boundary("exec"):
            try:
                return await self._inner.exec(
                    argv, stdin=stdin, env=env, cwd=cwd, timeout_seconds=timeout_seconds, kept_bytes=kept_bytes
                )
            except SandboxError as error:
                if error.outcome.is_infra:
                    raise
                return ExecResult(error.outcome, -signal.SIGKILL, "", f"{error}\n", Usage(0.0, 0.0, 0))

    async def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = ".") -> Process:
        """As `Sandbox.start`."""
        silent = ["sh", "-c", 'exec "$@" 2>/dev/null', "sh", *argv]  # its stderr goes nowhere
        with _Boundary("start"):
            return NodeProcess(await self._inner.spawn(silent, env=env, cwd=cwd))

    async def start_python(self, code: str) -> Process:
        """As `Sandbox.start_python`, in a fork of a warm interpreter."""
        with _Boundary("start"):
            return NodeProcess(await self._inner.spawn_python(SILENCE + code))

    async def python(self, code: str, *, timeout_seconds: float = 60.0) -> PythonResult:
        """As `Sandbox.python`, in a fork of a warm interpreter."""
        with _Boundary("python"):
            return await self._inner.python(code, timeout_seconds=timeout_seconds)

    async def read(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """As `Sandbox.read`."""
        from hone.sandbox.client import LimitExceeded  # `import hone.envs` stays light

        with _Boundary("read"):
            try:
                return await self._inner.read(path, max_bytes=max_bytes)
            except LimitExceeded as error:
                raise ValueError(f"{error}; read it with a larger max_bytes") from error

    async def write(self, path: str, data: bytes) -> None:
        """As `Sandbox.write`; a link at the path is replaced."""
        with _Boundary("write"):
            await self._inner.write(path, data)

    async def list(self, path: str = ".") -> tuple[str, ...]:
        """As `Sandbox.list`."""
        with _Boundary("list"):
            entries = await self._inner.list(path)
        return tuple(sorted(f"{entry.name}/" if entry.kind == "folder" else entry.name for entry in entries))

    async def close(self) -> None:
        """As `Sandbox.close`."""
        with _Boundary("close"):
            await self._inner.close()


class NodeProcess:
    """A `Process` of a `ProvidedSandbox`."""

    def __init__(self, inner: "client.Process") -> None:
        self._inner = inner

    async def write(self, data: bytes) -> None:
        """As `Process.write`."""
        with _Boundary("write"):
            await self._inner.write(data)

    async def read(self) -> bytes:
        """As `Process.read`."""
        with _Boundary("read"):
            return await self._inner.read()

    def interrupt(self) -> None:
        """As `Process.interrupt`."""
        with _Boundary("interrupt"):
            self._inner.interrupt()

    def kill(self) -> None:
        """As `Process.kill`."""
        with _Boundary("kill"):
            self._inner.kill()

    async def close(self) -> None:
        """As `Process.close`."""
        with _Boundary("close"):
            await self._inner.close()


class _Boundary:
    """Trouble of the infrastructure is a failure of the rollout; errors of files and of the caller are what they are.

    What is spent in here is the rollout's time with sandboxes.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._entered = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if (found := underway.get()) is not None:
            found.rollout.sandbox_seconds += time.perf_counter() - self._entered
        if error is None:
            return
        from hone.sandbox.client import SandboxError  # `import hone.envs` stays light

        if isinstance(error, SandboxError):
            raise RolloutFailure(FailureClass.SANDBOX, self._where, f"{error} ({error.outcome})") from error


def _rollout_name() -> str:
    """The rollout under way, as sandboxes tell whose they are; empty outside of one."""
    found = underway.get()
    return "" if found is None else f"{found.group or found.environment}/{found.rollout.attempt}"[-MAX_ROLLOUT:]
