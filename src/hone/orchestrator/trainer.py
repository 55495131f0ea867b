"""The conversation with the trainer: what it asks for and reports, and what it is offered."""

import time
from collections.abc import Callable
from functools import partial

from hone.observability.metrics import Metrics
from hone.observability.spans import Spans
from hone.orchestrator.sockets import AfterCommit, RouterSocket, decode
from hone.schema.batches import (
    TRAINER_CHANNEL,
    Acknowledged,
    BatchPending,
    BatchReady,
    BatchWanted,
    CheckpointSaved,
    NoMoreBatches,
    StepDone,
)
from hone.schema.wire import Wire


class TrainerSide:
    """Speaks for the orchestrator with the trainer.

    decide: takes what the trainer says as an event, at once. obstacle_of: what the batch of a step waits for, None when
    it was offered or is not wanted. It asks again and again until it has its answer, maybe from another connection.
    """

    def __init__(
        self,
        socket: RouterSocket,
        *,
        decide: Callable[[BatchWanted | StepDone | CheckpointSaved], None],
        obstacle_of: Callable[[int], str | None],
        after_commit: AfterCommit,
        spans: Spans,
        metrics: Metrics,
    ) -> None:
        self._socket = socket
        self._decide = decide
        self._obstacle_of = obstacle_of
        self._after_commit = after_commit
        self._spans = spans
        self._metrics = metrics
        self._wire = Wire(*TRAINER_CHANNEL)
        self._askers: dict[int, bytes] = {}
        self._wanted_at: float | None = None

    def take(self) -> None:
        """Everything that has arrived since the last time."""
        for identity, frames in self._socket.take():
            for frame in frames:
                message = decode(self._wire, frame)
                if isinstance(message, BatchWanted):
                    self._take_wish(identity, message)
                elif isinstance(message, StepDone | CheckpointSaved):
                    self._decide(message)
                    self._tell(identity, Acknowledged.of(message))

    def offer(self, step: int, path: str) -> None:
        """The batch of `step`, which was asked for, is in the file at `path`, relative to the run's folder."""
        self._tell(self._askers[step], BatchReady(step, path))
        self._askers = {asked: identity for asked, identity in self._askers.items() if asked > step}
        if self._wanted_at is not None:
            waited = time.time() - self._wanted_at
            self._spans.record("wait", self._wanted_at, waited, step=step)
            self._metrics.write({"batch/wait_seconds": waited}, step)
            self._wanted_at = None

    def end(self, last_step: int) -> None:
        """There is no batch after `last_step`, though the trainer has asked for it."""
        self._tell(self._askers[last_step + 1], NoMoreBatches(last_step))

    def _take_wish(self, identity: bytes, message: BatchWanted) -> None:
        is_repeated = message.step in self._askers
        self._askers[message.step] = identity
        self._wanted_at = self._wanted_at or time.time()
        self._decide(message)
        if is_repeated and (obstacle := self._obstacle_of(message.step)) is not None:
            self._tell(identity, BatchPending(message.step, obstacle))

    def _tell(self, identity: bytes, message: BatchReady | BatchPending | NoMoreBatches | Acknowledged) -> None:
        self._after_commit(partial(self._socket.send, identity, [self._wire.encode(message)]))
