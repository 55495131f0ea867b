"""Advantages against the formulas, with the standard library's statistics as the other side."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.orchestrator.advantages import advantages, normalised

groups = st.lists(st.floats(0, 10), min_size=2, max_size=16)


@given(groups)
def test_grpo_divides_by_the_samples_standard_deviation(rewards):
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    expected = [(r - mean) / (deviation + 1e-6) for r in rewards]
    assert advantages("grpo", rewards) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(groups)
def test_dr_grpo_subtracts_the_mean(rewards):
    mean = statistics.fmean(rewards)
    assert advantages("dr_grpo", rewards) == pytest.approx([r - mean for r in rewards], abs=1e-9)


@given(groups)
def test_rloo_subtracts_the_mean_of_the_others(rewards):
    expected = [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    assert advantages("rloo", rewards) == pytest.approx(expected, abs=1e-9)


@given(groups)
def test_rloo_is_dr_grpo_times_n_over_n_minus_1(rewards):
    factor = len(rewards) / (len(rewards) - 1)
    assert advantages("rloo", rewards) == pytest.approx([factor * a for a in advantages("dr_grpo", rewards)], abs=1e-9)


def test_max_rl_divides_by_the_mean():
    assert advantages("max_rl", [1, 0, 0, 0]) == [3, -1, -1, -1]
    assert advantages("max_rl", [1, 1, 0, 0]) == [1, 1, -1, -1]


def test_max_rl_of_a_group_without_success_is_zero():
    assert advantages("max_rl", [0.0, 0.0]) == [0.0, 0.0]


def test_max_rl_of_a_group_whose_mean_is_not_positive_is_zero():
    assert advantages("max_rl", [0.5, -1.0]) == [0.0, 0.0]
    assert advantages("max_rl", [1.0, -1.0]) == [0.0, 0.0]
    assert advantages("max_rl", [1.0, -0.5]) == [3.0, -3.0]


@given(groups, st.sampled_from(["grpo", "dr_grpo", "rloo"]))
def test_advantages_of_a_group_add_up_to_zero(rewards, estimator):
    assert sum(advantages(estimator, rewards)) == pytest.approx(0, abs=1e-6)


@given(st.floats(0, 10), st.integers(2, 16), st.sampled_from(["grpo", "dr_grpo", "rloo", "max_rl"]))
def test_equal_rewards_have_no_advantage(reward, size, estimator):
    assert advantages(estimator, [reward] * size) == pytest.approx([0] * size, abs=1e-6)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        advantages("grpo", [1.0])


def test_normalised_advantages_have_unit_deviation_and_keep_their_sign():
    values = [0.5, -0.5, 0.1, -0.1, 0.0]
    scaled = normalised(values)
    assert statistics.pstdev(scaled) == pytest.approx(1, rel=1e-4)
    assert [a > 0 for a in scaled] == [a > 0 for a in values]


def test_a_step_without_any_advantage_stays_finite():
    assert normalised([0.0, 0.0, 0.0]) == [0.0, 0.0, 0.0]
