"""How often a failed rollout is attempted again: by the class of its failure, decided in one place for each attempt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from hone.schema.traces import FailureClass

Failures = Mapping[FailureClass, int]
"""How often an attempt has failed so far, by class."""

NO_FAILURES: Failures = MappingProxyType({})

DEFAULT: Failures = MappingProxyType(
    {
        FailureClass.MODEL: 2,
        FailureClass.TOOL: 2,
        FailureClass.SANDBOX: 2,
        FailureClass.JUDGE: 2,
        FailureClass.HARNESS: 2,
        # What the policy wrote is written again by the same seed, and meets the same bug or the same deadline.
        FailureClass.ENVIRONMENT: 0,
        FailureClass.TIMEOUT: 0,
        # Whose fault the death of a process was is not known; most of its rollouts had no part in it.
        FailureClass.WORKER: 10,
    }
)


@dataclass(frozen=True, slots=True)
class Retries:
    """The policy. allowed: further attempts after failures of a class; a class that is missing has none.

    A rollout that was cancelled did not fail: it is attempted again as often as that happens.
    """

    allowed: Failures = field(default_factory=lambda: DEFAULT)

    def permit(self, failures: Failures, kind: FailureClass) -> bool:
        """Whether there is another attempt after a failure of `kind`, which `failures` counts already."""
        return kind is FailureClass.CANCELLED or failures.get(kind, 0) <= self.allowed.get(kind, 0)


def counted(failures: Failures, kind: FailureClass) -> Failures:
    """The failures with one more; a cancellation is none."""
    if kind is FailureClass.CANCELLED:
        return failures
    return {**failures, kind: failures.get(kind, 0) + 1}


def total(failures: Failures) -> int:
    """Failures of all classes."""
    return sum(failures.values())
