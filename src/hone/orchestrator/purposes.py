"""What rollouts are run for, training or an evaluation: all that requests and results need to know of either."""

from collections.abc import Callable
from typing import Protocol

from hone.orchestrator.dispatch import Key
from hone.schema.rollouts import RolloutRequest
from hone.schema.traces import Failure, FailureClass, Trace
from hone.transport.traces import Location


class Purpose(Protocol):
    """Knows which of its rollouts are waited for, and takes their outcomes. All keys are of its own groups."""

    @property
    def group_size(self) -> int: ...

    @property
    def min_valid(self) -> int:
        """So many valid rollouts make a group that is scored together; with fewer it runs again as a whole."""
        ...

    def waits_for(self, key: Key) -> bool: ...

    def environment_of(self, key: Key) -> str | None:
        """The recipe's name for where a rollout that is waited for comes from; None when all is over."""
        ...

    def note_sent(self, request: RolloutRequest) -> None:
        """An env worker is about to have this request."""
        ...

    def complaint_about(self, trace: Trace) -> tuple[FailureClass, str] | None:
        """Why the trace cannot be used, if so: a class and what is said of it."""
        ...

    def finish(self, key: Key, trace: Trace, location: Location) -> None:
        """A rollout that did not fail; raises `UntrainableTraceError` when it is of no use all the same."""
        ...

    def fail(self, key: Key, kind: FailureClass, complaint: str, *, is_final: bool = False) -> None: ...


PurposeOf = Callable[[str], Purpose]
"""Whose group this is, by its name."""

Submit = Callable[[RolloutRequest, int], None]
"""Asks for rollouts; the number is that of the failures so far."""


def complaint_of(failure: Failure) -> str:
    """A failure in one line."""
    return f"{failure.kind} at {failure.where}: {failure.message}"
