"""How rollouts are asked for: at once, or later after failures; groups that are scored together in one request."""

import asyncio
from collections.abc import Callable, Collection

import msgspec

from hone.orchestrator.dispatch import Dispatch
from hone.orchestrator.purposes import PurposeOf
from hone.schema.rollouts import RolloutRequest

RETRY_SECONDS = 0.25
LONGEST_RETRY_SECONDS = 10.0


class Requests:
    """The way to the queues of `dispatch`.

    scored_together: the environments whose groups are one request. wake: called when a delayed request is queued.
    """

    def __init__(
        self, dispatch: Dispatch, scored_together: Collection[str], purpose_of: PurposeOf, wake: Callable[[], None]
    ) -> None:
        self._dispatch = dispatch
        self._scored_together = scored_together
        self._purpose_of = purpose_of
        self._wake = wake
        self._gathered: dict[str, tuple[RolloutRequest, int]] = {}

    def submit(self, request: RolloutRequest, num_failures: int) -> None:
        """At once after an interruption; ever later after failures, so that a broken world is not hammered.

        What one tick asks for of a group that is scored together becomes one request.
        """
        if request.environment in self._scored_together:
            before, _ = self._gathered.get(request.group, (None, 0))
            attempts = request.attempts if before is None else [*before.attempts, *request.attempts]
            self._gathered[request.group] = msgspec.structs.replace(request, attempts=attempts), num_failures
        else:
            self._queue(request, num_failures)

    def assign(self, now: float) -> list[tuple[bytes, RolloutRequest]]:
        """What is to be sent to whom at the end of a tick, as far as workers have room."""
        self._queue_gathered()
        assigned = self._dispatch.assign(now)
        for _, request in assigned:
            self._purpose_of(request.group).note_sent(request)
        return assigned

    def withdraw(self, group: str) -> list[bytes]:
        """Forget a group; returns the connections of the workers that run some of it."""
        self._gathered.pop(group, None)
        return self._dispatch.withdraw(group)

    def _queue_gathered(self) -> None:
        for request, num_failures in self._gathered.values():
            size = self._purpose_of(request.group).group_size
            assert len(request.attempts) == size, f"{request.attempts} are not the whole group"
            self._queue(request, num_failures)
        self._gathered.clear()

    def _queue(self, request: RolloutRequest, num_failures: int) -> None:
        if num_failures == 0:
            self._dispatch.submit(request)
            return
        delay = min(RETRY_SECONDS * 2 ** (num_failures - 1), LONGEST_RETRY_SECONDS)
        asyncio.get_running_loop().call_later(delay, self._queue_what_is_left, request)

    def _queue_what_is_left(self, request: RolloutRequest) -> None:
        """A late answer may have come during the delay."""
        purpose = self._purpose_of(request.group)
        attempts = [attempt for attempt in request.attempts if purpose.waits_for((request.group, attempt))]
        if attempts:
            self._dispatch.submit(msgspec.structs.replace(request, attempts=attempts))
            self._wake()
