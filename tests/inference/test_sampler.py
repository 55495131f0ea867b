import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.inference.engine.sampler import draw_truncated, uniforms
from hone.model import ops
from hone.model.native import library

BACKENDS = ["torch", "native"] if library.available() else ["torch"]


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


def drawn(backend, *arguments):
    with ops.use_backend(backend):
        return ops.draw(*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_drawn_with_their_probabilities(backend):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5]).repeat(40000, 1)
    temperatures = torch.full((40000,), 0.8)
    found = frequencies(drawn(backend, logits, temperatures, many_uniforms(40000)), 5)
    torch.testing.assert_close(found, (logits[0] / 0.8).softmax(-1), atol=0.01, rtol=0)


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
    plain = {backend: drawn(backend, logits, temperatures, numbers) for backend in BACKENDS}
    cut = draw_truncated(logits, *limits, numbers)
    for row in range(rows):
        one = slice(row, row + 1)
        for backend in BACKENDS:
            assert drawn(backend, logits[one], temperatures[one], numbers[one]) == plain[backend][row]
        assert draw_truncated(logits[one], *(limit[one] for limit in limits), numbers[one]) == cut[row]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 50), banned=st.integers(0, 49))
def test_a_token_of_probability_zero_is_never_drawn(size, banned):
    logits = torch.zeros(3, size + 1)
    logits[:, banned % (size + 1)] = -torch.inf
    numbers = torch.tensor([0.0, 0.5, 1 - 2**-24])
    for backend in BACKENDS:
        assert (drawn(backend, logits, ones(3), numbers) != banned % (size + 1)).all()


@pytest.mark.skipif("native" not in BACKENDS, reason="no native kernels here")
def test_both_backends_draw_the_same_tokens_but_for_rounding():
    logits = torch.randn(4000, 300, generator=torch.Generator().manual_seed(0)) * 3
    both = [drawn(backend, logits, torch.full((4000,), 0.9), many_uniforms(4000)) for backend in BACKENDS]
    assert (both[0] != both[1]).sum() < 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_not_numbers_still_give_a_token_of_the_vocabulary(backend):
    found = drawn(backend, torch.full((2, 37), torch.nan), ones(2), torch.tensor([0.0, 0.9]))
    assert ((found >= 0) & (found < 37)).all()
