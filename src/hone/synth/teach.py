"""Let a teacher attempt tasks, keeping every trace, so that an interrupted synthesis goes on where it stopped."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hone.envs.attempts import Assignment, assign, run_assignments
from hone.envs.environment import Environment
from hone.envs.rollout import Limits
from hone.envs.sampler import Sampler
from hone.schema.rollouts import RolloutResult
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, Trace
from hone.schema.wire import Wire
from hone.transport.traces import TraceWriter, read_frame, read_traces

DRAWS_PER_TASK = 20
"""Endless sources may repeat a task; after so many times the wanted number of draws we take what was found."""
MAX_SILENCE = 32
"""After so many rollouts in a row that failed because the teacher gave no answer, and none that did not, we stop."""


Identity = tuple[str, str, int]
"""Environment, task key and attempt: what a trace is known by."""


class TeacherError(ValueError):
    """The teacher does not answer."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must be equal for a synthesis to go on: otherwise its old traces are another teacher's, or of other tasks.

    environments: name to version and arguments. source: what is behind the teacher's name, such as a fingerprint of its
    weights.
    """

    environments: dict[str, tuple[str, dict[str, Any]]]
    teacher: str
    source: str
    sampling: SamplingParameters
    max_turns: int | None
    seed: int


@dataclass(slots=True)
class Progress:
    """How far it is."""

    num_total: int
    num_done: int = 0
    num_failed: int = 0
    sum_reward: float = 0.0

    @property
    def mean_reward(self) -> float:
        """Over the rollouts that are done and did not fail."""
        return self.sum_reward / max(1, self.num_done - self.num_failed)

    def count(self, trace: Trace) -> None:
        self.num_done += 1
        self.num_failed += trace.failure is not None
        self.sum_reward += 0.0 if trace.failure is not None else trace.reward


@contextlib.contextmanager
def claim(folder: Path, settings: Settings) -> Iterator[None]:
    """The data set's folder, held by this process while the body runs.

    Raises `ValueError` when another process holds it, or when it belongs to other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process works in {folder}; wait for it, or give another synthesis.name"
            ) from error
        _check_settings(folder / "settings.json", settings)
        yield
    finally:
        os.close(lock)


def wanted_attempts(
    environments: Mapping[str, Environment], num_tasks: Mapping[str, int], attempts: int
) -> list[Assignment]:
    """`attempts` attempts at each of the first different train tasks of each environment."""
    return [
        assignment
        for name, count in num_tasks.items()
        for task in train_tasks(environments[name], count)
        for assignment in assign(environments[name], task, range(attempts))
    ]


async def teach(
    wanted: Sequence[Assignment],
    sampler_for: Callable[[Assignment], Sampler],
    *,
    sampling: SamplingParameters,
    seed: int,
    max_concurrent: int,
    traces: Path,
    limits: Limits = Limits(),
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Carry out what has no trace without a failure in the segments at `traces`, and add the traces.

    An assignment of several attempts, which are scored together, is carried out anew when one of them is missing.

    Raises `TeacherError` when the teacher is silent.
    """
    tell = progress or (lambda so_far: None)
    state = Progress(sum(len(assignment.attempts) for assignment in wanted))
    done = _recall(traces, wanted, state)
    tell(state)
    missing = [assignment for assignment in wanted if not done.issuperset(identities_of(assignment))]
    wire = Wire(RolloutResult)
    silence = _Silence()
    with TraceWriter(traces) as writer:

        def keep(trace: Trace) -> None:
            writer.append([wire.encode(RolloutResult(trace.group, trace.attempt, trace))])
            state.count(trace)
            tell(state)
            silence.hear(trace)

        try:
            await run_assignments(
                missing, sampler_for, sampling, seed, max_concurrent=max_concurrent, deliver=keep, limits=limits
            )
        except* ValueError as group:  # a silent teacher, or an environment without the gold answer that is asked for
            raise group.exceptions[0] from None


def finished_traces(folder: Path, wanted: Sequence[Assignment]) -> Iterator[tuple[Environment, Trace]]:
    """The latest trace of each attempt, in the order of `wanted`: one that failed may have been made again.

    Only where each trace lies is kept in memory.
    """
    places = {_identity_in(result.trace): location for location, result in read_traces(folder)}
    for assignment in wanted:
        for identity in identities_of(assignment):
            if identity in places:
                (result,) = read_frame(folder, places[identity])
                yield assignment.environment, result.trace


def train_tasks(environment: Environment, count: int) -> list[Task]:
    """The first different train tasks, fewer where there are no more."""
    available = environment.num_train_tasks
    if available == 0:
        raise ValueError(f"environment {environment.name!r} has no train tasks for a teacher to attempt")
    found: dict[str, Task] = {}
    for index in range(DRAWS_PER_TASK * count if available is None else available):
        task = environment.train_task(index)
        found.setdefault(task.key, task)
        if len(found) == count:
            break
    return list(found.values())


@dataclass(slots=True)
class _Silence:
    """Notices a teacher that never answers."""

    num_failed: int = 0
    has_answered: bool = False

    def hear(self, trace: Trace) -> None:
        if trace.failure is None or trace.failure.kind is not FailureClass.MODEL:
            self.has_answered = True
            return
        self.num_failed += 1
        if self.num_failed >= MAX_SILENCE and not self.has_answered:
            raise TeacherError(f"the teacher answered none of {self.num_failed} rollouts: {trace.failure.message}")


def _recall(folder: Path, wanted: Sequence[Assignment], state: Progress) -> set[Identity]:
    """What an earlier run has done, failures aside; counted where its whole assignment is done."""
    latest = {_identity_in(result.trace): _reward_in(result.trace) for _, result in read_traces(folder)}
    done = {identity for identity, reward in latest.items() if reward is not None}
    for assignment in wanted:
        identities = identities_of(assignment)
        if done.issuperset(identities):
            state.num_done += len(identities)
            state.sum_reward += sum(latest[identity] or 0.0 for identity in identities)
    return done


def identities_of(assignment: Assignment) -> list[Identity]:
    """What the traces of an assignment are known by."""
    return [(assignment.environment.name, assignment.task.key, attempt) for attempt in assignment.attempts]


def _reward_in(trace: Trace) -> float | None:
    return None if trace.failure is not None else trace.reward


def _identity_in(trace: Trace) -> Identity:
    return (trace.environment, trace.task.key, trace.attempt)


def _check_settings(path: Path, settings: Settings) -> None:
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(settings)))
        temporary.replace(path)
        return
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Settings)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} does not hold the settings of a synthesis: {error}") from error
    for name in Settings.__struct_fields__:
        old, new = getattr(found, name), getattr(settings, name)
        if old != new:
            raise ValueError(
                f"{path.parent} holds a synthesis with {name} = {old!r}, this one has {new!r};"
                " give another synthesis.name, or delete the folder to start over"
            )
