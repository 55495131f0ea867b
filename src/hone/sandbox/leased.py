"""What a sandbox of a node offers, whether the node is in this process or behind an address."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hone.schema.sandbox_network import NetworkRecord
from hone.schema.sandboxes import ExecResult, FileEntry, PythonResult, SandboxUsage, SnapshotStatus, Transfer


class Process(Protocol):
    """A program under way in a sandbox, with its streams. It dies with the sandbox."""

    async def write(self, data: bytes) -> None:
        """Give it input; returns when its pipe has taken all of it. `BrokenPipeError` if nobody reads."""

    def end_input(self) -> None:
        """It will read the end of its input; with a terminal, that takes a Control-D instead."""

    async def read(self) -> bytes:
        """The next piece of its stdout, or of what its terminal shows; empty at the end."""

    async def read_error(self) -> bytes:
        """The next piece of its stderr; empty at the end, and with a terminal."""

    async def wait(self) -> int:
        """Its exit code, minus the signal's number if one ended it, when it has ended."""

    def signal(self, number: int) -> None:
        """Send a signal to its process group."""

    def interrupt(self) -> None:
        """Send SIGINT to its process group."""

    def kill(self) -> None:
        """Kill it and all that it started."""

    def resize(self, rows: int, columns: int) -> None:
        """Tell it that its terminal has another size."""

    async def close(self) -> None:
        """Kill it if it runs, and let go of its streams."""


class Connection(Protocol):
    """A connection to a port of a sandbox. It breaks off with the sandbox."""

    async def write(self, data: bytes) -> None:
        """Send; `BrokenPipeError` if nobody reads."""

    def end_input(self) -> None:
        """The other side will read the end."""

    async def read(self) -> bytes:
        """The next piece; empty at the end, also where the connection broke: `read_error` has then something."""

    async def read_error(self) -> bytes:
        """What broke it; empty if nothing did, when the other side has ended."""

    async def close(self) -> None:
        """Hang up."""


class LeasedSandbox(Protocol):
    """What a sandbox of a node in this process and one behind an address have in common."""

    @property
    def sandbox_id(self) -> str: ...
    async def ready(self) -> None: ...
    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes,
        env: Mapping[str, str] | None,
        cwd: str,
        timeout_seconds: float,
        kept_bytes: int,
    ) -> ExecResult: ...
    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None,
        cwd: str,
        terminal: tuple[int, int] | None,
    ) -> Process: ...
    async def spawn_python(self, code: str, *, env: Mapping[str, str] | None, cwd: str) -> Process: ...
    async def connect(self, port: int, *, timeout_seconds: float) -> Connection: ...
    async def python(self, code: str, *, timeout_seconds: float) -> PythonResult: ...
    async def snippet(self, code: str, *, timeout_seconds: float) -> ExecResult: ...
    async def read(self, path: str, *, max_bytes: int) -> bytes: ...
    async def write(self, path: str, data: bytes, *, mode: int | None) -> None: ...
    async def list(self, path: str) -> tuple[FileEntry, ...]: ...
    async def remove(self, path: str, *, is_recursive: bool) -> None: ...
    async def stat(self, path: str, *, follows_links: bool) -> FileEntry: ...
    async def make_folder(self, path: str) -> None: ...
    async def upload(self, local: Path, path: str) -> Transfer: ...
    async def download(self, path: str, local: Path) -> Transfer: ...
    async def snapshot(self, *, ttl_seconds: float) -> SnapshotStatus: ...
    async def reset(self, snapshot_id: str) -> None: ...
    async def network_log(self) -> tuple[NetworkRecord, ...]: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def renew(self, seconds: float) -> None: ...
    async def usage(self) -> SandboxUsage: ...
    async def close(self) -> None: ...
