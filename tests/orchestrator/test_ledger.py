"""The ledger: transitions are recorded whole, and an interrupted run is found again as it was."""

import sqlite3

import pytest

from hone.orchestrator.audit import audit, group_name
from hone.orchestrator.decide import Limits
from hone.orchestrator.ledger import Ledger, LedgerError
from hone.orchestrator.mixture import Draw
from hone.orchestrator.recovery import recover
from hone.schema.batches import TrainingSample
from hone.schema.messages import Message
from hone.schema.rollouts import RolloutResult
from hone.schema.tasks import Task
from hone.schema.traces import AgentRecord, Failure, FailureClass, Reward, StopReason, Trace
from hone.schema.wire import Wire
from hone.transport.batches import batch_from, write_batch
from hone.transport.folders import RunFolder
from hone.transport.traces import TraceWriter

LIMITS = Limits(groups_per_batch=1, group_size=2, max_staleness=1, num_steps=3, max_concurrent=8)
IDENTITY = {"seed": 0, "max_staleness": 1}
TASK = Task(prompt=(Message("user", "hello"),))
WIRE = Wire(RolloutResult)


class Book:
    """A run's ledger and segments, written as the loop writes them."""

    def __init__(self, path, identity=IDENTITY):
        self.folder = RunFolder(path)
        self.ledger = Ledger(self.folder.ledger, identity)
        self.writer = TraceWriter(self.folder.traces)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.writer.close()
        self.ledger.close()

    def admit(self, number, version=0):
        self.ledger.admit(number, Draw("e", number, number), TASK.key, version, 2)
        self.ledger.run(number, [0, 1])

    def result(self, number, attempt, reward=1.0, failure=None, agents=None):
        rewards = {} if failure else {"r": Reward(reward)}
        stop = None if failure else StopReason.COMPLETED
        name = group_name(number)
        trace = Trace(
            "e", TASK, attempt, group=name, rewards=rewards, stop_reason=stop, failure=failure, agents=agents or {}
        )
        return WIRE.encode(RolloutResult(name, attempt, trace))

    def finish(self, number, *attempts):
        location = self.writer.append([self.result(number, attempt) for attempt in attempts])
        self.ledger.note_traces(self.writer.end)
        for attempt in attempts:
            self.ledger.finish(number, attempt, float(attempt), 0, location)

    def batch(self, step, *numbers):
        sample = TrainingSample([1], [1], [0.0], [0.0], temperature=1.0, version=0)
        write_batch(self.folder.batch_of(step), batch_from(step, len(numbers), [sample]))
        self.ledger.batch(step, numbers, 1)

    def recover(self, scored_together=()):
        return recover(self.ledger, self.folder, LIMITS, scored_together)

    def states(self):
        with sqlite3.connect(self.folder.ledger) as database:
            return {(n, a): s for n, a, s in database.execute("SELECT number, attempt, state FROM rollouts")}


def test_an_attempt_goes_through_its_states(tmp_path):
    with Book(tmp_path) as book:
        book.ledger.admit(0, Draw("e", 0, 0), TASK.key, 0, 2)
        book.ledger.commit()
        assert book.states() == {(0, 0): "issued", (0, 1): "issued"}
        book.ledger.run(0, [0, 1])
        book.ledger.commit()
        assert book.states() == {(0, 0): "running", (0, 1): "running"}
        book.finish(0, 0, 1)
        book.ledger.finish_group(0)
        book.ledger.commit()
        assert set(book.states().values()) == {"finished"}
        book.batch(1, 0)
        book.ledger.commit()
        assert set(book.states().values()) == {"batched"}
        book.ledger.train(1)
        book.ledger.commit()
        assert set(book.states().values()) == {"trained"}


def test_filtered_and_failed_groups_say_so(tmp_path):
    with Book(tmp_path) as book:
        book.admit(0)
        book.finish(0, 0, 1)
        book.ledger.filter_group(0)
        book.admit(1)
        book.finish(1, 0)
        book.ledger.fail(1, 1, FailureClass.SANDBOX)
        book.ledger.fail_group(1, FailureClass.SANDBOX)
        book.ledger.commit()
        assert book.states() == {(0, 0): "filtered", (0, 1): "filtered", (1, 0): "failed", (1, 1): "failed"}
        assert book.recover().state.groups == {}


def test_nothing_is_recorded_before_the_commit(tmp_path):
    with Book(tmp_path) as book:
        book.admit(0)
        assert book.states() == {}


def test_a_transaction_that_fails_leaves_no_trace(tmp_path):
    with Book(tmp_path) as book:
        book.admit(0)
        book.ledger.commit()
        book.admit(1)
        book.admit(0)
        with pytest.raises(sqlite3.IntegrityError):
            book.ledger.commit()
        assert {number for number, _ in book.states()} == {0}


def test_a_repeated_transition_changes_nothing(tmp_path):
    with Book(tmp_path) as book:
        book.admit(0)
        book.finish(0, 0, 1)
        book.ledger.commit()
        book.ledger.fail(0, 0, FailureClass.WORKER)
        book.ledger.commit()
        assert book.states()[0, 0] == "finished"


def test_an_interrupted_run_is_found_as_it_was(tmp_path):
    with Book(tmp_path) as book:
        for number in range(4):
            book.admit(number, version=number % 2)
        book.finish(0, 0, 1)
        book.ledger.finish_group(0)
        book.batch(1, 0)
        book.finish(2, 0, 1)
        book.ledger.finish_group(2)
        book.finish(1, 0, 1)
        book.ledger.finish_group(1)
        book.finish(3, 1)
        book.ledger.retry(3, 0, {FailureClass.JUDGE: 2, FailureClass.WORKER: 1})
        book.ledger.commit()
    with Book(tmp_path) as book:
        found = book.recover()
        state = found.state
        assert (state.num_batches, state.next_group, state.num_running, state.num_ready) == (1, 4, 1, 2)
        assert state.groups[3].pending == {0: {FailureClass.JUDGE: 2, FailureClass.WORKER: 1}}
        assert state.groups[3].rewards == {1: 1.0}
        assert [number for queue in state.ready.values() for number in queue] == [2, 1]
        assert {number: sorted(traces) for number, traces in found.traces.items()} == {1: [0, 1], 2: [0, 1], 3: [1]}
        assert book.ledger.num_drawn() == {"e": 4}
        assert (found.orphans, found.broken) == ([], [])


def test_results_that_reached_the_segments_but_not_the_ledger_are_adopted(tmp_path):
    with Book(tmp_path) as book:
        book.admit(0)
        book.finish(0, 0)
        book.ledger.commit()
        failure = Failure(FailureClass.TOOL, "here", "no")
        book.writer.append([book.result(0, 1), book.result(0, 0), book.result(7, 0)])
        book.writer.append([book.result(0, 1), book.result(0, 1, failure=failure)])
    with Book(tmp_path) as book:
        found = book.recover()
        assert [(result.group, result.attempt) for _, result in found.orphans] == [(group_name(0), 1)]


def test_a_finished_attempt_whose_trace_is_gone_runs_again(tmp_path):
    with Book(tmp_path) as book:
        book.admit(0)
        book.finish(0, 0)
        book.finish(0, 1)
        book.ledger.finish_group(0)
        book.ledger.commit()
    segment = next(RunFolder(tmp_path).traces.iterdir())
    segment.write_bytes(segment.read_bytes()[:-3])
    with Book(tmp_path) as book:
        assert book.recover().state.groups[0].pending == {1: {}}


def test_a_group_that_is_scored_together_is_whole_or_runs_again(tmp_path):
    with Book(tmp_path) as book:
        for number in range(3):
            book.admit(number)
        book.finish(0, 0)  # the environment was another then: only half of the group is there
        book.finish(1, 0, 1)
        book.ledger.finish_group(1)
        book.ledger.retry(2, 0, {FailureClass.JUDGE: 1})
        book.ledger.fail(2, 1, FailureClass.TOOL)
        book.ledger.commit()
        found = book.recover(["e"])
        assert [found.state.groups[number].pending for number in range(3)] == [{0: {}, 1: {}}, {}, {0: {}, 1: {}}]
        assert found.traces.keys() == {1}
        assert all(group.last_failure is None for group in found.state.groups.values())


def test_what_each_agent_of_a_game_earned_is_found_in_its_traces(tmp_path):
    with Book(tmp_path) as book:
        book.admit(0)
        agents = {"b": AgentRecord(rewards={"r": Reward(2.0)}), "a": AgentRecord(), "user": AgentRecord(trains=False)}
        location = book.writer.append([book.result(0, 0, agents=agents)])
        book.ledger.finish(0, 0, 2.0, 0, location)
        book.ledger.commit()
    with Book(tmp_path) as book:
        assert book.recover().state.groups[0].agent_rewards == {0: (1.0, 3.0)}


def test_only_whole_groups_with_enough_valid_rollouts_are_adopted(tmp_path):
    broken = Failure(FailureClass.TOOL, "call", "no")
    with Book(tmp_path) as book:
        for number in range(4):
            book.admit(number)
        book.ledger.commit()
        book.writer.append([book.result(0, 0)])
        book.writer.append([book.result(0, 1)])
        book.writer.append([book.result(1, 0), book.result(2, 0), book.result(1, 1), book.result(2, 1, failure=broken)])
        book.writer.append([book.result(3, attempt, failure=broken) for attempt in (0, 1)])
        found = book.recover(["e"])
        assert [(result.group, result.attempt) for _, result in found.orphans] == [
            (group_name(1), attempt) for attempt in (0, 1)
        ]


def test_damaged_batches_are_named_and_covered_ones_are_not_missed(tmp_path):
    with Book(tmp_path) as book:
        for number in range(3):
            book.admit(number)
            book.finish(number, 0, 1)
            book.ledger.finish_group(number)
            book.batch(number + 1, number)
        book.ledger.train(2)
        book.ledger.checkpoint(1)
        book.ledger.commit()
        book.folder.batch_of(1).unlink()
        book.folder.batch_of(2).write_bytes(b"torn")
        found = book.recover()
        assert found.broken == [2]
        assert (found.state.trained, found.state.covered) == (2, 1)


def test_a_ledger_of_another_recipe_names_what_changed(tmp_path):
    Book(tmp_path).__exit__()
    with pytest.raises(LedgerError, match="seed was 0 and is now 1"):
        Book(tmp_path, IDENTITY | {"seed": 1})


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"x" * 4096)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Book(tmp_path)


def test_an_early_end_is_remembered_until_the_run_is_made_longer(tmp_path):
    with Book(tmp_path) as book:
        book.ledger.note_steps(3)
        book.ledger.end_early(0)
        book.ledger.commit()
        assert book.recover().state.last_step == 0
        book.ledger.note_steps(2)
        book.ledger.commit()
        assert book.recover().state.last_step == 3


def test_the_audit_counts_what_must_not_happen(tmp_path):
    with Book(tmp_path) as book:
        for number in range(3):
            book.admit(number)
        book.finish(0, 0, 1)
        book.ledger.finish_group(0)
        book.batch(1, 0)
        book.ledger.commit()
        assert audit(tmp_path).is_clean
        book.writer.append([book.result(0, 0)])
        assert audit(tmp_path).regenerated == 1
        book.batch(2, 0)
        book.ledger.commit()
        assert audit(tmp_path).trained_twice == 2
        book.finish(1, 0, 1)
        book.ledger.finish_group(1)
        book.batch(3, 1)
        book.ledger.commit()
        assert audit(tmp_path).too_stale == 2
        book.finish(2, 0)
        book.ledger.note_steps(3)
        book.ledger.commit()
        assert audit(tmp_path).lost == 1
    next(RunFolder(tmp_path).traces.iterdir()).unlink()
    assert audit(tmp_path).lost == 1 + 5
