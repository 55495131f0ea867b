"""What the orchestrator's decisions are made of: the events that go in and the commands that come out."""

from dataclasses import dataclass

from hone.envs.retries import Failures
from hone.schema.batches import BatchWanted, CheckpointSaved, StepDone
from hone.schema.traces import FailureClass

# Events. `BatchWanted`, `StepDone` and `CheckpointSaved` of the trainer are events as they are.


@dataclass(frozen=True, slots=True)
class EngineServes:
    """The engine has acknowledged that it samples with `version`."""

    version: int


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine does not answer; nothing is admitted until it serves again."""


@dataclass(frozen=True, slots=True)
class RolloutFinished:
    """A rollout has a valid reward; min_version is None where the engine does not tell versions.

    agent_rewards: with several agents, what each earned that trains, in a fixed order.
    """

    group: int
    attempt: int
    reward: float
    min_version: int | None
    agent_rewards: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RolloutFailed:
    """A rollout has no valid reward. is_final: it is not tried again, because its group was scored without it."""

    group: int
    attempt: int
    kind: FailureClass
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class EvaluationFinished:
    """The evaluation of `version` is complete, with this mean reward."""

    version: int
    reward: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """The first event of a restored state: what ran when the orchestrator died is issued again."""


Event = (
    EngineServes
    | EngineLost
    | RolloutFinished
    | RolloutFailed
    | EvaluationFinished
    | Resumed
    | BatchWanted
    | StepDone
    | CheckpointSaved
)

# Commands, to be performed in order after the ledger has recorded them.


@dataclass(frozen=True, slots=True)
class StartGroup:
    """Draw the next task and attempt it `group_size` times; `version` is the one the deadline counts from."""

    group: int
    version: int


@dataclass(frozen=True, slots=True)
class RunAgain:
    """Issue an attempt again; `failures` are those so far (none: it was interrupted, not at fault)."""

    group: int
    attempt: int
    failures: Failures


@dataclass(frozen=True, slots=True)
class GiveUpAttempt:
    """The attempt stays without a reward."""

    group: int
    attempt: int
    kind: FailureClass


@dataclass(frozen=True, slots=True)
class FinishGroup:
    """The group is complete and waits for its batch."""

    group: int


@dataclass(frozen=True, slots=True)
class FilterGroup:
    """All rewards of the group are equal; it is not trained."""

    group: int


@dataclass(frozen=True, slots=True)
class DropGroup:
    """The group has too few valid rollouts; kind is the class of the last failure that counted."""

    group: int
    kind: FailureClass | None


@dataclass(frozen=True, slots=True)
class DropStaleGroup:
    """The engine sampled the group with older weights than it had acknowledged, and no batch may take it."""

    group: int


@dataclass(frozen=True, slots=True)
class CancelGroup:
    """Training ends before this group was finished."""

    group: int


@dataclass(frozen=True, slots=True)
class FormBatch:
    """Make the batch of `step` from these groups, durably."""

    step: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OfferBatch:
    """Tell the trainer that the batch of `step` is ready."""

    step: int


@dataclass(frozen=True, slots=True)
class MarkTrained:
    """Batches up to and including `step` are trained."""

    step: int


@dataclass(frozen=True, slots=True)
class ForgetBatches:
    """Every kept checkpoint covers the batches up to and including `step`; their files may go."""

    step: int


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Tell the engine to serve `version`."""

    version: int


@dataclass(frozen=True, slots=True)
class StartEvaluation:
    """Evaluate the policy that is served now under the name of `version`."""

    version: int


@dataclass(frozen=True, slots=True)
class EndEarly:
    """Training ends at `last_step` although the recipe has more steps."""

    last_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class EndTraining:
    """Tell the trainer, which asked, that there are no batches after `last_step`."""

    last_step: int


@dataclass(frozen=True, slots=True)
class GiveUpRun:
    """Nothing can be trained: the run has failed."""

    num_filtered: int
    num_failed: int
    kind: FailureClass | None


@dataclass(frozen=True, slots=True)
class GiveUpCollapsed:
    """The policy has got worse than what was trained on last, and nothing is left to learn from."""

    num_filtered: int
    reward: float
    trained_reward: float


@dataclass(frozen=True, slots=True)
class EndRun:
    """Everything is trained and evaluated."""


Command = (
    StartGroup
    | RunAgain
    | GiveUpAttempt
    | FinishGroup
    | FilterGroup
    | DropGroup
    | DropStaleGroup
    | CancelGroup
    | FormBatch
    | OfferBatch
    | MarkTrained
    | ForgetBatches
    | LoadWeights
    | StartEvaluation
    | EndEarly
    | EndTraining
    | GiveUpRun
    | GiveUpCollapsed
    | EndRun
)
