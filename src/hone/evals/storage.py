"""An evaluation's folder: settings.json, traces.jsonl that grows rollout by rollout, result.json at the end."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from hone.evals.results import EvalResult
from hone.schema.sampling import SamplingParameters
from hone.schema.traces import Trace

logger = logging.getLogger("hone.evals.storage")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must be equal for an evaluation to be resumed: otherwise its old traces answer another question."""

    environment: str
    environment_version: str
    model: str
    sampling: SamplingParameters
    seed: int


class EvalFolder:
    """The files of one evaluation. Use as a context: it holds traces.jsonl open for appending.

    A trace is one line and one write, so a process that dies leaves at most a torn last line, which the next one cuts
    off. Lines that cannot be read are passed over; their rollouts run again.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self._settings = settings
        self._encoder = msgspec.json.Encoder()

    @property
    def traces_path(self) -> Path:
        return self.path / "traces.jsonl"

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        self._file = os.open(self.traces_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _cut_torn_line(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def append(self, trace: Trace) -> None:
        """Add a trace; it survives the death of this process from now on."""
        line = self._encoder.encode(trace) + b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"{self.traces_path}: only {written} of {len(line)} bytes were written; is the disk full?")

    def traces(self) -> Iterator[Trace]:
        """All readable traces, in the order in which they were written."""
        yield from read_traces(self.traces_path)

    def save_result(self, result: EvalResult) -> None:
        """Write result.json: whole, or not at all."""
        temporary = self.path / "result.json.tmp"
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
        temporary.replace(self.path / "result.json")

    def _check_settings(self) -> None:
        path = self.path / "settings.json"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self._settings)))
            temporary.replace(path)
            return
        try:
            found = msgspec.json.decode(path.read_bytes(), type=Settings)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path} does not hold the settings of an evaluation: {error}") from error
        for name in Settings.__struct_fields__:
            old, new = getattr(found, name), getattr(self._settings, name)
            if old != new:
                raise ValueError(
                    f"{self.path} holds an evaluation with {name} = {old!r}, this one has {new!r}; use another folder"
                )


def read_traces(path: Path) -> Iterator[Trace]:
    """The traces of a traces.jsonl; unreadable lines are counted and passed over."""
    decoder = msgspec.json.Decoder(Trace)
    num_unreadable = 0
    with path.open("rb") as file:
        for line in file:
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError:
                num_unreadable += 1
    if num_unreadable:
        logger.warning("%s: passed over %d unreadable lines", path, num_unreadable)


def read_result(folder: Path) -> EvalResult:
    """The result.json of an evaluation that is over."""
    path = folder / "result.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=EvalResult)
    except FileNotFoundError as error:
        raise ValueError(f"no result at {path}; is the evaluation over?") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not the result of an evaluation: {error}") from error


def _cut_torn_line(file: int) -> None:
    """Truncate to the end of the last whole line, searching backwards block by block."""
    end = size = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != size:
        os.ftruncate(file, end)
