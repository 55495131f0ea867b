"""What became of every attempt, counted from the run's ledger."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

ORDER = ("trained", "batched", "finished", "filtered", "failed", "running", "issued")
MEANING = {
    "trained": "trained",
    "batched": "in a batch that waits for the trainer",
    "finished": "finished, waits for its group or a batch",
    "filtered": "left out: all rewards of its group are equal",
    "failed": "failed",
    "running": "running",
    "issued": "issued",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Attempts that ended alike; `failure` is the class, empty where there is none."""

    state: str
    failure: str
    count: int
    share: float


def outcomes_of(ledger: Path) -> list[Outcome]:
    """The attempts of training by outcome; none without a ledger."""
    if not ledger.exists():
        return []
    with closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT state, COALESCE(failure, ''), COUNT(*) FROM rollouts GROUP BY state, failure"
        ).fetchall()
    total = sum(count for _, _, count in rows)
    ordered = sorted(rows, key=lambda row: (ORDER.index(row[0]), -row[2]))
    return [Outcome(MEANING[state], failure, count, count / total) for state, failure, count in ordered]
