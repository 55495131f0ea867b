"""Our sandboxes for inspect_ai: `sandbox="hone"` in a task runs its tools on cells, or on a node or gateway.

inspect_ai finds it by the entry point of this package. `sandbox=("hone", "tls://gateway:7300")` names another place, as
`sandboxes_at` takes it; `CellConfig` says more.
"""

import errno
import os
from typing import Any, Literal, Self, overload

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    sandboxenv,
)
from pydantic import BaseModel, ConfigDict

from hone.sandbox.client import LimitExceeded, Outcome, Sandbox, SandboxError, SandboxSpec
from hone.schema.sandboxes import RuntimeName

DEFAULT_SECONDS = 3600.0
CANNOT_RUN = 126


class CellConfig(BaseModel):
    """What the sandboxes of a task are. node: an address; empty is the node inside this process.

    The token is in $HONE_SANDBOX_TOKEN. The other fields are those of `SandboxSpec`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    node: str = ""
    image: str = "python"
    memory_mb: int = 2048
    cpus: float = 1.0
    disk_mb: int = 1024
    max_processes: int = 256
    network: Literal["none", "off", "host", "allow"] = "none"
    allow: tuple[str, ...] = ()
    runtime: RuntimeName = "cell"
    env: dict[str, str] = {}
    ttl_seconds: float = 24 * 3600.0
    idle_seconds: float | None = None


@sandboxenv(name="hone")
class CellEnvironment(SandboxEnvironment):
    """A sandbox of ours as inspect_ai's. Trouble of the infrastructure is `SandboxUnavailableError`."""

    def __init__(self, box: Sandbox) -> None:
        super().__init__()
        self._box = box

    @classmethod
    async def sample_init(cls, task_name: str, config: Any, metadata: dict[str, str]) -> dict[str, SandboxEnvironment]:
        """A fresh sandbox for a sample; it may not be ready yet."""
        settings = config if isinstance(config, CellConfig) else CellConfig(node=config or "")
        spec = SandboxSpec(**settings.model_dump(exclude={"node"}))
        return {"default": await cls(Sandbox(spec=spec, node=settings.node or None)).opened()}

    @classmethod
    async def sample_cleanup(
        cls, task_name: str, config: Any, environments: dict[str, SandboxEnvironment], interrupted: bool
    ) -> None:
        """End the sandboxes."""
        for environment in environments.values():
            await environment.as_type(cls)._box.close()

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        """As of `SandboxEnvironment`."""
        return CellConfig(**config)

    async def opened(self) -> Self:
        """Ask for the sandbox."""
        with _Boundary(""):
            await self._box.open()
        return self

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """As of `SandboxEnvironment`; nothing is retried: a command that was late is late."""
        if user not in (None, "root", "0"):
            raise SandboxUserUnsupportedError(f"user {user!r}: programs in a cell run as its root only")
        with _Boundary(cmd[0]):
            result = await self._box.exec(
                cmd,
                stdin=input.encode() if isinstance(input, str) else input or b"",
                env=env,
                cwd=cwd or ".",
                timeout_seconds=timeout or DEFAULT_SECONDS,
                kept_bytes=2 * SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE,
            )
        if result.outcome is Outcome.TIMEOUT:
            raise TimeoutError(f"{cmd[0]} took longer than {timeout or DEFAULT_SECONDS:g} s")
        if result.exit_code == CANNOT_RUN and "not a program that may be run" in result.stderr:
            raise PermissionError(errno.EACCES, f"{cmd[0]} is not a program that may be run", cmd[0])
        code = result.exit_code if result.exit_code >= 0 else 128 - result.exit_code
        return ExecResult(result.is_success, code, result.stdout, result.stderr)

    async def write_file(self, file: str, contents: str | bytes) -> None:
        """As of `SandboxEnvironment`."""
        with _Boundary(file):
            await self._box.write(file, contents.encode() if isinstance(contents, str) else contents)

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...
    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...
    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """As of `SandboxEnvironment`."""
        with _Boundary(file):
            try:
                data = await self._box.read(file, max_bytes=SandboxEnvironmentLimits.MAX_READ_FILE_SIZE)
            except LimitExceeded as error:
                raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None) from error
        return data.decode() if text else data


class _Boundary:
    """Trouble of the infrastructure by inspect_ai's name; errors of files with the name of the file."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SandboxError):
            raise SandboxUnavailableError(f"{error} ({error.outcome})") from error
        if isinstance(error, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._what) from error
