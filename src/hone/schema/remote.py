"""What is asked of an environment that is installed in another Python, and what that answers."""

from typing import Any

import msgspec

from hone.schema.messages import Message, ToolSpec
from hone.schema.sampling import SamplingParameters, Turn
from hone.schema.tasks import Task
from hone.schema.traces import Node, Trace


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
    tools: list[ToolSpec]
    tools_are_known: bool


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


class AttemptWanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Run rollouts of one task; answered by `Attempted`, after a `TurnWanted` for each turn.

    as_group: score them together; else there is one. limits: the fields of `hone.envs.Limits`.
    """

    number: int
    task: Task
    attempts: list[int]
    as_group: bool
    sampling: SamplingParameters
    seed: int
    limits: dict[str, int | float | None]
    group: str


class Attempted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The traces, in the order of the attempts."""

    number: int
    traces: list[Trace]


class Abandoned(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nobody waits for these rollouts any more."""

    number: int


class TurnWanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rollout wants the policy to continue; answered by `TurnGiven` or `TurnRefused`."""

    request: int
    number: int
    branch: list[Node]
    tools: list[ToolSpec]
    sampling: SamplingParameters


class TurnGiven(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the policy said."""

    request: int
    turn: Turn


class TurnRefused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why the policy did not answer."""

    request: int
    reason: str


TO_ROLLOUTS = (Load, AttemptWanted, Abandoned, TurnGiven, TurnRefused)
FROM_ROLLOUTS = (Loaded, Raised, Attempted, TurnWanted)

QUESTIONS = (Load, TaskWanted, GoldWanted, DifficultyWanted, IsSolved)
ANSWERS = (Loaded, TaskGiven, GoldGiven, DifficultyGiven, Solved, Raised)
