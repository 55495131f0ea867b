"""What became of every attempt, counted from the run's ledger."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """Attempts that ended alike; `failure` is the class, empty where there is none."""

    state: str
    failure: str
    count: int
    share: float


def outcomes_of(ledger: Path) -> list[Outcome]:
    return []
