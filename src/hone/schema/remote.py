"""What is asked of an environment that is installed in another Python, and what that answers."""

from typing import Any

import msgspec

from hone.schema.messages import Message
from hone.schema.tasks import Task
from hone.schema.traces import Trace


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Load this environment; the first question. Answered by `Loaded`."""

    name: str
    arguments: dict[str, Any]


class Loaded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The environment is there: what is known of it without asking for a task."""

    name: str
    version: str
    num_train_tasks: int | None
    num_held_out_tasks: int | None
    has_gold: bool
    has_difficulty: bool
    scores_groups: bool
    group_seconds: float


class TaskWanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answered by `TaskGiven`."""

    index: int
    is_held_out: bool


class TaskGiven(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task of one of the splits."""

    task: Task


class GoldWanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answered by `GoldGiven`."""

    task: Task


class GoldGiven(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A correct conversation; None where nobody knows one."""

    messages: list[Message] | None


class DifficultyWanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answered by `DifficultyGiven`."""

    task: Task


class DifficultyGiven(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How hard a task is."""

    difficulty: float | None


class IsSolved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answered by `Solved`."""

    trace: Trace


class Solved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a trace counts as a success."""

    is_solved: bool


class Raised(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Instead of an answer: what the environment's code raised, its type's name first."""

    kind: str
    message: str


QUESTIONS = (Load, TaskWanted, GoldWanted, DifficultyWanted, IsSolved)
ANSWERS = (Loaded, TaskGiven, GoldGiven, DifficultyGiven, Solved, Raised)
