"""Paired differences against scipy, enumeration and simulation."""

import itertools
import random
from statistics import fmean

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.evals.comparison import MAX_EXACT, compare, paired_difference, sign_flip_p_value
from hone.evals.results import Outcome
from hone.schema.traces import FailureClass

PAIRS = st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=30)


def by_task(values):
    return {f"task {index}": [value] for index, value in enumerate(values)}


@given(PAIRS)
def test_the_interval_is_that_of_scipys_paired_t_test(pairs):
    first, second = zip(*pairs, strict=True)
    found = paired_difference(by_task(first), by_task(second))
    differences = [theirs - ours for ours, theirs in pairs]
    assert found.mean == pytest.approx(fmean(differences), abs=1e-12)
    assert found.second - found.first == pytest.approx(found.mean, abs=1e-9)
    assert found.standard_error == pytest.approx(scipy.stats.sem(differences), abs=1e-9)
    if found.standard_error > 1e-6:
        theirs = scipy.stats.ttest_rel(second, first).confidence_interval(0.95)
        reach = theirs.high - theirs.low
        assert found.low == pytest.approx(theirs.low, abs=2e-3 * reach)
        assert found.high == pytest.approx(theirs.high, abs=2e-3 * reach)


@settings(max_examples=30)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=8))
def test_the_p_value_of_few_tasks_is_that_of_all_sign_flips(values):
    """Whole numbers, so that sums which are equal are equal."""
    nonzero = [value for value in values if value]
    sums = [
        abs(sum(s * v for s, v in zip(signs, nonzero, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(nonzero))
    ]
    assert sign_flip_p_value(values) == pytest.approx(fmean(total >= abs(sum(nonzero)) for total in sums))


def test_the_p_value_agrees_with_scipys_permutation_test():
    draw = random.Random(4)
    differences = [draw.gauss(0.5, 1) for _ in range(12)]
    theirs = scipy.stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
    )
    assert sign_flip_p_value(differences) == pytest.approx(theirs.pvalue)


def test_the_drawn_p_value_of_many_tasks_agrees_with_the_exact_binomial_one():
    """Differences of -1 and 1: the sum of random signs is binomial."""
    differences = [1.0] * 32 + [-1.0] * 18
    assert len(differences) > MAX_EXACT
    exact = scipy.stats.binomtest(32, 50).pvalue
    assert sign_flip_p_value(differences) == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 20_000) ** 0.5)
    assert sign_flip_p_value(differences) == sign_flip_p_value(differences)


def test_models_that_are_alike_are_told_apart_as_often_as_the_level_says():
    draw = random.Random(2)
    num_low = sum(
        sign_flip_p_value([draw.choice((-1, 0, 1)) * draw.random() for _ in range(13)]) <= 0.05 for _ in range(400)
    )
    assert 0.02 <= num_low / 400 <= 0.08


def test_tasks_that_are_hard_for_both_do_not_widen_the_interval():
    draw = random.Random(0)
    difficulty = [draw.random() for _ in range(60)]
    first = by_task(difficulty)
    second = by_task([value + 0.05 + draw.gauss(0, 0.01) for value in difficulty])
    found = paired_difference(first, second)
    unpaired = (scipy.stats.sem(difficulty) ** 2 * 2) ** 0.5
    assert found.low > 0
    assert found.standard_error < unpaired / 10


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    draw = random.Random(5)
    covered = 0
    for _ in range(300):
        chances = [draw.betavariate(2, 2) for _ in range(40)]
        first = {str(i): [float(draw.random() < c) for _ in range(4)] for i, c in enumerate(chances)}
        second = {str(i): [float(draw.random() < 0.8 * c + 0.2) for _ in range(4)] for i, c in enumerate(chances)}
        found = paired_difference(first, second)
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / 300 <= 0.985


def outcome(task, attempt, reward=0.0, failure=None):
    return Outcome(task, attempt, failure, reward, is_solved=reward >= 1)


def test_only_tasks_with_valid_attempts_on_both_sides_are_paired():
    first = [outcome("a", 0, 1.0), outcome("b", 0), outcome("c", 0, failure=FailureClass.MODEL)]
    second = [outcome("a", 0), outcome("a", 1, failure=FailureClass.MODEL), outcome("c", 0, 1.0), outcome("d", 0, 1.0)]
    found = compare(first, second)
    assert (found.reward.num_tasks, found.reward.mean, found.num_left_out) == (1, -1.0, 3)
    assert found.reward.low is None
    assert compare(first, [outcome("z", 0)]).reward is None


def test_flipped_tasks_are_those_that_another_model_solves_most_of_the_time():
    first = [
        outcome("lost", 0, 1.0),
        outcome("gained", 0),
        outcome("kept", 0, 1.0),
        outcome("tied", 0),
        outcome("tied", 1, 1.0),
    ]
    second = [
        outcome("lost", 0),
        outcome("gained", 0, 1.0),
        outcome("kept", 0, 1.0),
        outcome("tied", 0),
        outcome("tied", 1),
    ]
    assert [(flip.task, flip.is_gained) for flip in compare(first, second).flips] == [("lost", False), ("gained", True)]


def test_equal_results_differ_by_nothing():
    outcomes = [outcome(str(task), 0, float(task % 2)) for task in range(20)]
    found = compare(outcomes, outcomes)
    assert (found.reward.mean, found.reward.p_value, found.flips) == (0, 1, ())
