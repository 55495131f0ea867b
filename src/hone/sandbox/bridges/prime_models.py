"""What goes into and comes out of the client in `hone.sandbox.bridges.prime`, by the names of the `prime-sandboxes` SDK."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from hone.schema.sandboxes import SandboxSpec

PENDING, RUNNING, ERROR, TERMINATED, TIMEOUT = "PENDING", "RUNNING", "ERROR", "TERMINATED", "TIMEOUT"


class SandboxNotRunningError(RuntimeError):
    """The sandbox is over, or never came to be."""

    def __init__(self, sandbox_id: str, status: str | None = None, message: str | None = None) -> None:
        super().__init__(message or f"sandbox {sandbox_id} is not running (status {status})")
        self.sandbox_id = sandbox_id
        self.status = status


class SandboxFileNotFoundError(RuntimeError):
    """There is no such file in the sandbox."""


class SandboxFileTooLargeError(RuntimeError):
    """A file is larger than may be read."""


class CommandTimeoutError(RuntimeError):
    """A command was killed because it ran longer than it was given."""

    def __init__(self, sandbox_id: str, command: str, timeout: int) -> None:
        super().__init__(f"command {command!r} in sandbox {sandbox_id} took longer than {timeout} s")
        self.sandbox_id = sandbox_id
        self.command = command
        self.timeout = timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateSandboxRequest:
    """What a sandbox shall be.

    docker_image: as of `SandboxSpec.image`; None is this machine's Python. network_allowlist: hosts as of
    `SandboxSpec.allow`; without it there is no network. secrets are environment variables like the others.
    idempotency_key: asked twice, it is the same sandbox.
    """

    name: str
    docker_image: str | None = None
    cpu_cores: float = 1.0
    memory_gb: float = 1.0
    disk_size_gb: float | None = None
    gpu_count: int = 0
    gpu_type: str | None = None
    network_allowlist: Sequence[str] | None = None
    timeout_minutes: int = 60
    idle_timeout_minutes: int | None = None
    environment_vars: Mapping[str, str] | None = None
    secrets: Mapping[str, str] | None = None
    labels: Sequence[str] = ()
    team_id: str | None = None
    region: str | None = None
    idempotency_key: str | None = None

    def __post_init__(self) -> None:
        if self.gpu_count or self.gpu_type:
            raise ValueError("sandboxes here have no GPUs; leave gpu_count and gpu_type out")

    def spec(self) -> SandboxSpec:
        """The same in our words."""
        return SandboxSpec(
            image=self.docker_image or "python",
            memory_mb=round(self.memory_gb * 1024),
            cpus=self.cpu_cores,
            disk_mb=round((self.disk_size_gb or 1.0) * 1024),
            ttl_seconds=60.0 * self.timeout_minutes,
            idle_seconds=60.0 * self.idle_timeout_minutes if self.idle_timeout_minutes else None,
            network="allow" if self.network_allowlist else "none",
            allow=tuple(self.network_allowlist or ()),
            env={**(self.environment_vars or {}), **(self.secrets or {})},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A sandbox as it was when it was asked about."""

    id: str
    name: str
    docker_image: str
    cpu_cores: float
    memory_gb: float
    disk_size_gb: float
    gpu_count: int = 0
    status: str
    timeout_minutes: int
    labels: tuple[str, ...]
    created_at: datetime
    error_message: str | None = None
    environment_vars: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class SandboxListResponse:
    """A page of the sandboxes that this client asked for."""

    sandboxes: list[Sandbox]
    total: int
    page: int
    per_page: int
    has_next: bool


@dataclass(frozen=True, slots=True)
class CommandResponse:
    """What a command did."""

    stdout: str
    stderr: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class FileUploadResponse:
    """A file that has arrived."""

    success: bool
    path: str
    size: int
    timestamp: datetime


@dataclass(frozen=True, slots=True)
class ReadFileResponse:
    """A piece of a file as text. total_size: of the file. truncated: whether more of it follows."""

    content: str
    size: int
    total_size: int
    offset: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class BulkDeleteSandboxResponse:
    """Which sandboxes are gone, and why others are not."""

    succeeded: list[str]
    failed: list[dict[str, str]]
    message: str


@dataclass(frozen=True, slots=True)
class BackgroundJob:
    """A command that runs on while others do."""

    job_id: str
    sandbox_id: str
    stdout_log_file: str
    stderr_log_file: str
    exit_file: str


@dataclass(frozen=True, slots=True)
class BackgroundJobStatus:
    """How far a job is. exit_code, stdout, stderr: once it is completed."""

    job_id: str
    completed: bool
    exit_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None
