"""What a node means to do, written down before it does it, so that the node after a crash knows what was lost."""

import errno
import fcntl
import json
import logging
import os
from pathlib import Path

from hone.sandbox.errors import SandboxError

NAME = "journal.jsonl"
MAX_BYTES = 4 << 20

logger = logging.getLogger(__name__)


class Journal:
    """The sandboxes of one node that have begun and not ended. A folder belongs to one living node at a time.

    Lines reach the file with each call, so that they outlive this process; after a loss of power there is nothing left
    to be told about.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / NAME
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise SandboxError(f"{folder} belongs to a node that runs; give this one another folder") from error
        self.lost = _unfinished(self._path)
        """What the node before had begun and not ended: owners by sandbox id."""
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._open: dict[str, str] = {}
        self._num_bytes = 0
        self._is_behind = False

    def begin(self, sandbox_id: str, owner: str) -> None:
        """A sandbox is about to be; `SandboxError` where that cannot be written."""
        self._open[sandbox_id] = owner
        try:
            self._write({"begin": sandbox_id, "owner": owner})
        except OSError as error:
            del self._open[sandbox_id]
            raise SandboxError(f"the journal {self._path} cannot be written: {error.strerror}") from error

    def end(self, sandbox_id: str) -> None:
        """Nothing of it is left. Where that cannot be written now, it is with the next line that can."""
        self._open.pop(sandbox_id, None)
        try:
            self._write({"end": sandbox_id})
            if self._num_bytes > MAX_BYTES:
                self._shorten()
        except OSError as error:
            logger.error("the journal %s cannot be written: %s", self._path, error.strerror)

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._file)
        os.close(self._lock)

    def _write(self, line: dict[str, str]) -> None:
        if self._is_behind:
            self._shorten()
            return
        data = json.dumps(line).encode() + b"\n"
        self._is_behind = True  # until all of it is there
        if os.write(self._file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._is_behind = False
        self._num_bytes += len(data)

    def _shorten(self) -> None:
        """Keep what is open only; a crash in between leaves the long file or the short one."""
        lines = [json.dumps({"begin": sandbox_id, "owner": owner}) + "\n" for sandbox_id, owner in self._open.items()]
        temporary = self._path.with_suffix(".new")
        temporary.write_text("".join(lines))
        file = os.open(temporary, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            temporary.rename(self._path)
        except OSError:
            os.close(file)
            raise
        os.close(self._file)
        self._file = file
        self._num_bytes = 0
        self._is_behind = False


def _unfinished(path: Path) -> dict[str, str]:
    begun: dict[str, str] = {}
    if not path.exists():
        return begun
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a node that was killed
            continue
        if "begin" in entry:
            begun[entry["begin"]] = entry["owner"]
        else:
            begun.pop(entry["end"], None)
    return begun
