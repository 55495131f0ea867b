import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.inference.engine.sampler import draw, draw_truncated, uniforms


def ones(count: int) -> torch.Tensor:
    return torch.ones(count)


def many_uniforms(count: int) -> torch.Tensor:
    return torch.from_numpy(uniforms(np.full(count, 12345, np.uint64), np.arange(count)))


def frequencies(tokens: torch.Tensor, size: int) -> torch.Tensor:
    return torch.bincount(tokens, minlength=size) / len(tokens)


def test_random_numbers_are_uniform_and_uncorrelated_between_positions_and_seeds():
    grid = np.stack([uniforms(np.full(2000, seed, np.uint64), np.arange(2000)) for seed in range(50)])
    assert (grid.min() >= 0, grid.max() < 1) == (True, True)
    counts, _ = np.histogram(grid, bins=20, range=(0, 1))
    expected = grid.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi square with 19 degrees of freedom, p < 2e-4
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5]).repeat(40000, 1)
    temperatures = torch.full((40000,), 0.8)
    drawn = frequencies(draw(logits, temperatures, many_uniforms(40000)), 5)
    torch.testing.assert_close(drawn, (logits[0] / 0.8).softmax(-1), atol=0.01, rtol=0)


def truncated(logits, top_k=1000, top_p=1.0, min_p=0.0, count=20000):
    rows = logits.repeat(count, 1)
    limits = [torch.full((count,), float(limit)) for limit in (top_k, top_p, min_p)]
    return frequencies(draw_truncated(rows, *limits, many_uniforms(count)), len(logits))


def test_top_k_keeps_the_k_likeliest():
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    expected = torch.tensor([0.0, *logits[1:3].softmax(-1), 0.0])
    torch.testing.assert_close(truncated(logits, top_k=2), expected, atol=0.015, rtol=0)


def test_top_p_keeps_the_fewest_that_hold_the_mass():
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    expected = torch.tensor([0.0, 2 / 3, 0.0, 1 / 3])
    torch.testing.assert_close(truncated(probs.log(), top_p=0.7), expected, atol=0.015, rtol=0)


def test_min_p_drops_what_is_unlikely_beside_the_best():
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    expected = torch.tensor([0.0, 2 / 3, 0.0, 1 / 3])
    torch.testing.assert_close(truncated(probs.log(), min_p=0.4), expected, atol=0.015, rtol=0)


def test_a_tiny_top_p_still_leaves_the_best():
    assert truncated(torch.tensor([0.0, 3.0, 2.0]), top_p=1e-9)[1] == 1


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(2, 600), rows=st.integers(1, 40))
def test_a_row_is_drawn_alike_alone_and_in_any_batch(data, size, rows):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, size, generator=generator) * 4
    numbers = torch.rand(rows, generator=generator)
    temperatures = torch.rand(rows, generator=generator) + 0.3
    limits = (torch.full((rows,), 7.0), torch.full((rows,), 0.8), torch.full((rows,), 0.01))
    plain, cut = draw(logits, temperatures, numbers), draw_truncated(logits, *limits, numbers)
    for row in range(rows):
        one = slice(row, row + 1)
        assert draw(logits[one], temperatures[one], numbers[one]) == plain[row]
        assert draw_truncated(logits[one], *(limit[one] for limit in limits), numbers[one]) == cut[row]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 50), banned=st.integers(0, 49))
def test_a_token_of_probability_zero_is_never_drawn(size, banned):
    logits = torch.zeros(3, size + 1)
    logits[:, banned % (size + 1)] = -torch.inf
    numbers = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert (draw(logits, ones(3), numbers) != banned % (size + 1)).all()
