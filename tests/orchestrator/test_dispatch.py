"""Requests reach the least loaded worker and come back from one that is gone."""

from hone.orchestrator.dispatch import Dispatch
from hone.schema.messages import Message
from hone.schema.rollouts import RolloutRequest
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task


def request(group, *attempts):
    task = Task(prompt=(Message("user"),))
    return RolloutRequest(group, "e", task, list(attempts) or [0, 1], SamplingParameters(), 0)


def test_requests_wait_for_the_first_worker():
    dispatch = Dispatch()
    dispatch.submit(request("a"))
    assert dispatch.assign(0) == []
    dispatch.greet("w", 1, b"1", 0)
    assert dispatch.assign(0) == [(b"1", request("a"))]
    assert dispatch.num_queued == 0


def test_the_least_loaded_worker_gets_the_next_request():
    dispatch = Dispatch()
    for name in "12":
        dispatch.greet(name, 1, name.encode(), 0)
    dispatch.submit(request("a", 0, 1, 2))
    dispatch.submit(request("b"))
    dispatch.submit(request("c"))
    assert [identity for identity, _ in dispatch.assign(0)] == [b"1", b"2", b"2"]
    for attempt in range(3):
        dispatch.done(("a", attempt))
    dispatch.submit(request("d"))
    assert [identity for identity, _ in dispatch.assign(0)] == [b"1"]


def test_a_worker_that_says_hello_again_has_lost_what_it_ran():
    dispatch = Dispatch()
    assert dispatch.greet("w", 1, b"1", 0) is None
    dispatch.submit(request("a"))
    dispatch.assign(0)
    dispatch.done(("a", 0))
    lost = dispatch.greet("w", 1, b"2", 1)
    assert (lost.keys, lost.has_died) == ([("a", 1)], False)
    assert dispatch.greet("w", 2, b"3", 2).has_died


def test_silence_is_death_unless_we_did_not_listen():
    dispatch = Dispatch()
    dispatch.greet("w", 1, b"1", 0)
    dispatch.submit(request("a"))
    dispatch.assign(0)
    dispatch.forgive(9)
    assert dispatch.silent(12, 10) == []
    [lost] = dispatch.silent(20, 10)
    assert (lost.worker, lost.keys, lost.has_died) == ("w", [("a", 0), ("a", 1)], True)
    assert not dispatch.hear(b"1", 21)
    assert dispatch.num_workers == 0


def test_only_the_worker_that_has_an_attempt_owns_it():
    dispatch = Dispatch()
    dispatch.greet("w", 1, b"1", 0)
    dispatch.submit(request("a"))
    dispatch.assign(0)
    assert dispatch.is_owner(b"1", ("a", 0))
    assert not dispatch.is_owner(b"2", ("a", 0))
    dispatch.done(("a", 0))
    assert not dispatch.is_owner(b"1", ("a", 0))
    dispatch.done(("a", 0))


def test_rollouts_that_run_too_long_are_given_up():
    dispatch = Dispatch()
    dispatch.greet("w", 1, b"1", 0)
    dispatch.submit(request("a"))
    dispatch.assign(0)
    dispatch.submit(request("b"))
    dispatch.assign(5)
    assert dispatch.overdue(11, 10) == [("a", 0), ("a", 1)]
    assert dispatch.overdue(11, 10) == []


def test_a_withdrawn_group_is_neither_sent_nor_waited_for():
    dispatch = Dispatch()
    dispatch.greet("w", 1, b"1", 0)
    dispatch.submit(request("a"))
    dispatch.assign(0)
    dispatch.submit(request("a", 1))
    assert dispatch.withdraw("a") == [b"1"]
    assert dispatch.assign(0) == []
    assert dispatch.withdraw("a") == []


def test_a_worker_that_was_silent_and_speaks_again_is_used_again_and_forgets_what_it_ran():
    dispatch = Dispatch()
    dispatch.greet("w", 1, b"1", 0)
    dispatch.submit(request("b"))
    dispatch.submit(request("a"))
    dispatch.assign(0)
    dispatch.silent(20, 10)
    assert dispatch.take_back(b"1", 21) == ["a", "b"]
    assert dispatch.take_back(b"1", 21) is None
    assert dispatch.hear(b"1", 22)
    dispatch.submit(request("a"))
    assert dispatch.assign(22) == [(b"1", request("a"))]


def test_a_silent_worker_whose_place_another_process_took_is_not_taken_back():
    dispatch = Dispatch()
    dispatch.greet("w", 1, b"1", 0)
    dispatch.silent(20, 10)
    dispatch.greet("w", 2, b"2", 21)
    assert dispatch.take_back(b"1", 22) is None
    assert dispatch.identities == [b"2"]


def test_a_late_answer_takes_the_repetition_out_of_the_queue():
    dispatch = Dispatch()
    dispatch.submit(request("a"))
    dispatch.submit(request("b"))
    dispatch.done(("a", 0))
    dispatch.done(("b", 0))
    dispatch.done(("b", 1))
    dispatch.greet("w", 1, b"1", 0)
    assert dispatch.assign(0) == [(b"1", request("a", 1))]
    dispatch.done(("a", 1))
    assert dispatch.overdue(100, 10) == []
