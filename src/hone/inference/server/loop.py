"""The thread that steps the engine: serves the token channel itself, takes calls from other threads between steps."""

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq

from hone.inference.engine.engine import Engine, StepResult
from hone.inference.server.tokens import TokenServer

logger = logging.getLogger(__name__)

T = TypeVar("T")

REPORT_SECONDS = 2.0
JOIN_SECONDS = 60.0


class EngineLoop:
    """Steps as long as there is work and sleeps on its sockets when there is none.

    deliver: called in the engine's thread with what a step brought for others than the token channel. report: called
    there every few seconds. `failure` is what the thread died of.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokens_address: str | None = None,
        deliver: Callable[[StepResult], None] | None = None,
        report: Callable[[Engine], None] | None = None,
        died: Callable[[], None] | None = None,
    ) -> None:
        self.engine = engine
        self.paused = False
        self.failure: BaseException | None = None
        self._tokens = TokenServer(tokens_address) if tokens_address is not None else None
        self._deliver = deliver
        self._report = report
        self._died = died
        self._calls: deque[tuple[Callable[[Engine], Any], Future[Any]]] = deque()
        self._stopped = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._wake()
        self._thread.join(JOIN_SECONDS)
        if self._tokens is not None:
            self._tokens.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Have the engine's thread run `function` between two steps."""
        future: Future[T] = Future()
        self._calls.append((function, future))
        self._wake()
        if self.failure is not None:
            self._refuse_calls()
        return future

    def pause(self) -> None:
        """Finish the step under way and make none until `resume`; requests are still accepted."""
        self.call(lambda _: setattr(self, "paused", True)).result(JOIN_SECONDS)

    def resume(self) -> None:
        self.call(lambda _: setattr(self, "paused", False)).result(JOIN_SECONDS)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # whatever ends this thread must end the process, readably
            self.failure = error
            logger.exception("the engine failed")
            self._refuse_calls()
            if self._died is not None:
                self._died()

    def _serve(self) -> None:
        engine, tokens = self.engine, self._tokens
        poller = zmq.Poller()
        poller.register(self._wake_reader, zmq.POLLIN)
        if tokens is not None:
            poller.register(tokens.socket, zmq.POLLIN)
        next_report = time.monotonic() + REPORT_SECONDS
        while not self._stopped:
            if tokens is not None:
                tokens.receive(engine)
            self._make_calls()
            if engine.has_work and not self.paused:
                self._publish(engine.step())
            else:
                poller.poll(int(1000 * REPORT_SECONDS))
                self._drain_wakes()
            if time.monotonic() >= next_report:
                next_report = time.monotonic() + REPORT_SECONDS
                self._look_after()

    def _publish(self, result: StepResult) -> None:
        finished = result.finished
        if finished and self._tokens is not None:
            finished = self._tokens.answer(finished)
        if (finished or result.new_tokens) and self._deliver is not None:
            self._deliver(StepResult(finished, result.new_tokens))

    def _look_after(self) -> None:
        if self._tokens is not None:
            self._tokens.drop_silent(self.engine)
        if self._report is not None:
            self._report(self.engine)

    def _make_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(self.engine))
            except Exception as error:  # carried to the caller, who waits on the future
                future.set_exception(error)

    def _refuse_calls(self) -> None:
        while self._calls:
            _, future = self._calls.popleft()
            future.set_exception(RuntimeError(f"the engine failed: {self.failure}"))

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"w")
        except (BlockingIOError, OSError):  # full: it will wake; closed: it is gone
            return

    def _drain_wakes(self) -> None:
        try:
            self._wake_reader.recv(4096)
        except BlockingIOError:
            return
