"""The trainer's end of the protocol, against an orchestrator that forgets, repeats and restarts."""

import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

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
from hone.trainer.exchange import Exchange, OrchestratorSilent

Answer = Callable[[msgspec.Struct], list[msgspec.Struct]]


class Orchestrator:
    """Answers each message with what `answer` says, in a thread; remembers what it got."""

    def __init__(self, answer: Answer) -> None:
        self.received: list[msgspec.Struct] = []
        self._answer = answer
        self._wire = Wire(*TRAINER_CHANNEL)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(timeout=5)
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        while not self._over.is_set():
            if self._socket.poll(20):
                peer, data = self._socket.recv_multipart()
                message = self._wire.decode(data)
                self.received.append(message)
                for reply in self._answer(message):
                    self._socket.send_multipart([peer, self._wire.encode(reply)])


@pytest.fixture
def orchestrated() -> Iterator[Callable[[Answer], tuple[Orchestrator, Exchange]]]:
    open_now: list[Orchestrator | Exchange] = []

    def build(answer: Answer) -> tuple[Orchestrator, Exchange]:
        orchestrator = Orchestrator(answer)
        exchange = Exchange(orchestrator.address, resend_seconds=0.1)
        open_now.extend([exchange, orchestrator])
        return orchestrator, exchange

    yield build
    for one in open_now:
        one.close()


Build = Callable[[Answer], tuple[Orchestrator, Exchange]]


def obliging(message: msgspec.Struct) -> list[msgspec.Struct]:
    match message:
        case BatchWanted(step):
            return [BatchReady(step, f"batches/{step}")]
        case StepDone() | CheckpointSaved():
            return [Acknowledged.of(message)]
    raise AssertionError(message)


def test_a_batch_is_asked_for_and_received(orchestrated: Build) -> None:
    _, exchange = orchestrated(obliging)
    assert exchange.next_batch(4, 5.0) == BatchReady(4, "batches/4")


def test_an_unanswered_question_is_asked_again(orchestrated: Build) -> None:
    asked: list[msgspec.Struct] = []

    def deaf_twice(message: msgspec.Struct) -> list[msgspec.Struct]:
        asked.append(message)
        return obliging(message) if len(asked) > 2 else []

    _, exchange = orchestrated(deaf_twice)
    assert exchange.next_batch(1, 5.0) == BatchReady(1, "batches/1")
    assert asked == [BatchWanted(1)] * 3


def test_a_late_answer_to_an_old_question_is_passed_over(orchestrated: Build) -> None:
    def repeats_the_last(message: msgspec.Struct) -> list[msgspec.Struct]:
        assert isinstance(message, BatchWanted)
        return [BatchReady(message.step - 1, "old"), *obliging(message), *obliging(message)]

    _, exchange = orchestrated(repeats_the_last)
    assert exchange.next_batch(2, 5.0) == BatchReady(2, "batches/2")
    assert exchange.next_batch(3, 5.0) == BatchReady(3, "batches/3")


def test_reports_arrive_in_order_each_after_the_one_before_is_acknowledged(orchestrated: Build) -> None:
    seen: list[msgspec.Struct] = []

    def deaf_once(message: msgspec.Struct) -> list[msgspec.Struct]:
        seen.append(message)
        return obliging(message) if len(seen) > 1 else []

    _, exchange = orchestrated(deaf_once)
    exchange.report(StepDone(5, "weights/v000005"))
    exchange.report(CheckpointSaved(5, 0))
    assert exchange.settle(5.0)
    assert seen == [StepDone(5, "weights/v000005")] * 2 + [CheckpointSaved(5, 0)]


def test_reports_are_delivered_while_a_batch_is_awaited(orchestrated: Build) -> None:
    orchestrator, exchange = orchestrated(obliging)
    exchange.report(StepDone(1, "weights/v000001"))
    assert exchange.next_batch(2, 5.0) == BatchReady(2, "batches/2")
    assert exchange.settle(5.0)
    assert orchestrator.received == [StepDone(1, "weights/v000001"), BatchWanted(2)]


def test_the_end_of_the_run_is_an_answer(orchestrated: Build) -> None:
    _, exchange = orchestrated(lambda message: [NoMoreBatches(7)])
    assert exchange.next_batch(8, 5.0) == NoMoreBatches(7)


def test_silence_has_a_deadline(orchestrated: Build) -> None:
    _, exchange = orchestrated(lambda message: [])
    with pytest.raises(OrchestratorSilent, match="no batch for step 3"):
        exchange.next_batch(3, 0.3)
    exchange.report(CheckpointSaved(2, 0))
    assert not exchange.settle(0.2)


def test_the_acknowledgement_of_a_step_does_not_acknowledge_its_checkpoint(orchestrated: Build) -> None:
    def forgets_checkpoints(message: msgspec.Struct) -> list[msgspec.Struct]:
        answer = Acknowledged.of(StepDone(5, ""))
        return [answer, answer] if isinstance(message, StepDone) else []

    orchestrator, exchange = orchestrated(forgets_checkpoints)
    exchange.report(StepDone(5, "weights/v000005"))
    exchange.report(CheckpointSaved(5, 0))
    assert not exchange.settle(0.5)
    assert orchestrator.received.count(CheckpointSaved(5, 0)) > 1


def test_an_orchestrator_that_answers_is_waited_for_beyond_the_deadline(orchestrated: Build) -> None:
    asked: list[msgspec.Struct] = []

    def slow(message: msgspec.Struct) -> list[msgspec.Struct]:
        asked.append(message)
        return obliging(message) if len(asked) > 8 else [BatchPending(1, "8 rollouts")]

    _, exchange = orchestrated(slow)
    assert exchange.next_batch(1, 0.4) == BatchReady(1, "batches/1")
