"""Generators and streams by index: the same task whatever was asked for before, and bounded memory."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.envs import Task, Tasks, TaskSourceError, endless, generated, user


def task(index):
    return Task(prompt=(user(f"task {index}"),), reference=str(index), info={"at": [index]})


def begin_at(begun):
    def begin(start):
        begun.append(start)
        return map(task, itertools.count(start))

    return begin


@given(st.lists(st.integers(0, 60), max_size=30))
def test_a_generated_task_is_the_same_in_any_order_of_access(indices):
    tasks = generated(lambda: map(task, range(61)))
    assert [tasks[index] for index in indices] == [task(index) for index in indices]
    assert tasks.count == 61


def test_a_generator_runs_once_and_only_when_asked():
    runs = []

    def generate():
        runs.append(1)
        yield from map(task, range(5))

    tasks = generated(generate)
    shuffled = tasks.shuffled(0)
    assert runs == []
    assert {one.key for one in shuffled} == {task(index).key for index in range(5)}
    assert tasks[4] == tasks[4] == task(4)
    assert runs == [1]


def test_what_a_generator_gives_that_is_no_task_is_named():
    with pytest.raises(TaskSourceError, match="task 1 of a stream is str"):
        generated(lambda: [task(0), "hello"]).count  # noqa: B018


@given(st.lists(st.integers(0, 200), max_size=30), st.integers(1, 20))
def test_a_streamed_task_is_the_same_in_any_order_of_access(indices, window):
    tasks = endless(begin_at([]), window=window)
    assert [tasks[index] for index in indices] == [task(index) for index in indices]


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 9), st.integers(1, 20))
def test_a_stream_that_ends_begins_anew_wherever_it_is_entered(indices, length, window):
    tasks = endless(lambda start: map(task, range(start, length)), window=window)
    assert [tasks[index] for index in indices] == [task(index % length) for index in indices]


def test_reading_on_and_going_back_a_little_need_no_restart():
    begun = []
    tasks = endless(begin_at(begun), window=10)
    for index in (0, 1, 2, 8, 3, 9):
        tasks[index]
    assert begun == [0]
    tasks[1000]
    tasks[1001]
    assert begun == [0, 1000]
    tasks[5]
    assert begun == [0, 1000, 5]


def test_a_resumed_stream_begins_where_it_is_wanted():
    begun = []
    assert endless(begin_at(begun))[100_000] == task(100_000)
    assert begun == [100_000]


def breaks_once(numbers, at):
    """A generator that raises at a task, the first time it comes there."""
    broken = []

    def generate(start=0):
        for number in numbers(start):
            if number == at and not broken:
                broken.append(number)
                raise ConnectionError("the line is down")
            yield task(number)

    return generate


def test_a_stream_that_raises_is_not_at_its_end():
    tasks = endless(breaks_once(lambda start: range(start, 9), 4))
    assert tasks[3] == task(3)
    with pytest.raises(ConnectionError):
        tasks[5]
    assert [tasks[index] for index in (8, 4, 5, 9)] == [task(8), task(4), task(5), task(0)]


def test_a_generator_that_raises_is_not_at_its_end():
    tasks = generated(breaks_once(lambda start: range(9), 4))
    with pytest.raises(ConnectionError):
        tasks[3]
    assert [tasks[index] for index in (8, 4, 3)] == [task(8), task(4), task(3)]
    assert tasks.count == 9


def test_a_full_disk_costs_no_task(monkeypatch):
    tasks = generated(lambda: map(task, range(5)))
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", lambda descriptor, data, offset: len(data) - 1)
        with pytest.raises(OSError, match="no space for the tasks of a generator"):
            tasks[0]
    assert list(tasks) == [task(index) for index in range(5)]


def test_a_stream_of_nothing_is_reported():
    with pytest.raises(TaskSourceError, match="no task at all"):
        endless(lambda start: ())[3]


def test_a_stream_is_a_source_like_any_other():
    train, held_out = endless(begin_at([])).split(0.5)
    assert isinstance(train, Tasks)
    assert train[0] != held_out[0]
