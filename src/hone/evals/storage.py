"""The folder of one model on one environment: settings, traces that grow rollout by rollout, outcomes and result."""

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from hone.evals.results import EvalResult, Outcome, outcome_of
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task
from hone.schema.traces import Trace

logger = logging.getLogger("hone.evals.storage")

SETTINGS, TRACES, OUTCOMES, RESULT = "settings.json", "traces.jsonl", "outcomes.jsonl", "result.json"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """What must be equal for an evaluation to be resumed: otherwise its old traces answer another question.

    arguments: of the environment's load_environment. budgets: the limits that truncate a rollout. source: what is behind
    the model's name, an address or the fingerprint of its weights.
    """

    environment: str
    environment_version: str
    model: str
    sampling: SamplingParameters
    seed: int
    arguments: dict[str, Any] = {}
    budgets: dict[str, float] = {}
    source: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that are equal for equal settings, in every process."""
        content = msgspec.json.encode(self, order="deterministic")
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def group_of(self, task: Task) -> str:
        """The group of a task's rollouts: those that compare, and so were made with equal settings."""
        return f"{self.fingerprint}-{task.key}"


class EvalFolder:
    """The files of one evaluation. Use as a context: it holds traces.jsonl open for appending, and locked.

    A trace is one line and one write, so a process that dies leaves at most a torn last line, which the next one cuts
    off. Lines that cannot be read are passed over; their rollouts run again. What was concluded from fewer traces is
    taken away before the first new one is added, so that an evaluation that is under way has no result.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self._settings = settings
        self._encoder = msgspec.json.Encoder()
        self._is_concluded = True

    @property
    def traces_path(self) -> Path:
        return self.path / TRACES

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.traces_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._check_settings()
            _cut_torn_line(self._file)
        except BaseException:  # a cancellation too: undo, then pass it on
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def append(self, trace: Trace) -> None:
        """Add a trace; it survives the death of this process from now on."""
        if self._is_concluded:
            self._take_back_conclusions()
        line = self._encoder.encode(trace) + b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"{self.traces_path}: only {written} of {len(line)} bytes were written; is the disk full?")

    def traces(self) -> Iterator[Trace]:
        """The traces that were made with these settings, in the order in which they were written."""
        num_others = 0
        for trace in read_traces(self.traces_path):
            if trace.group.startswith(self._settings.group_of(trace.task)):  # groups scored together have numbers
                yield trace
            else:
                num_others += 1
        if num_others:
            logger.warning("%s: passed over %d traces that were made with other settings", self.traces_path, num_others)

    def save_outcomes(self, outcomes: Iterable[Outcome]) -> None:
        """Write outcomes.jsonl: whole, or not at all."""
        _write(self.path / OUTCOMES, b"".join(self._encoder.encode(outcome) + b"\n" for outcome in outcomes))

    def save_result(self, result: EvalResult) -> None:
        """Write result.json: whole, or not at all."""
        _write(self.path / RESULT, msgspec.json.format(msgspec.json.encode(result)))

    def _take_back_conclusions(self) -> None:
        for name in (RESULT, OUTCOMES):
            (self.path / name).unlink(missing_ok=True)
        self._is_concluded = False

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process evaluates in {self.path}; wait for it, or use another folder") from error

    def _check_settings(self) -> None:
        path = self.path / SETTINGS
        if not path.exists():
            _write(path, msgspec.json.format(msgspec.json.encode(self._settings)))
            return
        found = read_settings(self.path)
        for name in Settings.__struct_fields__:
            old, new = getattr(found, name), getattr(self._settings, name)
            if old != new:
                raise ValueError(
                    f"{self.path} holds an evaluation with {name} = {old!r}, this one has {new!r}; use another folder"
                )


def read_settings(folder: Path) -> Settings:
    """The settings that the traces in a folder were made with."""
    path = folder / SETTINGS
    try:
        return msgspec.json.decode(path.read_bytes(), type=Settings)
    except FileNotFoundError as error:
        raise ValueError(f"no evaluation in {folder}: there is no {SETTINGS}") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} does not hold the settings of an evaluation: {error}") from error


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


def read_outcomes(folder: Path) -> list[Outcome]:
    """One outcome for each (task, attempt) of a folder, a valid one where there is any.

    An evaluation that was killed has no outcomes yet: they are made from its traces, and solved is then what has a
    reward of 1, because the environment that may say otherwise is not asked.
    """
    path = folder / OUTCOMES
    if path.exists():
        try:
            return [msgspec.json.decode(line, type=Outcome) for line in path.read_bytes().splitlines()]
        except msgspec.DecodeError as error:
            raise ValueError(f"{path} does not hold outcomes of an evaluation: {error}") from error
    latest: dict[tuple[str, int], Outcome] = {}
    for trace in read_traces(folder / TRACES):
        outcome = outcome_of(trace)
        key = outcome.task, outcome.attempt
        if outcome.failure is None or key not in latest or latest[key].failure is not None:
            latest[key] = outcome
    return list(latest.values())


def read_result(folder: Path) -> EvalResult:
    """The result.json of an evaluation that is over."""
    path = folder / RESULT
    try:
        return msgspec.json.decode(path.read_bytes(), type=EvalResult)
    except FileNotFoundError as error:
        raise ValueError(f"no result at {path}; is the evaluation over?") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not the result of an evaluation: {error}") from error


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


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
