"""What sandboxes asked of the network: counted, and written down one line each where the node has a folder."""

import os
from pathlib import Path

import msgspec

from hone.schema.sandbox_network import NetworkRecord, Verdict

MAX_LOG_BYTES = 64 << 20


class NetworkLog:
    """`network.jsonl` in a folder, and `network.1.jsonl` with what was there before it grew too long.

    counts: requests by what became of them. A line that cannot be written (a full disk) is counted and
    otherwise given up: no sandbox waits for it.
    """

    def __init__(self, folder: Path | None, max_bytes: int = MAX_LOG_BYTES) -> None:
        self.counts = dict.fromkeys(Verdict, 0)
        self.num_unwritten = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._path = folder / "network.jsonl" if folder is not None else None
        self._max_bytes = max_bytes
        self._file = -1
        self._num_bytes = 0

    def add(self, record: NetworkRecord) -> None:
        """A request is over."""
        self.counts[record.verdict] += 1
        self.bytes_up += record.bytes_up
        self.bytes_down += record.bytes_down
        try:
            self._write(msgspec.json.encode(record) + b"\n")
        except OSError:
            self.num_unwritten += 1

    def close(self) -> None:
        """Write no more. Harmless when repeated."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, line: bytes) -> None:
        if self._path is None:
            return
        if self._file >= 0 and self._num_bytes + len(line) > self._max_bytes:
            self.close()
            self._path.replace(self._path.with_suffix(".1.jsonl"))
        if self._file < 0:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._num_bytes = os.fstat(self._file).st_size
        self._num_bytes += os.write(self._file, line)
