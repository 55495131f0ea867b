"""The conversation with the env workers: who is there, what they bring, what they are sent, and who is given up."""

import logging
import time
from collections.abc import Callable
from functools import partial

from hone.config.recipe import WorkersSection
from hone.observability.logs import fields
from hone.orchestrator.dispatch import Dispatch, Lost
from hone.orchestrator.requests import Requests
from hone.orchestrator.results import Results
from hone.orchestrator.sockets import AfterCommit, RouterSocket, decode
from hone.schema.rollouts import (
    FRAMES_PER_MESSAGE,
    WORKER_CHANNEL,
    Farewell,
    Heartbeat,
    RolloutCancel,
    RolloutResult,
    Shutdown,
    WorkerHello,
)
from hone.schema.traces import FailureClass
from hone.schema.wire import Wire

logger = logging.getLogger("hone.orchestrator.workers")

SILENT_BEATS = 10
STALLS_OF_SILENCE = 1.5
"""So many of the longest stalls are waited for before silence is death: after one, a worker goes on or says farewell."""
GRACE_SECONDS = 120.0
"""A rollout is given up this long after its worker should have ended it."""


class WorkerSide:
    """Speaks for the orchestrator with all env workers of the run.

    note_stall: told every heartbeat. rollout_seconds: when a worker should have ended a rollout.
    """

    def __init__(
        self,
        socket: RouterSocket,
        dispatch: Dispatch,
        requests: Requests,
        results: Results,
        *,
        after_commit: AfterCommit,
        note_stall: Callable[[Heartbeat], None],
        section: WorkersSection,
        rollout_seconds: float,
    ) -> None:
        self._socket = socket
        self._dispatch = dispatch
        self._requests = requests
        self._results = results
        self._after_commit = after_commit
        self._note_stall = note_stall
        self._silence_seconds = max(
            SILENT_BEATS * section.heartbeat_seconds, STALLS_OF_SILENCE * section.max_stall_seconds
        )
        self._overdue_seconds = rollout_seconds + GRACE_SECONDS
        self._wire = Wire(*WORKER_CHANNEL)

    def take(self) -> bool:
        """Everything that has arrived since the last time; whether results were among it."""
        now = time.monotonic()
        farewells: list[Farewell] = []
        for identity, frames in self._socket.take():
            for frame in frames:
                match decode(self._wire, frame):
                    case RolloutResult() as result:
                        self._results.receive(identity, frame, result)
                    case WorkerHello() as hello:
                        self._greet(hello, identity, now)
                    case Heartbeat() as beat:
                        self._hear(beat, identity, now)
                    case Farewell() as farewell:
                        farewells.append(farewell)
            self._dispatch.hear(identity, now)
        has_results = self._results.settle()
        for farewell in farewells:  # after the result that tells whose fault it is
            logger.warning("an env worker ends itself", extra=fields(worker=farewell.worker, reason=farewell.reason))
            self._lose(self._dispatch.dismiss(farewell.worker))
        return has_results

    def send_requests(self) -> None:
        """Hand out what was asked for, as far as workers have room."""
        outgoing: dict[bytes, list[bytes]] = {}
        for identity, request in self._requests.assign(time.monotonic()):
            outgoing.setdefault(identity, []).append(self._wire.encode(request))
        for identity, frames in outgoing.items():
            self._after_commit(partial(self._send, identity, frames))

    def cancel(self, group: str) -> None:
        """Nothing of the group is waited for any more."""
        self._results.forget(group)
        self._send_cancel([group], self._requests.withdraw(group))

    def give_up_silent(self, now: float) -> None:
        """What ran in workers that were not heard for too long runs anew elsewhere."""
        for lost in self._dispatch.silent(now, self._silence_seconds):
            self._lose(lost)

    def give_up_overdue(self, now: float) -> None:
        """Rollouts that their workers, heard or not, should have ended long ago have failed."""
        for key in self._dispatch.overdue(now, self._overdue_seconds):
            self._results.fail(key, FailureClass.TIMEOUT, "the worker did not end the rollout in time")

    def say_goodbye(self) -> None:
        """The run is over."""
        frame = self._wire.encode(Shutdown("the run is over"))
        for identity in self._dispatch.identities:
            self._socket.send(identity, [frame])

    def _greet(self, hello: WorkerHello, identity: bytes, now: float) -> None:
        logger.info("env worker is here", extra=fields(worker=hello.worker, pid=hello.pid))
        self._lose(self._dispatch.greet(hello.worker, hello.pid, identity, frozenset(hello.environments), now))

    def _hear(self, beat: Heartbeat, identity: bytes, now: float) -> None:
        self._note_stall(beat)
        if not self._dispatch.hear(identity, now):
            self._take_back(beat, identity, now)

    def _take_back(self, beat: Heartbeat, identity: bytes, now: float) -> None:
        """A worker that stood still for so long that it was taken for dead has gone on: its rollouts run anew."""
        groups = self._dispatch.take_back(identity, now)
        if groups is not None:
            logger.warning(
                "an env worker is back", extra=fields(worker=beat.worker, stall_seconds=beat.max_stall_seconds)
            )
            self._send_cancel(groups, [identity])

    def _lose(self, lost: Lost | None) -> None:
        if lost is None or not lost.keys:
            return
        kind = FailureClass.WORKER if lost.has_died else FailureClass.CANCELLED
        logger.warning("rollouts of a lost worker are issued again", extra=fields(worker=lost.worker, n=len(lost.keys)))
        for key in lost.keys:
            self._results.fail(key, kind, f"env worker {lost.worker} died")

    def _send_cancel(self, groups: list[str], identities: list[bytes]) -> None:
        frames = [self._wire.encode(RolloutCancel(group)) for group in groups]
        for identity in identities:
            self._after_commit(partial(self._send, identity, frames))

    def _send(self, identity: bytes, frames: list[bytes]) -> None:
        for start in range(0, len(frames), FRAMES_PER_MESSAGE):
            self._socket.send(identity, frames[start : start + FRAMES_PER_MESSAGE])
