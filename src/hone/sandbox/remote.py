"""A node behind an address and its sandboxes, as its clients have them: one method for each call."""

from collections.abc import Mapping, Sequence

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.link import Link
from hone.sandbox.remote_process import RemoteProcess
from hone.schema import sandbox_calls as calls
from hone.schema.sandbox_network import NetworkRecord
from hone.schema.sandboxes import ExecResult, FileEntry, Outcome, PythonResult, SandboxSpec, SandboxStatus, SandboxUsage


class RemoteNode(Link):
    """A node behind an address, and the session with it."""

    async def create(self, spec: SandboxSpec, *, key: str) -> "RemoteSandbox":
        """As `Node.create`."""
        sandbox_id = await self.call(calls.Create(self.number(), spec, key), str)
        return RemoteSandbox(self, sandbox_id)

    async def sandboxes(self) -> list[SandboxStatus]:
        """As `Node.sandboxes`."""
        return await self.call(calls.Status(self.number()), list[SandboxStatus])

    async def statistics(self) -> dict[str, float]:
        """As `Node.statistics`."""
        return await self.call(calls.Statistics(self.number()), dict[str, float])


class RemoteSandbox:
    """As `NodeSandbox`, from afar."""

    def __init__(self, link: Link, sandbox_id: str) -> None:
        self.sandbox_id = sandbox_id
        self._link = link
        self._is_closed = False
        self._final: SandboxUsage | None = None

    async def ready(self) -> None:
        await self._link.call(calls.UntilReady(self._link.number(), self.sandbox_id), type(None))

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
        message = calls.Exec(
            self._link.number(),
            self.sandbox_id,
            list(argv),
            stdin,
            dict(env or {}),
            cwd,
            timeout_seconds,
            kept_bytes,
        )
        return await self._link.call(message, ExecResult)

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        terminal: tuple[int, int] | None = None,
    ) -> RemoteProcess:
        size = list(terminal) if terminal is not None else None
        message = calls.Spawn(self._link.number(), self.sandbox_id, list(argv), dict(env or {}), cwd, size)
        process = RemoteProcess(self._link, message)
        try:
            await process.started()
        except BaseException:  # a cancellation too: undo, then pass it on
            await process.close()
            raise
        return process

    async def python(self, code: str, *, timeout_seconds: float = 60.0) -> PythonResult:
        message = calls.Python(self._link.number(), self.sandbox_id, code, True, timeout_seconds)
        return await self._link.call(message, PythonResult)

    async def snippet(self, code: str, *, timeout_seconds: float = 60.0) -> ExecResult:
        message = calls.Python(self._link.number(), self.sandbox_id, code, False, timeout_seconds)
        return await self._link.call(message, ExecResult)

    async def read(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        return await self._link.call(calls.Read(self._link.number(), self.sandbox_id, path, max_bytes), bytes)

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> None:
        await self._link.call(calls.Write(self._link.number(), self.sandbox_id, path, data, mode), type(None))

    async def list(self, path: str = ".") -> tuple[FileEntry, ...]:
        return await self._link.call(calls.List(self._link.number(), self.sandbox_id, path), tuple[FileEntry, ...])

    async def remove(self, path: str, *, is_recursive: bool = False) -> None:
        await self._link.call(calls.Remove(self._link.number(), self.sandbox_id, path, is_recursive), type(None))

    async def network_log(self) -> tuple[NetworkRecord, ...]:
        message = calls.ReadNetworkLog(self._link.number(), self.sandbox_id)
        return await self._link.call(message, tuple[NetworkRecord, ...])

    async def pause(self) -> None:
        await self._link.call(calls.Pause(self._link.number(), self.sandbox_id, True), type(None))

    async def resume(self) -> None:
        await self._link.call(calls.Pause(self._link.number(), self.sandbox_id, False), type(None))

    async def renew(self, seconds: float) -> None:
        await self._link.call(calls.Renew(self._link.number(), self.sandbox_id, seconds), type(None))

    async def close(self) -> None:
        if not self._is_closed and not self._link.is_lost:
            try:
                self._final = await self._link.call(calls.Destroy(self._link.number(), self.sandbox_id), SandboxUsage)
            except SandboxError as error:
                if isinstance(error, Busy) or error.outcome is not Outcome.NODE_LOST:
                    raise  # with its node, it would be gone already
        self._is_closed = True

    async def usage(self) -> SandboxUsage:
        if self._final is not None:
            return self._final
        return await self._link.call(calls.Usage(self._link.number(), self.sandbox_id), SandboxUsage)
