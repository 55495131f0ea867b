import itertools
import math
import random
from statistics import fmean, stdev

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hone.evals.statistics import (
    RunningMean,
    estimate_mean,
    estimate_pass_all,
    estimate_pass_at,
    estimate_proportion,
    pass_all,
    pass_at,
    student_t,
)


@pytest.mark.parametrize("num_solved", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_solved_attempt(k, num_solved):
    attempts = [True] * num_solved + [False] * (5 - num_solved)
    subsets = list(itertools.combinations(attempts, k))
    assert pass_at(k, 5, num_solved) == pytest.approx(fmean(any(subset) for subset in subsets))


@pytest.mark.parametrize("num_solved", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_all_k_is_the_share_of_subsets_that_are_solved_throughout(k, num_solved):
    attempts = [True] * num_solved + [False] * (5 - num_solved)
    subsets = list(itertools.combinations(attempts, k))
    assert pass_all(k, 5, num_solved) == pytest.approx(fmean(all(subset) for subset in subsets))


@pytest.mark.parametrize(
    ("estimate_of", "chance", "expected"),
    [(pass_at, 0.2, 1 - 0.8**4), (pass_all, 0.7, 0.7**4)],
)
def test_pass_at_k_and_pass_all_k_are_unbiased(estimate_of, chance, expected):
    draw = random.Random(1)
    estimates = [estimate_of(4, 10, sum(draw.random() < chance for _ in range(10))) for _ in range(4000)]
    assert abs(fmean(estimates) - expected) < 4 * stdev(estimates) / math.sqrt(len(estimates))


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=6), min_size=2, max_size=12))
def test_all_of_k_is_at_most_one_of_one_which_is_at_most_any_of_k(tasks):
    for k in (2, 3, 4):
        all_of, one, any_of = estimate_pass_all(k, tasks), estimate_pass_at(1, tasks), estimate_pass_at(k, tasks)
        assert all_of.mean <= one.mean + 1e-12
        assert one.mean <= any_of.mean + 1e-12


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=2, max_size=20))
def test_the_standard_error_is_that_of_a_regression_with_errors_clustered_by_task(tasks):
    """Equal numbers of attempts: the cluster-robust (Liang-Zeger) variance of a mean, from the residuals themselves."""
    tasks = [values[:1] * 3 if len(values) < 3 else values[:3] for values in tasks]
    estimate = estimate_mean({str(index): [value + 0.5 for value in values] for index, values in enumerate(tasks)})
    flat = [value + 0.5 for values in tasks for value in values]
    mean = fmean(flat)
    scores = [sum(value + 0.5 - mean for value in values) for values in tasks]
    correction = len(tasks) / (len(tasks) - 1)
    robust = math.sqrt(correction * sum(score**2 for score in scores)) / len(flat)
    assert estimate.standard_error == pytest.approx(robust, abs=1e-9)


def test_pass_at_more_than_the_attempts_is_refused():
    with pytest.raises(ValueError, match="needs at least 3 attempts"):
        pass_at(3, 2, 1)


# Quantiles as printed in tables of Student's distribution.
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)],
)
def test_student_quantiles_agree_with_the_tables(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, rel=2e-3)


def test_student_quantiles_agree_with_scipy():
    degrees = [*range(1, 40), 100, 400, 5000]
    assert [student_t(n) for n in degrees] == pytest.approx(list(scipy.stats.t.ppf(0.975, degrees)), rel=2e-3)


def test_wilsons_interval_agrees_with_scipy():
    values = {str(task): [float(task < 13)] for task in range(40)}
    theirs = scipy.stats.binomtest(13, 40).proportion_ci(0.95, method="wilson")
    estimate = estimate_mean(values)
    assert (estimate.low, estimate.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_a_mean_of_single_attempts_has_the_textbook_interval():
    values = [0.2, 0.9, 0.4, 0.7, 0.35]
    estimate = estimate_mean({str(task): [value] for task, value in enumerate(values)})
    reach = 2.7764 * stdev(values) / math.sqrt(5)
    assert estimate.mean == pytest.approx(fmean(values))
    assert (estimate.low, estimate.high) == pytest.approx((fmean(values) - reach, fmean(values) + reach), rel=1e-3)


def test_copies_of_an_attempt_add_no_certainty():
    once = {str(task): [float(task % 3) * 0.5 + 0.1] for task in range(12)}
    often = {task: values * 50 for task, values in once.items()}
    first, second = estimate_mean(once), estimate_mean(often)
    assert (second.low, second.high) == pytest.approx((first.low, first.high))


def test_one_attempt_for_each_task_gives_wilsons_interval():
    """Wilson's interval for 45 of 60, by solving (p - x)^2 = z^2 x (1 - x) / n for x."""
    values = {str(task): [1.0 if task < 45 else 0.0] for task in range(60)}
    estimate = estimate_mean(values)
    p, n, z = 0.75, 60, 1.959964
    a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
    roots = [(-b + sign * math.sqrt(b * b - 4 * a * c)) / (2 * a) for sign in (-1, 1)]
    assert estimate.mean == 0.75
    assert (estimate.low, estimate.high) == pytest.approx(roots, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_agreement_of_all_is_not_certainty(value):
    estimate = estimate_mean({str(task): [value] * 8 for task in range(20)})
    assert estimate.mean == value
    assert 0.1 < estimate.high - estimate.low < 0.2


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=12))
def test_intervals_of_proportions_hold_the_mean_and_stay_in_bounds(tasks):
    estimates = [estimate_mean({str(i): list(map(float, solved)) for i, solved in enumerate(tasks)})]
    estimates += [estimate for k in (1, 2, 4) if (estimate := estimate_pass_at(k, tasks)) is not None]
    for estimate in estimates:
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        assert estimate.high - estimate.low > 0.05


@pytest.mark.parametrize(("num_tasks", "attempts"), [(10, 1), (25, 4), (60, 8)])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_intervals_cover_the_truth_as_often_as_they_say(num_tasks, attempts, spread):
    """Tasks of a difficulty from a beta distribution, attempts alike within a task."""
    draw = random.Random(7)
    truth, num_trials = 0.8, 400
    covered = 0
    for _ in range(num_trials):
        chances = [draw.betavariate(truth * spread, (1 - truth) * spread) for _ in range(num_tasks)]
        tasks = {str(i): [float(draw.random() < chance) for _ in range(attempts)] for i, chance in enumerate(chances)}
        estimate = estimate_mean(tasks)
        covered += estimate.low <= truth <= estimate.high
    assert 0.92 <= covered / num_trials <= 0.995


def test_the_interval_of_pass_at_k_covers_the_truth():
    draw = random.Random(3)
    covered = 0
    for _ in range(300):
        chances = [draw.choice([0.05, 0.5]) for _ in range(40)]
        tasks = [[draw.random() < chance for _ in range(8)] for chance in chances]
        estimate = estimate_pass_at(4, tasks)
        covered += estimate.low <= fmean(1 - (1 - chance) ** 4 for chance in (0.05, 0.5)) <= estimate.high
    assert 0.92 <= covered / 300 <= 0.995


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from([0.0, 1.0]) | st.floats(-3, 3)), min_size=1, max_size=40
    ),
    st.booleans(),
)
def test_a_running_mean_says_what_the_mean_of_the_same_values_says(values, binary):
    running, tasks = RunningMean(), {}
    for task, value in values:
        value = float(value > 0) if binary else value
        running.add(task, value)
        tasks.setdefault(task, []).append(value)
        found, expected = running.estimate(), estimate_mean(tasks)
        assert found.num_tasks == expected.num_tasks
        for name in ("mean", "low", "high", "standard_error"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert ours == theirs if theirs is None else ours == pytest.approx(theirs, abs=1e-6)
    for task, value in values[1:]:
        running.remove(task, float(value > 0) if binary else value)
    task, value = values[0]
    left = running.estimate()
    assert (left.num_tasks, left.mean) == (1, pytest.approx(float(value > 0) if binary else value, abs=1e-6))


def test_no_values_have_no_running_mean():
    assert RunningMean().estimate() is None


def test_one_task_alone_tells_no_interval_of_a_mean():
    estimate = estimate_mean({"only": [0.25, 0.5]})
    assert (estimate.mean, estimate.low, estimate.high) == (0.375, None, None)


def test_one_task_alone_tells_little_of_a_proportion():
    estimate = estimate_proportion([0.5], num_values=100)
    assert estimate.high - estimate.low > 0.5


def test_tasks_without_values_are_left_out():
    assert estimate_mean({}) is None
    assert estimate_mean({"a": []}) is None
    assert estimate_mean({"a": [], "b": [0.5], "c": [0.7]}).num_tasks == 2
    assert estimate_pass_at(4, [[True] * 3]) is None
