"""Requests reach the least loaded worker and come back from one that is gone."""

from hone.orchestrator.dispatch import Dispatch
from hone.schema.messages import Message
from hone.schema.rollouts import RolloutRequest
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task

E = frozenset({"e"})


def request(group, *attempts, environment="e"):
    task = Task(prompt=(Message("user"),))
    return RolloutRequest(group, environment, task, list(attempts) or [0, 1], SamplingParameters(), 0)


def test_requests_wait_for_the_first_worker():
    dispatch = Dispatch(100)
    dispatch.submit(request("a"))
    assert dispatch.assign(0) == []
    dispatch.greet("w", 1, b"1", E, 0)
    assert dispatch.assign(0) == [(b"1", request("a"))]
    assert dispatch.num_queued == 0


def test_the_least_loaded_worker_gets_the_next_request():
    dispatch = Dispatch(100)
    for name in "12":
        dispatch.greet(name, 1, name.encode(), E, 0)
    dispatch.submit(request("a", 0, 1, 2))
    dispatch.submit(request("b"))
    dispatch.submit(request("c"))
    assert [identity for identity, _ in dispatch.assign(0)] == [b"1", b"2", b"2"]
    for attempt in range(3):
        dispatch.done(("a", attempt))
    dispatch.submit(request("d"))
    assert [identity for identity, _ in dispatch.assign(0)] == [b"1"]


def test_a_worker_that_says_hello_again_has_lost_what_it_ran():
    dispatch = Dispatch(100)
    assert dispatch.greet("w", 1, b"1", E, 0) is None
    dispatch.submit(request("a"))
    dispatch.assign(0)
    dispatch.done(("a", 0))
    lost = dispatch.greet("w", 1, b"2", E, 1)
    assert (lost.keys, lost.has_died) == ([("a", 1)], False)
    assert dispatch.greet("w", 2, b"3", E, 2).has_died


def test_silence_is_death_unless_we_did_not_listen():
    dispatch = Dispatch(100)
    dispatch.greet("w", 1, b"1", E, 0)
    dispatch.submit(request("a"))
    dispatch.assign(0)
    dispatch.forgive(9)
    assert dispatch.silent(12, 10) == []
    [lost] = dispatch.silent(20, 10)
    assert (lost.worker, lost.keys, lost.has_died) == ("w", [("a", 0), ("a", 1)], True)
    assert not dispatch.hear(b"1", 21)
    assert dispatch.num_workers == 0


def test_only_the_worker_that_has_an_attempt_owns_it():
    dispatch = Dispatch(100)
    dispatch.greet("w", 1, b"1", E, 0)
    dispatch.submit(request("a"))
    dispatch.assign(0)
    assert dispatch.is_owner(b"1", ("a", 0))
    assert not dispatch.is_owner(b"2", ("a", 0))
    dispatch.done(("a", 0))
    assert not dispatch.is_owner(b"1", ("a", 0))
    dispatch.done(("a", 0))


def test_rollouts_that_run_too_long_are_given_up():
    dispatch = Dispatch(100)
    dispatch.greet("w", 1, b"1", E, 0)
    dispatch.submit(request("a"))
    dispatch.assign(0)
    dispatch.submit(request("b"))
    dispatch.assign(5)
    assert dispatch.overdue(11, 10) == [("a", 0), ("a", 1)]
    assert dispatch.overdue(11, 10) == []


def test_a_withdrawn_group_is_neither_sent_nor_waited_for():
    dispatch = Dispatch(100)
    dispatch.greet("w", 1, b"1", E, 0)
    dispatch.submit(request("a"))
    dispatch.assign(0)
    dispatch.submit(request("a", 1))
    assert dispatch.withdraw("a") == [b"1"]
    assert dispatch.assign(0) == []
    assert dispatch.withdraw("a") == []


def test_a_worker_that_was_silent_and_speaks_again_is_used_again_and_forgets_what_it_ran():
    dispatch = Dispatch(100)
    dispatch.greet("w", 1, b"1", E, 0)
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
    dispatch = Dispatch(100)
    dispatch.greet("w", 1, b"1", E, 0)
    dispatch.silent(20, 10)
    dispatch.greet("w", 2, b"2", E, 21)
    assert dispatch.take_back(b"1", 22) is None
    assert dispatch.identities == [b"2"]


def test_a_late_answer_takes_the_repetition_out_of_the_queue():
    dispatch = Dispatch(100)
    dispatch.submit(request("a"))
    dispatch.submit(request("b"))
    dispatch.done(("a", 0))
    dispatch.done(("b", 0))
    dispatch.done(("b", 1))
    dispatch.greet("w", 1, b"1", E, 0)
    assert dispatch.assign(0) == [(b"1", request("a", 1))]
    dispatch.done(("a", 1))
    assert dispatch.overdue(100, 10) == []


def test_no_worker_gets_more_than_it_may_run():
    dispatch = Dispatch(4)
    for name in "12":
        dispatch.greet(name, 1, name.encode(), E, 0)
    for group in "abcdef":
        dispatch.submit(request(group))
    assert [identity for identity, _ in dispatch.assign(0)] == [b"1", b"2", b"1", b"2"]
    assert dispatch.num_queued == 2
    dispatch.done(("b", 0))
    assert dispatch.assign(0) == []  # room for one is not room for a group
    dispatch.done(("b", 1))
    assert [(identity, sent.group) for identity, sent in dispatch.assign(0)] == [(b"2", "e")]


def test_a_group_that_is_larger_than_a_worker_runs_alone():
    dispatch = Dispatch(2)
    dispatch.greet("w", 1, b"1", E, 0)
    dispatch.submit(request("a"))
    dispatch.submit(request("b", 0, 1, 2))
    assert [sent.group for _, sent in dispatch.assign(0)] == ["a"]
    dispatch.done(("a", 0))
    assert dispatch.assign(0) == []
    dispatch.done(("a", 1))
    assert [sent.group for _, sent in dispatch.assign(0)] == ["b"]


def test_requests_go_to_workers_that_have_their_environment_and_hold_up_no_others():
    dispatch = Dispatch(2)
    dispatch.greet("first", 1, b"1", E, 0)
    for group in "abc":
        dispatch.submit(request(group))
    dispatch.submit(request("x", environment="f"))
    assert [sent.group for _, sent in dispatch.assign(0)] == ["a"]
    assert dispatch.unserved == ["f"]
    dispatch.greet("second", 2, b"2", frozenset({"f"}), 0)
    assert dispatch.unserved == []
    assert dispatch.assign(0) == [(b"2", request("x", environment="f"))]


def test_a_worker_that_ends_itself_gives_back_what_it_ran_and_is_not_said_to_have_died():
    dispatch = Dispatch(100)
    dispatch.greet("w", 1, b"1", E, 0)
    dispatch.submit(request("a"))
    dispatch.assign(0)
    lost = dispatch.dismiss("w")
    assert (lost.keys, lost.has_died) == ([("a", 0), ("a", 1)], False)
    assert dispatch.dismiss("w") is None
    assert dispatch.greet("w", 2, b"2", E, 1) is None
