"""What becomes of the results of rollouts: who may bring them, when they are kept, and what they count as."""

from collections.abc import Collection

from hone.orchestrator.dispatch import Dispatch, Key
from hone.orchestrator.ledger import Ledger
from hone.orchestrator.purposes import PurposeOf, complaint_of
from hone.orchestrator.samples import UntrainableTraceError
from hone.schema.rollouts import RolloutResult
from hone.schema.traces import FailureClass
from hone.transport.traces import Location, TraceWriter

Arrival = tuple[bytes, RolloutResult]
"""A result, and the frame that it came in."""


class Results:
    """The way from env workers to the purposes of rollouts. What is told to a purpose is in a trace segment before.

    scored_together: the environments whose groups are held back until all of their results are there.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        scored_together: Collection[str],
        purpose_of: PurposeOf,
        writer: TraceWriter,
        ledger: Ledger,
    ) -> None:
        self._dispatch = dispatch
        self._scored_together = scored_together
        self._purpose_of = purpose_of
        self._writer = writer
        self._ledger = ledger
        self._seen: set[Key] = set()
        self._arrived: list[Arrival] = []
        self._held_back: dict[str, dict[int, Arrival]] = {}

    def receive(self, identity: bytes, frame: bytes, result: RolloutResult) -> None:
        """A result from this connection, to be taken by `settle` if it is waited for."""
        key = result.group, result.attempt
        if key in self._seen or not self._is_welcome(identity, result):
            return
        self._seen.add(key)
        arrival = frame, result
        self._arrived += self._hold_back(arrival) if self._is_whole(key) else [arrival]

    def settle(self) -> bool:
        """Keep everything received since the last time in one segment entry, then take it; was there anything?"""
        arrived, self._arrived = self._arrived, []
        self._seen.clear()
        if not arrived:
            return False
        location = self._keep(arrived)
        for _, result in arrived:
            self.take(result, location)
        return True

    def take(self, result: RolloutResult, location: Location) -> None:
        """A result that is kept, at `location`."""
        key, trace = (result.group, result.attempt), result.trace
        self._dispatch.done(key)
        if trace.failure is not None:
            self.fail(key, trace.failure.kind, complaint_of(trace.failure), is_final=self._is_whole(key))
            return
        try:
            self._purpose_of(result.group).finish(key, trace, location)
        except UntrainableTraceError as error:
            self.fail(key, error.kind, str(error), is_final=self._is_whole(key))

    def fail(self, key: Key, kind: FailureClass, complaint: str, *, is_final: bool = False) -> None:
        """A rollout has no valid outcome; what was held back of its group is void."""
        group, _ = key
        self._held_back.pop(group, None)
        self._purpose_of(group).fail(key, kind, complaint, is_final=is_final)

    def forget(self, group: str) -> None:
        """Nothing of the group is waited for any more."""
        self._held_back.pop(group, None)

    def _is_welcome(self, identity: bytes, result: RolloutResult) -> bool:
        """Whether the result is waited for.

        A failure, and a part of a group that is scored as a whole, count only from the worker that has it now.
        """
        key = result.group, result.attempt
        if not self._purpose_of(result.group).waits_for(key):
            return False
        is_any_workers = result.trace.failure is None and not self._is_whole(key)
        return is_any_workers or self._dispatch.is_owner(identity, key)

    def _is_whole(self, key: Key) -> bool:
        """Whether this attempt, which is waited for, is scored together with the others of its group."""
        group, _ = key
        return bool(self._scored_together) and self._purpose_of(group).environment_of(key) in self._scored_together

    def _hold_back(self, arrival: Arrival) -> list[Arrival]:
        """The results of a group once all are there. One with too few valid rollouts runs again as a whole."""
        _, result = arrival
        purpose = self._purpose_of(result.group)
        held = self._held_back.setdefault(result.group, {})
        held[result.attempt] = arrival
        if len(held) < purpose.group_size:
            return []
        del self._held_back[result.group]
        arrived = [held[attempt] for attempt in sorted(held)]
        complaints = [found for _, other in arrived if (found := purpose.complaint_about(other.trace)) is not None]
        if len(arrived) - len(complaints) >= purpose.min_valid:
            return arrived
        self._void(arrived, *complaints[0])
        return []

    def _void(self, arrived: list[Arrival], kind: FailureClass, complaint: str) -> None:
        self._keep([(frame, result) for frame, result in arrived if result.trace.failure is not None])
        for _, result in arrived:
            key = result.group, result.attempt
            self._dispatch.done(key)
            self.fail(key, kind, complaint)

    def _keep(self, arrived: list[Arrival]) -> Location:
        location = self._writer.append([frame for frame, _ in arrived])
        self._ledger.note_traces(self._writer.end)
        return location
