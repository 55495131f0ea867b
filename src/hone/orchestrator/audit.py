"""Does the ledger of a run keep its promises? Counts what must be zero, from the ledger and the trace segments."""

import json
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from hone.transport.folders import RunFolder
from hone.transport.traces import read_traces


@dataclass(frozen=True, slots=True)
class Audit:
    """What became of a run's rollouts; the first four fields are zero in a run without faults.

    lost: finished rollouts whose trace is not on disk, or that belong to no batch although training is over.
    trained_twice: rollouts in more than one batch. regenerated: valid results beyond the first of the same attempt.
    too_stale: rollouts that were batched beyond the staleness bound.
    """

    lost: int
    trained_twice: int
    regenerated: int
    too_stale: int
    num_attempts: int
    num_trained: int
    num_batched: int
    num_filtered: int
    num_failed: int
    num_unfinished: int

    @property
    def is_clean(self) -> bool:
        return self.lost == self.trained_twice == self.regenerated == self.too_stale == 0


def audit(folder: Path) -> Audit:
    """Examine the run in `folder`; it may still be running."""
    run = RunFolder(folder)
    if not run.ledger.exists():
        raise ValueError(f"no ledger at {run.ledger}; give the folder of an RL run")
    # The ledger is read before the segments: what it mentions was in the segments before.
    with closing(sqlite3.connect(f"file:{run.ledger}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT r.number, r.attempt, r.state, a.min_version, r.step FROM rollouts r"
            " JOIN attempts a ON a.number = r.number AND a.attempt = r.attempt"
        ).fetchall()
        finished = set(database.execute("SELECT number, attempt FROM attempts WHERE state = 'finished'"))
        batches = [json.loads(groups) for (groups,) in database.execute("SELECT groups FROM batches")]
        meta = dict(database.execute("SELECT key, value FROM meta"))
    identity = json.loads(meta.get("identity", "{}"))
    found = Counter((result.group, result.attempt) for _, result in read_traces(run.traces) if not result.trace.failure)
    states = Counter(state for _, _, state, _, _ in rows)
    times_batched = Counter(number for groups in batches for number in groups)
    is_over = "last_step" not in meta and len(batches) >= float(meta.get("num_steps", "inf"))
    left_over = states["finished"] if is_over else 0
    return Audit(
        lost=sum(found[group_name(number), attempt] == 0 for number, attempt in finished) + left_over,
        trained_twice=sum(times_batched[number] > 1 for number, _, _, _, _ in rows),
        regenerated=sum(count - 1 for (group, _), count in found.items() if not group.startswith("eval-")),
        too_stale=sum(
            step - 1 - min_version > identity.get("max_staleness", float("inf"))
            for _, _, state, min_version, step in rows
            if state in ("batched", "trained") and min_version is not None
        ),
        num_attempts=len(rows),
        num_trained=states["trained"],
        num_batched=states["batched"],
        num_filtered=states["filtered"],
        num_failed=states["failed"],
        num_unfinished=states["issued"] + states["running"],
    )


def group_name(number: int) -> str:
    """How a training group is called on the wire."""
    return f"{number:08d}"
