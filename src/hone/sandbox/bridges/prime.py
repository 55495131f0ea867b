"""Our sandboxes behind the names of the public `prime-sandboxes` SDK, so that code written for it runs here.

What a request can say there and nobody can keep here (GPUs, volumes, checkpoints, SSH, teams and other users) is a
`ValueError`, never ignored.
"""

import asyncio
import contextlib
import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from hone.sandbox import client
from hone.sandbox.bridges.prime_models import (
    ERROR,
    PENDING,
    RUNNING,
    TERMINATED,
    TIMEOUT,
    BackgroundJob,
    BackgroundJobStatus,
    BulkDeleteSandboxResponse,
    CommandResponse,
    CommandTimeoutError,
    CreateSandboxRequest,
    FileUploadResponse,
    ReadFileResponse,
    Sandbox,
    SandboxFileNotFoundError,
    SandboxFileTooLargeError,
    SandboxListResponse,
    SandboxNotRunningError,
)
from hone.sandbox.client import ExecResult, LimitExceeded, Outcome, SandboxError
from hone.sandbox.node.node import Node

__all__ = [
    "AsyncSandboxClient",
    "BackgroundJob",
    "BackgroundJobStatus",
    "BulkDeleteSandboxResponse",
    "CommandResponse",
    "CommandTimeoutError",
    "CreateSandboxRequest",
    "FileUploadResponse",
    "ReadFileResponse",
    "Sandbox",
    "SandboxFileNotFoundError",
    "SandboxFileTooLargeError",
    "SandboxListResponse",
    "SandboxNotRunningError",
]

COMMAND_SECONDS = 300
KEPT_BYTES = 16 << 20
MAX_FILE_BYTES = 256 << 20
JOBS = "/tmp/.jobs"


@dataclass(slots=True)
class _Record:
    """A sandbox of this client. problem: why it is over, where that was not asked for."""

    request: CreateSandboxRequest
    box: client.Sandbox
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    status: str = PENDING
    problem: str | None = None


class AsyncSandboxClient:
    """Makes sandboxes and works in them by their ids; `aclose` it, or use it as an async context manager.

    api_key: the token of the node or gateway, by default that in $HONE_SANDBOX_TOKEN. node: its address, or a `Node`;
    by default that of HONE_SANDBOX_NODE, or else the node inside this process. It knows the sandboxes that it asked for
    itself; closing it ends them.
    """

    def __init__(self, api_key: str | None = None, *, node: Node | str | None = None) -> None:
        self._token = api_key or None
        self._node = node if node is not None else os.environ.get("HONE_SANDBOX_NODE") or None
        self._records: dict[str, _Record] = {}

    async def __aenter__(self) -> "AsyncSandboxClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def create(self, request: CreateSandboxRequest) -> Sandbox:
        """Ask for a sandbox; it may not be ready yet. Raises `Busy`."""
        key = request.idempotency_key or ""
        box = client.Sandbox(spec=request.spec(), node=self._node, token=self._token, key=key)
        await box.open()
        self._records.setdefault(box.sandbox_id, _Record(request, box))
        return self._shown(box.sandbox_id)

    async def wait_for_creation(
        self,
        sandbox_id: str,
        max_attempts: int = 60,
        stability_checks: int = 1,
        image_build_timeout_seconds: int = 3000,
    ) -> None:
        """Wait until the sandbox is ready. Nobody polls: `max_attempts` stand for the seconds to wait at most."""
        record = self._record(sandbox_id)
        try:
            async with asyncio.timeout(max_attempts):
                await record.box.ready()
        except TimeoutError:
            raise SandboxNotRunningError(sandbox_id, PENDING) from None
        except SandboxError as error:
            raise self._over(sandbox_id, error) from error
        record.status = RUNNING

    async def bulk_wait_for_creation(
        self, sandbox_ids: Sequence[str], max_attempts: int = 60, image_build_timeout_seconds: int = 3000
    ) -> dict[str, str]:
        """Wait for several; their states by id."""
        waits = (self.wait_for_creation(one, max_attempts) for one in sandbox_ids)
        for error in await asyncio.gather(*waits, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, SandboxNotRunningError):
                raise error
        return {one: self._record(one).status for one in sandbox_ids}

    async def get(self, sandbox_id: str) -> Sandbox:
        """A sandbox of this client as it is now."""
        record = self._record(sandbox_id)
        if record.status in (PENDING, RUNNING):
            try:
                await record.box.usage()
                record.status = RUNNING
            except SandboxError as error:
                self._over(sandbox_id, error)
        return self._shown(sandbox_id)

    async def list(
        self,
        team_id: str | None = None,
        status: str | None = None,
        labels: Sequence[str] | None = None,
        page: int = 1,
        per_page: int = 50,
        exclude_terminated: bool | None = None,
        user_id: str | None = None,
    ) -> SandboxListResponse:
        """The sandboxes that this client asked for, the first one first; with all of the labels."""
        _refuse(team_id=team_id, user_id=user_id)
        shown = [self._shown(one) for one in self._records]
        kept = [
            one
            for one in shown
            if (status is None or one.status == status)
            and set(labels or ()) <= set(one.labels)
            and not (exclude_terminated and one.status in (TERMINATED, TIMEOUT, ERROR))
        ]
        start = (page - 1) * per_page
        return SandboxListResponse(
            kept[start : start + per_page], len(kept), page, per_page, start + per_page < len(kept)
        )

    async def delete(self, sandbox_id: str) -> dict[str, str]:
        """End a sandbox; returns when nothing of it is left."""
        record = self._record(sandbox_id)
        with contextlib.suppress(SandboxError):  # it is gone already
            await record.box.close()
        record.status = TERMINATED
        return {"id": sandbox_id, "status": TERMINATED}

    async def bulk_delete(
        self,
        sandbox_ids: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        team_id: str | None = None,
        user_id: str | None = None,
        all_users: bool = False,
    ) -> BulkDeleteSandboxResponse:
        """End those with these ids, or those with all of these labels."""
        _refuse(team_id=team_id, user_id=user_id, all_users=all_users)
        if (sandbox_ids is None) == (labels is None):
            raise ValueError("give the ids of the sandboxes to delete, or their labels")
        if labels is not None:
            chosen = [one.id for one in (await self.list(labels=labels, per_page=len(self._records) or 1)).sandboxes]
        else:
            chosen = [*(sandbox_ids or ())]
        known = [one for one in chosen if one in self._records]
        await asyncio.gather(*(self.delete(one) for one in known))
        failed = [{"sandbox_id": one, "error": "not found"} for one in chosen if one not in self._records]
        return BulkDeleteSandboxResponse(known, failed, f"{len(known)} deleted, {len(failed)} not found")

    async def execute_command(
        self,
        sandbox_id: str,
        command: str,
        working_dir: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: int | None = None,
        user: str | None = None,
    ) -> CommandResponse:
        """Run a command line of the shell to its end. Raises `CommandTimeoutError`, `SandboxNotRunningError`."""
        seconds = timeout or COMMAND_SECONDS
        result = await self._exec(sandbox_id, command, working_dir, env, seconds, user)
        if result.outcome is Outcome.TIMEOUT:
            raise CommandTimeoutError(sandbox_id, command, seconds)
        return CommandResponse(result.stdout, result.stderr, _shell_code(result))

    async def start_background_job(
        self,
        sandbox_id: str,
        command: str,
        working_dir: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> BackgroundJob:
        """Run a command line that nobody waits for; it ends with the sandbox at the latest."""
        job_id = secrets.token_hex(8)
        paths = [f"{JOBS}/{job_id}.{kind}" for kind in ("out", "err", "exit")]
        out, err, ended = paths
        inner = f"sh -c {shlex.quote(command)} >{out} 2>{err} </dev/null; echo $? >{ended}.new; mv {ended}.new {ended}"
        line = f"mkdir -p {JOBS} && {{ setsid sh -c {shlex.quote(inner)} >/dev/null 2>&1 </dev/null & }}"
        started = await self._exec(sandbox_id, line, working_dir, env, COMMAND_SECONDS, user)
        if not started.is_success:
            raise RuntimeError(f"the job could not be started in {sandbox_id}: {started.stderr or started.outcome}")
        return BackgroundJob(job_id, sandbox_id, *paths)

    async def get_background_job(
        self, sandbox_id: str, job: BackgroundJob, timeout: int | None = None
    ) -> BackgroundJobStatus:
        """How far a job is, with its output once it has ended."""
        box = self._record(sandbox_id).box
        try:
            code = int(await box.read(job.exit_file))
            out, err = [
                (await box.read(path, max_bytes=MAX_FILE_BYTES)).decode(errors="replace")
                for path in (job.stdout_log_file, job.stderr_log_file)
            ]
        except FileNotFoundError:
            return BackgroundJobStatus(job.job_id, completed=False)
        except SandboxError as error:
            raise self._over(sandbox_id, error) from error
        return BackgroundJobStatus(job.job_id, True, code, out, err)

    async def run_background_job(
        self,
        sandbox_id: str,
        command: str,
        timeout: int = 900,
        working_dir: str | None = None,
        env: Mapping[str, str] | None = None,
        poll_interval: int = 3,
    ) -> BackgroundJobStatus:
        """Run a command line to its end, which nobody needs to poll for."""
        result = await self._exec(sandbox_id, command, working_dir, env, timeout, None)
        if result.outcome is Outcome.TIMEOUT:
            raise CommandTimeoutError(sandbox_id, command, timeout)
        return BackgroundJobStatus(secrets.token_hex(8), True, _shell_code(result), result.stdout, result.stderr)

    async def upload_file(
        self, sandbox_id: str, file_path: str, local_file_path: str, timeout: int | None = None
    ) -> FileUploadResponse:
        """Put a file of this machine into the sandbox."""
        data = await asyncio.to_thread(Path(local_file_path).read_bytes)
        return await self.upload_bytes(sandbox_id, file_path, data, Path(local_file_path).name, timeout)

    async def upload_bytes(
        self, sandbox_id: str, file_path: str, file_bytes: bytes, filename: str, timeout: int | None = None
    ) -> FileUploadResponse:
        """Put bytes into the sandbox as the file at a path."""
        try:
            async with asyncio.timeout(timeout or COMMAND_SECONDS):
                await self._record(sandbox_id).box.write(file_path, file_bytes)
        except SandboxError as error:
            raise self._over(sandbox_id, error) from error
        return FileUploadResponse(True, file_path, len(file_bytes), datetime.now(UTC))

    async def download_file(
        self, sandbox_id: str, file_path: str, local_file_path: str, timeout: int | None = None
    ) -> None:
        """Copy a file of the sandbox to this machine."""
        data = await self._read(sandbox_id, file_path, timeout)
        await asyncio.to_thread(Path(local_file_path).write_bytes, data)

    async def read_file(
        self,
        sandbox_id: str,
        file_path: str,
        timeout: int | None = None,
        offset: int | None = None,
        length: int | None = None,
    ) -> ReadFileResponse:
        """A file, or a piece of it, as text."""
        data = await self._read(sandbox_id, file_path, timeout)
        start = offset or 0
        piece = data[start : len(data) if length is None else start + length]
        is_cut = start + len(piece) < len(data)
        return ReadFileResponse(piece.decode(errors="replace"), len(piece), len(data), start, is_cut)

    async def aclose(self) -> None:
        """End all sandboxes that this client asked for."""
        await asyncio.gather(*(self.delete(one) for one in self._records))

    async def _exec(
        self,
        sandbox_id: str,
        command: str,
        working_dir: str | None,
        env: Mapping[str, str] | None,
        seconds: float,
        user: str | None,
    ) -> ExecResult:
        if user not in (None, "root"):
            raise ValueError(f"user {user!r}: programs here run as the root of their own sandbox only")
        try:
            return await self._record(sandbox_id).box.exec(
                ["sh", "-c", command], env=env, cwd=working_dir or ".", timeout_seconds=seconds, kept_bytes=KEPT_BYTES
            )
        except SandboxError as error:
            raise self._over(sandbox_id, error) from error

    async def _read(self, sandbox_id: str, path: str, timeout: int | None) -> bytes:
        try:
            async with asyncio.timeout(timeout or COMMAND_SECONDS):
                return await self._record(sandbox_id).box.read(path, max_bytes=MAX_FILE_BYTES)
        except FileNotFoundError as error:
            raise SandboxFileNotFoundError(f"no file {path} in sandbox {sandbox_id}") from error
        except LimitExceeded as error:
            raise SandboxFileTooLargeError(f"{path} in sandbox {sandbox_id}: {error}") from error
        except SandboxError as error:
            raise self._over(sandbox_id, error) from error

    def _record(self, sandbox_id: str) -> _Record:
        if sandbox_id not in self._records:
            raise SandboxNotRunningError(sandbox_id, message=f"{sandbox_id} is no sandbox of this client")
        return self._records[sandbox_id]

    def _over(self, sandbox_id: str, error: SandboxError) -> SandboxNotRunningError:
        record = self._record(sandbox_id)
        if record.status in (PENDING, RUNNING):
            lived = datetime.now(UTC) - record.created_at
            record.status = TIMEOUT if lived.total_seconds() >= record.box.spec.ttl_seconds else ERROR
            record.problem = str(error)
        return SandboxNotRunningError(sandbox_id, record.status, f"{error} ({error.outcome})")

    def _shown(self, sandbox_id: str) -> Sandbox:
        record = self._records[sandbox_id]
        request, spec = record.request, record.box.spec
        return Sandbox(
            id=sandbox_id,
            name=request.name,
            docker_image=spec.image,
            cpu_cores=spec.cpus,
            memory_gb=spec.memory_mb / 1024,
            disk_size_gb=spec.disk_mb / 1024,
            status=record.status,
            timeout_minutes=request.timeout_minutes,
            labels=tuple(request.labels),
            created_at=record.created_at,
            error_message=record.problem,
            environment_vars=request.environment_vars,
        )


def _refuse(**whose: str | bool | None) -> None:
    for name, value in whose.items():
        if value:
            raise ValueError(f"{name}={value!r}: a client here knows the sandboxes that it asked for itself, no others")


def _shell_code(result: ExecResult) -> int:
    """An exit code as shells show it: 128 and the signal's number where one ended the program."""
    return result.exit_code if result.exit_code >= 0 else 128 - result.exit_code
