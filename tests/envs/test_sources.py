"""Task sources: views that hold nothing, splits without overlap, orders that are permutations."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.envs import Task, Tasks, TaskSourceError, concatenated, user
from hone.envs.permutation import permuted


def task(index):
    return Task(prompt=(user(str(index)),), reference=str(index))


def numbers(count=None, made=None):
    def make(index):
        if made is not None:
            made.append(index)
        return task(index)

    return Tasks(make, count)


def texts(tasks):
    return [one.reference for one in tasks]


@given(st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_permuted_is_a_permutation(count, seed):
    assert sorted(permuted(position, count, seed) for position in range(count)) == list(range(count))


@given(st.integers(1, 2**40), st.integers(0, 2**63 - 1), st.data())
def test_permuted_reaches_any_position_of_a_huge_range_without_a_table(count, seed, data):
    positions = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=20))
    places = [permuted(position, count, seed) for position in positions]
    assert len(set(places)) == len(places)
    assert all(0 <= place < count for place in places)


def test_permutations_of_two_seeds_differ():
    assert [permuted(i, 100, 1) for i in range(100)] != [permuted(i, 100, 2) for i in range(100)]


def test_the_permutation_does_not_drift_between_releases():
    assert [permuted(i, 10, 7) for i in range(10)] == [6, 2, 0, 8, 9, 5, 3, 7, 1, 4]


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_the_count_is_refused(index):
    with pytest.raises(IndexError, match=f"task {index} of 3"):
        numbers(3)[index]


def test_a_count_that_is_costly_is_asked_for_once_and_only_when_wanted():
    asked = []
    tasks = Tasks(task, lambda: asked.append(1) or 3)
    views = tasks.take(2), tasks.map(lambda one: one), tasks.where(lambda one: True), tasks.shuffled(0)
    assert asked == []
    assert [view.count for view in views] == [2, 3, 3, 3]
    assert asked == [1]


def test_views_make_only_the_tasks_that_are_asked_for():
    made = []
    tasks = numbers(1000, made)
    view = concatenated(tasks.take(10), tasks.shuffled(3)).map(lambda one: one)
    assert view.count == 1010
    assert made == []
    view[5]
    assert made == [5]


def test_take_subset_and_map():
    tasks = numbers(5)
    assert texts(tasks.take(2)) == ["0", "1"]
    assert tasks.take(9).count == 5
    assert texts(tasks.subset([4, 0, 0])) == ["4", "0", "0"]
    assert texts(tasks.map(lambda one: task(one.reference + "!"))) == ["0!", "1!", "2!", "3!", "4!"]


def test_where_goes_through_the_source_once_and_no_further_than_needed():
    made = []
    even = numbers(None, made).where(lambda one: int(one.reference) % 2 == 0)
    assert even.count is None
    assert even[3].reference == "6"
    assert made == [0, 1, 2, 3, 4, 5, 6, 6]
    assert even[1].reference == "2"
    assert made[8:] == [2]


def test_a_filter_that_nothing_endless_passes_is_reported(monkeypatch):
    monkeypatch.setattr("hone.envs.sources.MAX_MISSES", 10)
    with pytest.raises(TaskSourceError, match="do not pass the filter"):
        numbers().where(lambda one: False)[0]


@given(st.integers(0, 60), st.integers(0, 2**32))
def test_a_shuffle_holds_every_task_once(count, seed):
    assert sorted(texts(numbers(count).shuffled(seed)), key=int) == texts(numbers(count))


def test_every_epoch_has_every_task_once_in_an_order_of_its_own():
    again = numbers(20).repeated(seed=1)
    assert again.count is None
    epochs = [texts(again[index] for index in range(start, start + 20)) for start in (0, 20, 40)]
    assert all(sorted(epoch, key=int) == texts(numbers(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@given(st.integers(0, 200), st.floats(0, 1))
def test_a_split_gives_every_task_to_one_side(count, share):
    train, held_out = numbers(count).split(share)
    assert sorted(texts(train) + texts(held_out), key=int) == texts(numbers(count))


def test_a_split_has_about_the_share_and_does_not_depend_on_what_else_there_is():
    few, many = numbers(500).split(0.2), numbers(5000).split(0.2)
    assert 0.17 < many.held_out.count / 5000 < 0.23
    assert texts(few.held_out) == texts(many.held_out)[: few.held_out.count]


def test_a_split_by_other_content_keeps_together_what_shares_it():
    tasks = numbers(300)
    train, held_out = tasks.split(0.5, by=lambda one: one.reference[0])
    assert not {text[0] for text in texts(train)} & {text[0] for text in texts(held_out)}


def test_both_sides_of_a_split_go_through_the_source_once():
    made = []
    train, held_out = numbers(50, made).split(0.3)
    assert made == []
    assert train.count + held_out.count == 50
    assert made == list(range(50))


def test_an_endless_source_is_split_into_two_endless_ones():
    train, held_out = numbers().split(0.3)
    first = texts(itertools.islice(train, 50)) + texts(itertools.islice(held_out, 20))
    assert len(set(first)) == 70


def test_duplicates_are_found_with_all_their_places_and_can_be_left_out():
    tasks = numbers(3).subset([2, 0, 2, 1, 0, 2])
    [two, zero] = tasks.duplicates()
    assert (two.key, two.indices, zero.indices) == (task(2).key, (0, 2, 5), (1, 4))
    assert texts(tasks.unique()) == ["2", "0", "1"]
    assert tasks.unique().duplicates() == []


@pytest.mark.parametrize("use", [lambda t: t.shuffled(0)[0], lambda t: t.duplicates(), lambda t: t.unique()[0]])
def test_what_needs_an_end_says_so_for_endless_tasks(use):
    with pytest.raises(ValueError, match=r"endless tasks cannot be .*take"):
        use(numbers())


def test_sources_are_joined_lazily_and_only_the_last_may_be_endless():
    joined = concatenated(numbers(2), [task(9)], numbers())
    assert joined.count is None
    assert texts(itertools.islice(joined, 5)) == ["0", "1", "9", "0", "1"]
    assert concatenated(numbers(2), numbers(3)).count == 5
    with pytest.raises(ValueError, match="source 0 of 2 is endless"):
        concatenated(numbers(), numbers(2))[0]
