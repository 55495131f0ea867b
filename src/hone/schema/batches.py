"""What the trainer consumes: samples of one optimizer step as flat arrays, 13 bytes a token on the wire."""

import msgspec


class TrainingSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One token sequence of a branch. The four lists have one entry per token.

    loss_mask: 1 where a token was sampled by the policy and trains. logprobs: of the sampler, 0 elsewhere.
    advantages: 0 where loss_mask is 0. version: the lowest policy version among the sampled tokens.
    """

    token_ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    advantages: list[float]
    temperature: float
    version: int
    group: str = ""
    attempt: int = 0
    reward: float = 0.0


class TrainingBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The samples of one optimizer step, concatenated; little-endian raw arrays.

    lengths: int32[S], versions: int32[S], temperatures: float32[S], rewards: float32[S];
    token_ids: int32[N], loss_mask: uint8[N], logprobs: float32[N], advantages: float32[N].
    num_groups: how many groups of rollouts the samples come from.
    """

    step: int
    num_groups: int
    lengths: bytes
    versions: bytes
    temperatures: bytes
    rewards: bytes
    token_ids: bytes
    loss_mask: bytes
    logprobs: bytes
    advantages: bytes

    @property
    def num_samples(self) -> int:
        return len(self.lengths) // 4

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4


class BatchWanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trainer asks for the batch of `step`; answered by `BatchReady` when it exists, or by `NoMoreBatches`."""

    step: int


class BatchReady(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The batch of `step` lies, complete, at `path` (relative to the run's folder)."""

    step: int
    path: str


class BatchPending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The batch of `step` is not ready yet: the answer to a question asked again; `waiting_for` says why."""

    step: int
    waiting_for: str


class NoMoreBatches(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The run is over at `last_step`; the trainer writes its last checkpoint and ends."""

    last_step: int


class StepDone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Optimizer step `step` is done; its weights are policy version `step`, published in `weights` (run-relative)."""

    step: int
    weights: str


class CheckpointSaved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint of `step` is on disk.

    covered: no checkpoint that is kept needs a batch up to and including this step; 0 while fewer are kept than wanted.
    """

    step: int
    covered: int


class Acknowledged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The orchestrator has recorded what the trainer reported: the type of the report and its step."""

    report: str
    step: int

    @classmethod
    def of(cls, report: StepDone | CheckpointSaved) -> "Acknowledged":
        return cls(type(report).__name__, report.step)


TRAINER_CHANNEL = (BatchWanted, BatchReady, BatchPending, NoMoreBatches, StepDone, CheckpointSaved, Acknowledged)
"""What travels between the orchestrator and the trainer."""
