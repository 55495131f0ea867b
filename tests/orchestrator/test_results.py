"""Results are taken once, from whom they count, and after they are in a segment."""

from contextlib import closing

import pytest

from hone.orchestrator.dispatch import Dispatch
from hone.orchestrator.ledger import Ledger
from hone.orchestrator.results import Results
from hone.orchestrator.samples import UntrainableTraceError
from hone.schema.messages import Message
from hone.schema.rollouts import RolloutRequest, RolloutResult
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task
from hone.schema.traces import Failure, FailureClass, Trace
from hone.schema.wire import Wire
from hone.transport.folders import RunFolder
from hone.transport.traces import TraceWriter, read_traces

TASK = Task(prompt=(Message("user"),))
TOOL = FailureClass.TOOL
WIRE = Wire(RolloutResult)


class Purpose:
    """Waits for two attempts of group 1, and remembers what it is told."""

    group_size = 2
    min_valid = 2

    def __init__(self, environment):
        self.environment = environment
        self.finished, self.failed = [], []
        self.untrainable = set()

    def waits_for(self, key):
        return key in {("1", 0), ("1", 1)} and key[1] not in self.finished

    def environment_of(self, key):
        return self.environment

    def complaint_about(self, trace):
        return None if trace.failure is None else (trace.failure.kind, trace.failure.message)

    def finish(self, key, trace, location):
        if key[1] in self.untrainable:
            raise UntrainableTraceError(FailureClass.MODEL, "no tokens")
        self.finished.append(key[1])

    def fail(self, key, kind, complaint, *, is_final=False):
        self.failed.append((key[1], kind, is_final))


class World:
    """Worker `a` runs both attempts."""

    def __init__(self, folder, environment):
        self.folder = RunFolder(folder)
        self.purpose = Purpose(environment)
        self.dispatch = Dispatch(100)
        self.dispatch.greet("a", 1, b"a", frozenset({environment}), 0)
        self.dispatch.submit(RolloutRequest("1", environment, TASK, [0, 1], SamplingParameters(), 0))
        self.dispatch.assign(0)
        self.writer = TraceWriter(self.folder.traces)
        self.ledger = Ledger(self.folder.ledger, {})
        self.results = Results(self.dispatch, {"together"}, lambda group: self.purpose, self.writer, self.ledger)

    def bring(self, attempt, *, failure=None, by=b"a", group="1"):
        failed = None if failure is None else Failure(failure, "here", "no")
        result = RolloutResult(group, attempt, Trace("e", TASK, attempt, group=group, failure=failed))
        self.results.receive(by, WIRE.encode(result), result)

    def kept(self):
        return [result.attempt for _, result in read_traces(self.folder.traces)]

    def close(self):
        self.writer.close()
        self.ledger.close()


@pytest.fixture
def alone(tmp_path):
    """A world whose environment scores each rollout by itself."""
    with closing(World(tmp_path, "alone")) as world:
        yield world


@pytest.fixture
def together(tmp_path):
    """A world whose environment scores the rollouts of a group together."""
    with closing(World(tmp_path, "together")) as world:
        yield world


def test_a_result_is_kept_and_then_taken_once(alone):
    alone.bring(0)
    alone.bring(0)
    assert alone.purpose.finished == alone.kept() == []
    assert alone.results.settle()
    alone.bring(0)
    assert not alone.results.settle()
    assert alone.purpose.finished == alone.kept() == [0]
    assert not alone.dispatch.is_owner(b"a", ("1", 0))


def test_a_valid_result_counts_from_any_worker_and_a_failure_from_its_own(alone):
    alone.bring(0, by=b"b")
    alone.bring(1, by=b"b", failure=TOOL)
    alone.results.settle()
    assert (alone.purpose.finished, alone.purpose.failed) == ([0], [])
    alone.bring(1, failure=TOOL)
    alone.results.settle()
    assert alone.purpose.failed == [(1, TOOL, False)]


def test_a_result_that_nobody_waits_for_leaves_no_trace(alone):
    alone.bring(0, group="2")
    assert not alone.results.settle()
    assert alone.kept() == []


def test_a_trace_that_its_purpose_cannot_use_has_failed(alone):
    alone.purpose.untrainable.add(0)
    alone.bring(0)
    alone.results.settle()
    assert alone.purpose.failed == [(0, FailureClass.MODEL, False)]


def test_a_group_scored_together_is_held_back_until_it_is_whole(together):
    together.bring(1)
    assert not together.results.settle()
    together.bring(0)
    assert together.results.settle()
    assert together.purpose.finished == together.kept() == [0, 1]


def test_with_too_few_valid_rollouts_a_group_scored_together_fails_as_a_whole(together):
    together.bring(0)
    together.bring(1, failure=TOOL)
    assert not together.results.settle()
    assert together.purpose.failed == [(0, TOOL, False), (1, TOOL, False)]
    assert together.kept() == [1], "failures are kept, to be looked at"


def test_with_enough_of_them_the_failures_of_a_group_scored_together_are_final(together):
    together.purpose.min_valid = 1
    together.bring(0)
    together.bring(1, failure=TOOL)
    together.results.settle()
    assert (together.purpose.finished, together.purpose.failed) == ([0], [(1, TOOL, True)])


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_what_was_held_back_is_void_after_a_failure_from_elsewhere_or_a_cancellation(together, is_forgotten):
    together.bring(0)
    if is_forgotten:
        together.results.forget("1")
    else:
        together.results.fail(("1", 1), FailureClass.WORKER, "env worker a died")
    together.results.settle()
    together.bring(1)
    assert not together.results.settle()
    assert together.purpose.finished == []
