"""A node behind an address and its sandboxes, as its clients have them: one method for each call."""

import asyncio
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.files.files import SPOOL_BYTES, joined, pack_local, unpack_local
from hone.sandbox.wire.link import Link
from hone.sandbox.wire.remote_process import RemoteProcess
from hone.sandbox.wire.remote_transfer import RemoteTransfer
from hone.schema import sandbox_calls as calls
from hone.schema.sandbox_network import NetworkRecord
from hone.schema.sandboxes import (
    ExecResult,
    FileEntry,
    Outcome,
    PythonResult,
    SandboxSpec,
    SandboxStatus,
    SandboxUsage,
    SnapshotStatus,
    Transfer,
)


class RemoteNode(Link):
    """A node behind an address, and the session with it."""

    async def create(self, spec: SandboxSpec, *, key: str = "", snapshot_id: str = "") -> "RemoteSandbox":
        """As `Node.create`.

        Cancelled, it leaves no sandbox, unless it has a key: by that it may be asked for again. Then it is there until
        its lease or this session is over.
        """
        message = calls.Create(self.number(), spec, key or secrets.token_hex(16), snapshot_id)
        return RemoteSandbox(self, await self.call(message, str, undo=None if key else self._end_sandbox))

    async def _end_sandbox(self, sandbox_id: str) -> None:
        await self.call(calls.Destroy(self.number(), sandbox_id), SandboxUsage)

    async def hold_snapshot(self, snapshot_id: str, seconds: float) -> None:
        """As `Node.hold_snapshot`. With its node, a snapshot is gone already."""
        if seconds > 0 or not self.is_lost:
            await self.call(calls.HoldSnapshot(self.number(), snapshot_id, seconds), type(None))

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
        return await self._started(message)

    async def spawn_python(self, code: str, *, env: Mapping[str, str] | None = None, cwd: str = ".") -> RemoteProcess:
        return await self._started(calls.SpawnPython(self._link.number(), self.sandbox_id, code, dict(env or {}), cwd))

    async def connect(self, port: int, *, timeout_seconds: float) -> RemoteProcess:
        connection = RemoteProcess(self._link, calls.Dial(self._link.number(), self.sandbox_id, port, timeout_seconds))
        try:
            await connection.started()
        except BaseException:  # a cancellation too: undo, then pass it on
            await connection.close()
            raise
        return connection

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

    async def stat(self, path: str, *, follows_links: bool = True) -> FileEntry:
        return await self._link.call(calls.Stat(self._link.number(), self.sandbox_id, path, follows_links), FileEntry)

    async def make_folder(self, path: str) -> None:
        await self._link.call(calls.MakeFolder(self._link.number(), self.sandbox_id, path), type(None))

    async def upload(self, local: Path, path: str) -> Transfer:
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
            archive = cast(BinaryIO, spool)
            packed = await asyncio.to_thread(pack_local, local, archive)
            archive.seek(0)
            message = calls.Upload(self._link.number(), self.sandbox_id, path)
            return joined(packed, await RemoteTransfer(self._link, message).send(archive))

    async def download(self, path: str, local: Path) -> Transfer:
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
            archive = cast(BinaryIO, spool)
            message = calls.Download(self._link.number(), self.sandbox_id, path)
            packed = await RemoteTransfer(self._link, message).receive(archive)
            archive.seek(0)
            return joined(packed, await asyncio.to_thread(unpack_local, archive, local))

    async def snapshot(self, *, ttl_seconds: float) -> SnapshotStatus:
        message = calls.TakeSnapshot(self._link.number(), self.sandbox_id, ttl_seconds)
        return await self._link.call(message, SnapshotStatus, undo=self._let_go)

    async def _let_go(self, status: SnapshotStatus) -> None:
        await self._link.call(calls.HoldSnapshot(self._link.number(), status.snapshot_id, 0), type(None))

    async def reset(self, snapshot_id: str) -> None:
        await self._link.call(calls.Reset(self._link.number(), self.sandbox_id, snapshot_id), type(None))

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

    async def _started(self, message: calls.Spawn | calls.SpawnPython) -> RemoteProcess:
        process = RemoteProcess(self._link, message)
        try:
            await process.started()
        except BaseException:  # a cancellation too: undo, then pass it on
            await process.close()
            raise
        return process
