"""The trainer's end of the conversation with the orchestrator: ask for batches, report steps and checkpoints.

Nothing is lost when the orchestrator restarts: what is not answered is sent again, and all messages are idempotent.
"""

import logging
import time
from collections import deque
from types import TracebackType
from typing import Self

import zmq

from hone.observability.logs import fields
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
from hone.schema.wire import Wire, WireError

logger = logging.getLogger(__name__)

Report = StepDone | CheckpointSaved
Answer = BatchReady | BatchPending | NoMoreBatches | Acknowledged
RESEND_SECONDS = 2.0
REMIND_SECONDS = 60.0
LINGER_MILLISECONDS = 500


class OrchestratorSilent(RuntimeError):
    """Neither a batch nor a word within the deadline; whoever started this process decides whether to start it again."""


class Exchange:
    """A connection to the orchestrator. Reports travel one at a time, in order; the next goes out when the one before
    is acknowledged."""

    def __init__(self, address: str, *, resend_seconds: float = RESEND_SECONDS) -> None:
        self._wire = Wire(*TRAINER_CHANNEL)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MILLISECONDS)
        self._socket.connect(address)
        self._address = address
        self._resend_seconds = resend_seconds
        self._reports: deque[Report] = deque()

    def report(self, report: Report) -> None:
        """Send a report, now or after those before it; returns at once."""
        self._reports.append(report)
        if len(self._reports) == 1:
            self._send(report)

    def next_batch(self, step: int, silence_seconds: float) -> BatchReady | NoMoreBatches:
        """Wait for the batch of `step`, as long as the orchestrator says that it is coming.

        `OrchestratorSilent` when it has said nothing for `silence_seconds`.
        """
        wanted = BatchWanted(step)
        self._send(wanted)
        answer = self._wait(wanted, silence_seconds)
        if answer is None:
            raise OrchestratorSilent(
                f"no batch for step {step} and no word from the orchestrator at {self._address}"
                f" for {silence_seconds:.0f} seconds"
            )
        return answer

    def settle(self, timeout_seconds: float) -> bool:
        """Wait until every report is acknowledged; False when the deadline came first."""
        if self._reports:
            self._wait(None, timeout_seconds)
        return not self._reports

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, wanted: BatchWanted | None, timeout_seconds: float) -> BatchReady | NoMoreBatches | None:
        """Receive until the wanted batch is there (or, with None, until the reports are answered), resending."""
        deadline = time.monotonic() + timeout_seconds
        resend_at = time.monotonic() + self._resend_seconds
        remind_at = time.monotonic() + REMIND_SECONDS
        while (now := time.monotonic()) < deadline:
            if now >= resend_at:
                self._send_again(wanted)
                resend_at = now + self._resend_seconds
            if self._socket.poll(max(1, int(1000 * (min(resend_at, deadline) - now)))) == 0:
                continue
            answer = self._receive()
            match answer:
                case Acknowledged():
                    self._acknowledge(answer)
                    if wanted is None and not self._reports:
                        return None
                case BatchReady(step) if wanted is not None and step == wanted.step:
                    return answer
                case BatchPending(step, waiting_for) if wanted is not None and step == wanted.step:
                    deadline = time.monotonic() + timeout_seconds
                    if time.monotonic() > remind_at:
                        remind_at = time.monotonic() + REMIND_SECONDS
                        logger.info("the next batch waits for %s", waiting_for, extra=fields(step=step))
                case NoMoreBatches() if wanted is not None:
                    return answer
                case _:
                    pass  # the answer to a question that was asked twice
        return None

    def _acknowledge(self, answer: Acknowledged) -> None:
        if self._reports and answer == Acknowledged.of(self._reports[0]):
            self._reports.popleft()
            if self._reports:
                self._send(self._reports[0])

    def _send_again(self, wanted: BatchWanted | None) -> None:
        if self._reports:
            self._send(self._reports[0])
        if wanted is not None:
            self._send(wanted)

    def _send(self, message: BatchWanted | Report) -> None:
        try:
            self._socket.send(self._wire.encode(message), zmq.DONTWAIT)
        except zmq.Again:  # the queue to an absent orchestrator is full; the message is sent again later
            logger.warning("the orchestrator does not read", extra=fields(address=self._address))

    def _receive(self) -> Answer | None:
        try:
            answer: Answer = self._wire.decode(self._socket.recv())
        except WireError as error:
            logger.warning("a message is passed over: %s", error)
            return None
        return answer
