"""Where a program runs and what is left there until the rollout is scored: a folder of this machine, or a sandbox."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hone.envs.harness.process import TAIL_BYTES, Output, run_process
from hone.envs.sandboxes import Sandbox

PROMPT_FILE = "prompt.txt"
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ")


class Workplace(Protocol):
    """The state of a rollout. Paths are relative to the folder in which the program starts."""

    output: Output

    async def write(self, path: str, data: bytes) -> None:
        """Write a file, with the folders above it."""
        ...

    async def read(self, path: str) -> bytes:
        """A file's content; `OSError` when there is none."""
        ...

    async def write_prompt(self, text: str) -> str:
        """Write a file for the program to read, outside of its folder where that can be; its path."""
        ...

    async def execute(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Run the program to its end and fill in `output`. Cancelling ends the program."""
        ...

    async def close(self) -> None:
        """Remove the files."""
        ...


class ProgramRun:
    """A `Workplace` as a process of this user, with `folder` as its working folder and an empty HOME beside it."""

    def __init__(self) -> None:
        self.output = Output()
        self._scratch = Path(tempfile.mkdtemp(prefix="hone-harness-"))
        self._home = self._scratch / "home"
        self.folder = self._scratch / "work"
        self._home.mkdir()
        self.folder.mkdir()

    async def write(self, path: str, data: bytes) -> None:
        """As `Workplace.write`."""
        await asyncio.to_thread(_write, self.folder / path, data)

    async def read(self, path: str) -> bytes:
        """As `Workplace.read`."""
        return await asyncio.to_thread((self.folder / path).read_bytes)

    async def write_prompt(self, text: str) -> str:
        """As `Workplace.write_prompt`."""
        path = self._scratch / PROMPT_FILE
        await asyncio.to_thread(_write, path, text.encode())
        return str(path)

    async def execute(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """As `Workplace.execute`."""
        ours = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"HOME": str(self._home)}
        await run_process(command, self.folder, {**ours, **variables}, self.output)

    async def close(self) -> None:
        """As `Workplace.close`."""
        await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)


class SandboxRun:
    """A `Workplace` in `sandbox`, whose lease ends the program. The output of a program that is ended is not known."""

    def __init__(self, sandbox: Sandbox, ttl_seconds: float) -> None:
        self.output = Output()
        self.sandbox = sandbox
        self._ttl_seconds = ttl_seconds

    async def write(self, path: str, data: bytes) -> None:
        """As `Workplace.write`."""
        await self.sandbox.write(path, data)

    async def read(self, path: str) -> bytes:
        """As `Workplace.read`."""
        return await self.sandbox.read(path)

    async def write_prompt(self, text: str) -> str:
        """As `Workplace.write_prompt`."""
        await self.sandbox.write(PROMPT_FILE, text.encode())
        return PROMPT_FILE

    async def execute(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """As `Workplace.execute`."""
        result = await self.sandbox.exec(
            command, env=variables, timeout_seconds=self._ttl_seconds, kept_bytes=2 * TAIL_BYTES
        )
        self.output.exit_code = result.exit_code
        self.output.stdout, self.output.stderr = result.stdout, result.stderr

    async def close(self) -> None:
        """As `Workplace.close`."""
        await self.sandbox.close()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
