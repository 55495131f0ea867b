"""What the orchestrator and an evaluation ask of env workers, and what these answer."""

import msgspec

from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task
from hone.schema.traces import Trace


class RolloutRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Attempt one task `len(attempts)` times as one group; answered by one `RolloutResult` for each attempt.

    seed: the run's seed; the sampling seed of a turn is derived from (seed, "sampling", task key, attempt, turn).
    """

    group: str
    environment: str
    task: Task
    attempts: list[int]
    sampling: SamplingParameters
    seed: int


class RolloutResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One finished rollout of a group, sent as soon as it is scored."""

    group: str
    attempt: int
    trace: Trace


class RolloutCancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Give up a group; nothing more is answered for it."""

    group: str


class WorkerHello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker is ready for work and runs nothing: after each (re)connection."""

    worker: str
    pid: int
    environments: list[str]


class Heartbeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A worker is alive: its rollouts under way and the longest stall of its event loop since the last beat.

    stalled_in: the functions that stood still, with file and line, where the stall was long enough to look at;
    stalled_environment: whose they were.
    """

    worker: str
    num_running: int
    max_stall_seconds: float
    stalled_in: str = ""
    stalled_environment: str = ""


class Farewell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker ends itself: what it still runs is not at fault and may run elsewhere."""

    worker: str
    reason: str


class Shutdown(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stop after this message."""

    reason: str


WORKER_CHANNEL = (WorkerHello, Heartbeat, Farewell, RolloutResult, RolloutRequest, RolloutCancel, Shutdown)
"""What travels between the orchestrator and its env workers."""

FRAMES_PER_MESSAGE = 256
"""A multipart message of that channel carries at most so many of them."""
