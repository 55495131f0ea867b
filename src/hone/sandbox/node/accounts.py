"""What each sandbox of a node used in all: a line in a file, and for a while in memory, so that use can be charged."""

import collections
import contextlib
from pathlib import Path

import msgspec

from hone.observability.jsonlines import JsonLines
from hone.sandbox.node.lifecycle import End
from hone.schema.sandboxes import SandboxUsage

NAME = "sandboxes.jsonl"
MAX_BYTES = 64 << 20
MAX_REMEMBERED = 10_000


class EndedSandbox(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of sandboxes.jsonl. asked, ended: Unix time. ready_seconds: None if it never was. reason: why it ended."""

    sandbox_id: str
    owner: str
    rollout: str
    image: str
    asked: float
    ended: float
    ready_seconds: float | None
    end: End
    reason: str
    usage: SandboxUsage


class Accounts:
    """The sandboxes that have ended. folder: of sandboxes.jsonl; None keeps them in memory only.

    A full file becomes sandboxes.jsonl.1, and the one before it is gone: collect them before that, or have less of them.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / NAME
        self._lines = None if self._path is None else JsonLines(self._path)
        self._num_bytes = self._path.stat().st_size if self._path is not None else 0
        self._remembered: collections.OrderedDict[str, EndedSandbox] = collections.OrderedDict()

    def add(self, ended: EndedSandbox) -> None:
        """A sandbox is over, and nothing of it is left. `OSError` where the disk takes no more."""
        self._remembered[ended.sandbox_id] = ended
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        if self._lines is None:
            return
        self._num_bytes += self._lines.write(msgspec.to_builtins(ended))
        if self._num_bytes > MAX_BYTES:
            self._begin_anew()

    def find(self, sandbox_id: str) -> EndedSandbox | None:
        """A sandbox that ended not too long ago."""
        return self._remembered.get(sandbox_id)

    def close(self) -> None:
        """Let go of the file."""
        if self._lines is not None:
            self._lines.close()

    def _begin_anew(self) -> None:
        assert self._lines is not None
        assert self._path is not None
        with contextlib.suppress(FileNotFoundError):  # it is renamed already, and no new one could be opened
            self._path.rename(self._path.with_name(f"{NAME}.1"))
        full, self._lines = self._lines, JsonLines(self._path)
        full.close()
        self._num_bytes = 0
