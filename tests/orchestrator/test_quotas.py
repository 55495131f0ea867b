"""Turns by weight: at every moment nobody is a whole turn away from the exact share."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.orchestrator.quotas import Quotas

WEIGHTS = st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 10), min_size=1)
DECIMALS = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 40).map(lambda n: n / 10), min_size=1)


def exact_share(weights, name):
    written = {key: Fraction(str(weight)) for key, weight in weights.items()}
    return written[name] / sum(written.values())


@settings(max_examples=40)
@given(WEIGHTS | DECIMALS, st.integers(1, 120))
def test_every_prefix_keeps_every_share_rounded_down_or_up(weights, num_turns):
    quotas = Quotas(weights)
    for total in range(1, num_turns + 1):
        quotas.take()
        for name in weights:
            share = exact_share(weights, name) * total
            assert math.floor(share) <= quotas.counts[name] <= math.ceil(share)
            assert quotas.error(name) == abs(quotas.counts[name] - share) < 1


@given(DECIMALS)
def test_a_share_that_is_a_whole_number_is_met_exactly(weights):
    shares = [exact_share(weights, name) for name in weights]
    period = math.lcm(*(share.denominator for share in shares))
    quotas = Quotas(weights)
    for _ in range(3):
        for _ in range(period):
            quotas.take()
        assert all(quotas.error(name) == 0 for name in weights)


@given(WEIGHTS, st.integers(0, 60), st.integers(1, 60))
def test_counts_alone_say_how_it_goes_on(weights, before, after):
    quotas = Quotas(weights)
    for _ in range(before):
        quotas.take()
    resumed = Quotas(weights)
    resumed.restore(dict(quotas.counts))
    assert [resumed.take() for _ in range(after)] == [quotas.take() for _ in range(after)]


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.3, 0.4], [4, 3, 2, 1], [0.55, 0.25, 0.15, 0.05]])
def test_four_weights_over_ten_thousand_turns_have_no_error_at_any_checkpoint(weights):
    quotas = Quotas(dict(zip("abcd", weights, strict=True)))
    for turn in range(1, 10_001):
        quotas.take()
        assert all(quotas.error(name) < 1 for name in "abcd")
        if turn % 100 == 0:
            assert [quotas.error(name) for name in "abcd"] == [0, 0, 0, 0]
