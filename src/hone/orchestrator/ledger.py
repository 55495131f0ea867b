"""What happened to every rollout attempt, batch and checkpoint of a run, in SQLite: survives the death of any process.

An attempt is issued -> running -> finished | failed(class); its group is running -> finished -> batched(step), or
filtered, or failed(class); a batch is formed -> offered -> trained. The view `rollouts` shows each attempt with the
furthest of these. Records are buffered and written by `commit` in one transaction, once for each tick of the
orchestrator's loop: only then may anybody be told.
"""

import itertools
import json
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hone.envs.retries import Failures, total
from hone.orchestrator.curriculum import Outcome, solve_rate
from hone.orchestrator.mixture import Draw
from hone.schema.traces import FailureClass
from hone.transport.traces import BEGINNING, Location

LAYOUT = 2
BUSY_SECONDS = 30.0

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (
    number INTEGER PRIMARY KEY,
    environment TEXT NOT NULL,
    draw INTEGER NOT NULL,
    task_index INTEGER NOT NULL,
    task_key TEXT NOT NULL,
    version INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'running'
        CHECK (state IN ('running', 'finished', 'batched', 'filtered', 'failed')),
    failure TEXT,
    step INTEGER,
    completed INTEGER
);
CREATE TABLE IF NOT EXISTS attempts (
    number INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'issued' CHECK (state IN ('issued', 'running', 'finished', 'failed')),
    failure TEXT,
    num_failures INTEGER NOT NULL DEFAULT 0,
    failures TEXT NOT NULL DEFAULT '{}',
    reward REAL,
    min_version INTEGER,
    segment INTEGER,
    offset INTEGER,
    PRIMARY KEY (number, attempt)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (
    step INTEGER PRIMARY KEY,
    groups TEXT NOT NULL,
    num_samples INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'formed' CHECK (state IN ('formed', 'offered', 'trained'))
);
CREATE TABLE IF NOT EXISTS checkpoints (step INTEGER PRIMARY KEY);
CREATE INDEX IF NOT EXISTS outstanding ON groups (state) WHERE state IN ('running', 'finished');
CREATE VIEW IF NOT EXISTS rollouts AS
SELECT a.number, a.attempt, g.environment, g.task_key, g.step, a.reward, a.num_failures,
    CASE
        WHEN a.state <> 'finished' THEN a.state
        WHEN g.state = 'batched' THEN CASE b.state WHEN 'trained' THEN 'trained' ELSE 'batched' END
        WHEN g.state IN ('filtered', 'failed') THEN g.state
        ELSE 'finished'
    END AS state,
    COALESCE(a.failure, g.failure) AS failure
FROM attempts a JOIN groups g ON g.number = a.number LEFT JOIN batches b ON b.step = g.step;
"""

# In this order within a transaction: rows first, then what happens to them.
_ADMIT = "INSERT INTO groups (number, environment, draw, task_index, task_key, version) VALUES (?, ?, ?, ?, ?, ?)"
_ISSUE = "INSERT INTO attempts (number, attempt, state) VALUES (?, ?, ?)"
_RUN = "UPDATE attempts SET state = 'running' WHERE number = ? AND attempt = ? AND state = 'issued'"
_FINISH = (
    "UPDATE attempts SET state = 'finished', reward = ?, min_version = ?, segment = ?, offset = ?"
    " WHERE number = ? AND attempt = ? AND state IN ('issued', 'running')"
)
_RETRY = "UPDATE attempts SET num_failures = ?, failures = ? WHERE number = ? AND attempt = ?"
_FAIL = (
    "UPDATE attempts SET state = 'failed', failure = ?"
    " WHERE number = ? AND attempt = ? AND state IN ('issued', 'running')"
)
_FAIL_GROUP_ATTEMPTS = (
    "UPDATE attempts SET state = 'failed', failure = ? WHERE number = ? AND state IN ('issued', 'running')"
)
_SETTLE = "UPDATE groups SET state = ?, failure = ?, completed = ? WHERE number = ? AND state = 'running'"
_BATCH_GROUP = "UPDATE groups SET state = 'batched', step = ? WHERE number = ? AND state = 'finished'"
_BATCH = "INSERT INTO batches (step, groups, num_samples) VALUES (?, ?, ?)"
_OFFER = "UPDATE batches SET state = 'offered' WHERE step = ? AND state = 'formed'"
_TRAIN = "UPDATE batches SET state = 'trained' WHERE step <= ? AND state <> 'trained'"
_CHECKPOINT = "INSERT OR IGNORE INTO checkpoints (step) VALUES (?)"
_FORGET = "DELETE FROM meta WHERE key = ?"
_META = "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)"
_ORDER = (
    _ADMIT,
    _ISSUE,
    _RUN,
    _FINISH,
    _RETRY,
    _FAIL,
    _FAIL_GROUP_ATTEMPTS,
    _SETTLE,
    _BATCH_GROUP,
    _BATCH,
    _OFFER,
    _TRAIN,
    _CHECKPOINT,
    _FORGET,
    _META,
)


class LedgerError(ValueError):
    """The file is no ledger, or not the ledger of this run."""


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt as the ledger has it; reward, min_version and location where it is finished."""

    attempt: int
    state: str
    failure: FailureClass | None
    failures: Failures
    reward: float | None
    min_version: int | None
    location: Location | None


@dataclass(frozen=True, slots=True)
class GroupRow:
    """An outstanding group, running or finished."""

    number: int
    draw: Draw
    task_key: str
    version: int
    is_finished: bool
    attempts: list[AttemptRow]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch of the run; `groups` in the order in which they were chosen."""

    step: int
    groups: list[int]
    state: str


class Ledger:
    """The ledger of one run, opened for writing by its orchestrator. Every record takes effect with `commit`."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._pending: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        self._issued: dict[int, int] = {}
        self._path = path
        try:
            self._database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            # A commit outlives the process; after a power cut the last ones may be missing, as a whole and in order.
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
                raise
            raise LedgerError(f"{path} cannot be opened as a ledger: {error}; move it away") from error
        self._check(identity)
        self._num_completed = self._one("SELECT COALESCE(MAX(completed), 0) FROM groups")

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Records.

    def admit(self, number: int, draw: Draw, task_key: str, version: int, num_attempts: int) -> None:
        self._pending[_ADMIT].append((number, draw.environment, draw.number, draw.index, task_key, version))
        self._issued[number] = num_attempts

    def run(self, number: int, attempts: Sequence[int]) -> None:
        if self._issued.pop(number, None) is None:
            self._pending[_RUN].extend((number, attempt) for attempt in attempts)
        else:  # admitted in this very tick, whole
            self._pending[_ISSUE].extend((number, attempt, "running") for attempt in attempts)

    def finish(self, number: int, attempt: int, reward: float, min_version: int | None, location: Location) -> None:
        row = (reward, min_version, location.segment, location.offset, number, attempt)
        self._pending[_FINISH].append(row)

    def retry(self, number: int, attempt: int, failures: Failures) -> None:
        self._pending[_RETRY].append((total(failures), json.dumps(dict(failures)), number, attempt))

    def fail(self, number: int, attempt: int, kind: FailureClass) -> None:
        self._pending[_FAIL].append((str(kind), number, attempt))

    def finish_group(self, number: int) -> None:
        self._settle(number, "finished", None)

    def filter_group(self, number: int) -> None:
        self._settle(number, "filtered", None)

    def fail_group(self, number: int, reason: str) -> None:
        self._pending[_FAIL_GROUP_ATTEMPTS].append((reason, number))
        self._settle(number, "failed", reason)

    def batch(self, step: int, groups: Sequence[int], num_samples: int) -> None:
        self._pending[_BATCH].append((step, json.dumps(groups), num_samples))
        self._pending[_BATCH_GROUP].extend((step, number) for number in groups)

    def offer(self, step: int) -> None:
        self._pending[_OFFER].append((step,))

    def train(self, step: int) -> None:
        self._pending[_TRAIN].append((step,))

    def checkpoint(self, step: int) -> None:
        self._pending[_CHECKPOINT].append((step,))

    def end_early(self, last_step: int) -> None:
        self._pending[_META].append(("last_step", str(last_step)))

    def note_steps(self, num_steps: int) -> None:
        """How many steps the recipe wants now; a run may be made longer, also one that had ended early."""
        if num_steps > self.num_steps():
            self._pending[_FORGET].append(("last_step",))
        self._pending[_META].append(("num_steps", str(num_steps)))

    def note_traces(self, end: Location) -> None:
        """Everything before `end` in the trace segments is accounted for by this commit."""
        self._pending[_META].append(("traces_end", json.dumps(end)))

    def commit(self) -> None:
        """Write what was recorded since the last commit, all of it or nothing."""
        for number, num_attempts in self._issued.items():
            self._pending[_ISSUE].extend((number, attempt, "issued") for attempt in range(num_attempts))
        self._issued.clear()
        if not self._pending:
            return
        execute = self._database.executemany
        self._database.execute("BEGIN IMMEDIATE")
        try:
            for statement in _ORDER:
                if statement in self._pending:
                    execute(statement, self._pending[statement])
            self._database.execute("COMMIT")
        except BaseException:  # a cancellation too: undo, then pass it on
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        self._pending.clear()

    def _settle(self, number: int, state: str, failure: str | None) -> None:
        self._num_completed += 1
        self._pending[_SETTLE].append((state, failure, self._num_completed, number))

    # What is remembered.

    def outstanding(self) -> list[GroupRow]:
        """Groups that run (by number), then those that are finished (in the order of completion)."""
        rows = self._database.execute(
            "SELECT number, environment, draw, task_index, task_key, version, state FROM groups"
            " WHERE state IN ('running', 'finished') ORDER BY state DESC, completed, number"
        ).fetchall()
        return [
            GroupRow(
                number, Draw(environment, draw, index), task_key, version, state == "finished", self.attempts(number)
            )
            for number, environment, draw, index, task_key, version, state in rows
        ]

    def attempts(self, number: int) -> list[AttemptRow]:
        rows = self._database.execute(
            "SELECT attempt, state, failure, failures, reward, min_version, segment, offset FROM attempts"
            " WHERE number = ? ORDER BY attempt",
            (number,),
        )
        return [
            AttemptRow(
                attempt,
                state,
                None if failure is None else FailureClass(failure),
                {FailureClass(kind): count for kind, count in json.loads(failures).items()},
                reward,
                min_version,
                None if segment is None else Location(segment, offset),
            )
            for attempt, state, failure, failures, reward, min_version, segment, offset in rows
        ]

    def forget_result(self, number: int, attempt: int) -> None:
        """Take a finished attempt back to running, because its trace is gone (a power cut, a deleted segment)."""
        self._database.execute(
            "UPDATE attempts SET state = 'running', reward = NULL, segment = NULL, offset = NULL"
            " WHERE number = ? AND attempt = ?",
            (number, attempt),
        )
        self._database.execute("UPDATE groups SET state = 'running' WHERE number = ?", (number,))

    def forget_group(self, number: int) -> None:
        """Take a running group back to its beginning: its attempts are scored together, and some are gone."""
        self._database.execute(
            "UPDATE attempts SET state = 'running', failure = NULL, num_failures = 0, failures = '{}', reward = NULL, segment = NULL,"
            " offset = NULL WHERE number = ?",
            (number,),
        )

    def num_drawn(self) -> dict[str, int]:
        """How many tasks were drawn from each environment."""
        return dict(self._database.execute("SELECT environment, MAX(draw) + 1 FROM groups GROUP BY environment"))

    def drawn_tasks(self, environment: str) -> list[int]:
        """The indices of the tasks that were drawn from an environment, once for each draw."""
        rows = self._database.execute("SELECT task_index FROM groups WHERE environment = ?", (environment,))
        return [index for (index,) in rows]

    def tasks_under_way(self, environment: str) -> list[int]:
        """The indices of the tasks of which a group runs, once for each group."""
        rows = self._database.execute(
            "SELECT task_index FROM groups WHERE environment = ? AND state = 'running'", (environment,)
        )
        return [index for (index,) in rows]

    def outcomes(self, environment: str, solved_reward: float) -> list[Outcome]:
        """How the groups of an environment ended that have valid rewards, in the order in which they did."""
        rows = self._database.execute(
            "SELECT g.number, g.task_index, a.reward FROM groups g JOIN attempts a ON a.number = g.number"
            " WHERE g.environment = ? AND g.state IN ('finished', 'batched', 'filtered') AND a.state = 'finished'"
            " ORDER BY g.completed, a.attempt",
            (environment,),
        )
        groups = itertools.groupby(rows, key=lambda row: (row[0], row[1]))
        return [
            Outcome(index, solve_rate([reward for _, _, reward in group], solved_reward))
            for (_, index), group in groups
        ]

    def next_number(self) -> int:
        return self._one("SELECT COALESCE(MAX(number) + 1, 0) FROM groups")

    def batches(self) -> list[BatchRow]:
        rows = self._database.execute("SELECT step, groups, state FROM batches ORDER BY step")
        return [BatchRow(step, json.loads(groups), state) for step, groups, state in rows]

    def batch_reward(self, step: int) -> float:
        """The mean reward of what the batch of `step` was made of."""
        query = (
            "SELECT AVG(a.reward) FROM attempts a JOIN groups g ON g.number = a.number"
            " WHERE g.step = ? AND a.state = 'finished'"
        )
        return float(self._database.execute(query, (step,)).fetchone()[0])

    def covered(self) -> int:
        """The newest step that all checkpoints cover that were kept when the last was reported."""
        return self._one("SELECT COALESCE(MAX(step), 0) FROM checkpoints")

    def early_end(self) -> int | None:
        """The last step of a run that ended early."""
        value = self._meta("last_step")
        return None if value is None else int(value)

    def num_steps(self) -> int:
        """How many steps the recipe wanted when the run was last started."""
        return int(self._meta("num_steps") or 0)

    def traces_end(self) -> Location:
        value = self._meta("traces_end")
        return BEGINNING if value is None else Location(*json.loads(value))

    def _check(self, identity: Mapping[str, Any]) -> None:
        layout = self._meta("layout")
        if layout is None:
            self._pending[_META] += [("layout", str(LAYOUT)), ("identity", json.dumps(identity, sort_keys=True))]
            self.commit()
            return
        if layout != str(LAYOUT):
            raise LedgerError(
                f"{self._path} has layout {layout}, this version of hone writes {LAYOUT};"
                f" go on with the version that began the run, or start a new one with another run.name"
            )
        before = json.loads(self._meta("identity") or "{}")
        changed = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
        if changed:
            key = changed[0]
            raise LedgerError(
                f"{self._path} belongs to another recipe: {key} was {before.get(key)!r} and is now"
                f" {identity.get(key)!r}; start a new run with another run.name, or change the recipe back"
            )

    def _meta(self, key: str) -> str | None:
        row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _one(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])
