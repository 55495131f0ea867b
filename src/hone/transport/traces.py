"""Finished rollouts on disk: append-only compressed segments that lose at most an unfinished tail in a crash.

A segment is a sequence of frames: length and CRC-32 of the payload (little-endian, 4 bytes each), then the payload, a
zlib stream of a msgpack array of messages `RolloutResult` in their envelopes, just as they came over the wire.
"""

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from hone.schema.rollouts import RolloutResult
from hone.schema.wire import Wire

SEGMENT_BYTES = 64 * 2**20

_HEADER = struct.Struct("<II")
_NAME = re.compile(r"segment-(\d{6,})\.mpk\.zz")
_RECORDS = msgspec.msgpack.Decoder(list[msgspec.Raw])
_WIRE = Wire(RolloutResult)


class Location(NamedTuple):
    """Where a frame begins."""

    segment: int
    offset: int


BEGINNING = Location(0, 0)


class TraceWriter:
    """Appends frames. Opening cuts off a tail that a crash left incomplete."""

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._segment_bytes = segment_bytes
        segments = _segments(folder)
        self._segment = segments[-1] if segments else 0
        self._file = os.open(_path(folder, self._segment), os.O_CREAT | os.O_RDWR, 0o644)
        self._end = _end_of_frames(_path(folder, self._segment))
        os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)

    @property
    def end(self) -> Location:
        """Where the next frame will begin, unless a new segment begins before it."""
        return Location(self._segment, self._end)

    def append(self, records: Sequence[bytes]) -> Location:
        """Write encoded `RolloutResult` messages as one frame. After this returns they survive the process."""
        if self._end >= self._segment_bytes:
            self._begin_segment()
        array = b"\xdd" + struct.pack(">I", len(records)) + b"".join(records)
        payload = zlib.compress(array, 1)
        frame = _HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        location = self.end
        written = os.write(self._file, frame)
        while written < len(frame):
            written += os.write(self._file, frame[written:])
        self._end += len(frame)
        return location

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin_segment(self) -> None:
        os.close(self._file)
        self._segment += 1
        self._end = 0
        self._file = os.open(_path(self._folder, self._segment), os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)


def read_frame(folder: Path, location: Location) -> list[RolloutResult]:
    """The results of one frame; empty when there is no whole frame at this place."""
    path = _path(folder, location.segment)
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(location.offset)
        payload = _next_payload(file.read)
    return [] if payload is None else _results(payload)


def read_traces(folder: Path, start: Location = BEGINNING) -> Iterator[tuple[Location, RolloutResult]]:
    """All results from `start` on, each with the location of its frame, in the order in which they were written."""
    for segment in _segments(folder):
        if segment < start.segment:
            continue
        with _path(folder, segment).open("rb") as file:
            offset = start.offset if segment == start.segment else 0
            file.seek(offset)
            while (payload := _next_payload(file.read)) is not None:
                for result in _results(payload):
                    yield Location(segment, offset), result
                offset += _HEADER.size + len(payload)


def _results(payload: bytes) -> list[RolloutResult]:
    return [_WIRE.decode(bytes(record)) for record in _RECORDS.decode(zlib.decompress(payload))]


def _segments(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match.group(1)) for match in found if match is not None)


def _path(folder: Path, segment: int) -> Path:
    return folder / f"segment-{segment:06d}.mpk.zz"


def _end_of_frames(path: Path) -> int:
    end = 0
    with path.open("rb") as file:
        while (payload := _next_payload(file.read)) is not None:
            end += _HEADER.size + len(payload)
    return end


def _next_payload(read: Callable[[int], bytes]) -> bytes | None:
    """The next payload; None at the end, and at a frame that is cut short or damaged."""
    header = read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    length, checksum = _HEADER.unpack(header)
    payload = read(length)
    # A frame of length 0 is none of ours, but what a file system may leave of a frame after a power cut.
    return payload if length and len(payload) == length and zlib.crc32(payload) == checksum else None
