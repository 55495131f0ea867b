"""Every loss against its formula, written again in float64 numpy, with its gradient; and the traps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hone.config.recipe import LossSection
from hone.trainer.losses import (
    DEFAULT_BOUNDS,
    Denominators,
    PolicyLoss,
    Reducer,
    SampledTokens,
    kept_tokens,
    policy_loss,
    reference_kl,
    supervised_loss,
)

KINDS = list(DEFAULT_BOUNDS)
REDUCERS = ["token_mean", "sequence_mean", "sequence_sum", "constant"]


def sampled(logprobs: list[float], advantages: list[float], lengths: list[int] | None = None) -> SampledTokens:
    lengths = lengths or [len(logprobs)]
    return SampledTokens(
        sampler_logprobs_T=torch.tensor(logprobs, dtype=torch.float64),
        advantages_T=torch.tensor(advantages, dtype=torch.float64),
        sequence_ids_T=torch.repeat_interleave(torch.tensor(lengths)),
        num_sequences=len(lengths),
    )


def value_and_gradient(
    logprobs: list[float] | Tensor, tokens: SampledTokens, loss: PolicyLoss, **kwargs: Tensor
) -> tuple[float, np.ndarray]:
    """Of the loss summed with denominators 1, so that the figures are those of single tokens."""
    x = torch.as_tensor(logprobs, dtype=torch.float64).clone().requires_grad_()
    value = policy_loss(x, tokens, loss, Denominators(1, 1), **kwargs)
    (gradient,) = torch.autograd.grad(value, x)
    return value.item(), gradient.numpy()


def loss_of(
    kind: str,
    low: float | None = None,
    high: float | None = None,
    reducer: Reducer = "token_mean",
    **fields: object,
) -> PolicyLoss:
    """Any kind with any reducer: the formulas go together where a recipe refuses the pair (gspo)."""
    section = LossSection.model_validate({"kind": kind, "low": low, "high": high, "sequence_mask_below": 0} | fields)
    return replace(PolicyLoss.from_section(section, max_tokens=10), reducer=reducer)


def test_icepop_passes_ratios_inside_its_bounds_and_zeroes_the_others() -> None:
    sampler = [-1.0] * 5
    ratios = np.array([0.4, 0.5, 1.0, 5.0, 5.1])
    tokens = sampled(sampler, [2.0, 2.0, -3.0, 1.0, 1.0])
    # The two at the bounds are moved inside by a rounding error's width.
    logprobs = torch.tensor(np.log(ratios * [1, 1 + 1e-12, 1, 1 - 1e-12, 1]) - 1.0)
    value, gradient = value_and_gradient(logprobs, tokens, loss_of("icepop"))
    assert value == pytest.approx(-(0.5 * 2 - 1.0 * 3 + 5.0 * 1))
    # d(-ratio * A)/dlogprob = -ratio * A: the gradient flows through the ratio.
    np.testing.assert_allclose(gradient, [0, -1.0, 3.0, -5.0, 0], atol=1e-9)


def test_dppo_masks_only_what_has_moved_too_far_the_way_its_advantage_pushes() -> None:
    sampler_p = np.array([0.5, 0.5, 0.5, 0.5, 0.5])
    trainer_p = np.array([0.71, 0.71, 0.29, 0.29, 0.69])
    advantages = [1.0, -1.0, -1.0, 1.0, 1.0]
    tokens = sampled(np.log(sampler_p).tolist(), advantages)
    value, gradient = value_and_gradient(np.log(trainer_p).tolist(), tokens, loss_of("dppo_tv"))
    ratios = trainer_p / sampler_p
    expected = np.array([0, ratios[1], 0, -ratios[3], -ratios[4]])
    assert value == pytest.approx(expected.sum())
    np.testing.assert_allclose(gradient, expected, rtol=1e-9)


def test_dppo_keeps_an_unlikely_token_whose_ratio_is_large() -> None:
    # That is its point against clipping ratios: 1e-3 to 1e-2 is a ratio of 10, but hardly any probability.
    tokens = sampled([math.log(1e-3)], [1.0])
    _, by_dppo = value_and_gradient([math.log(1e-2)], tokens, loss_of("dppo_tv"))
    _, by_clip = value_and_gradient([math.log(1e-2)], tokens, loss_of("ppo_clip"))
    np.testing.assert_allclose(by_dppo, [-10.0])
    np.testing.assert_allclose(by_clip, [0.0])


def test_ppo_clips_upwards_for_good_and_downwards_for_bad_tokens_only() -> None:
    ratios = np.array([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = np.array([1.0, -1.0, 1.0, -1.0, 2.0])
    tokens = sampled([-2.0] * 5, advantages.tolist())
    value, gradient = value_and_gradient((np.log(ratios) - 2).tolist(), tokens, loss_of("ppo_clip", 0.2, 0.28))
    clipped = np.clip(ratios, 0.8, 1.28)
    assert value == pytest.approx(-np.minimum(ratios * advantages, clipped * advantages).sum())
    np.testing.assert_allclose(gradient, [0, 1.5, -0.5, 0, -2.2], rtol=1e-9)


def test_gspo_has_the_value_and_the_gradient_of_the_sequence_form() -> None:
    rng = np.random.default_rng(0)
    lengths = [3, 5, 2]
    sampler, moves = -rng.random(10), rng.normal(scale=0.02, size=10)
    advantage_of = np.array([1.0, -2.0, 0.5])
    tokens = sampled(sampler.tolist(), np.repeat(advantage_of, lengths).tolist(), lengths)
    loss = loss_of("gspo", 0.01, 0.01, reducer="sequence_mean")
    value, gradient = value_and_gradient((sampler + moves).tolist(), tokens, loss)

    expected, expected_gradient = 0.0, np.zeros(10)
    ends = np.cumsum(lengths)
    for advantage, start, end in zip(advantage_of, ends - lengths, ends, strict=True):
        ratio = np.exp(moves[start:end].mean())
        free, clipped = ratio * advantage, np.clip(ratio, 0.99, 1.01) * advantage
        expected -= min(free, clipped)
        if free <= clipped:
            expected_gradient[start:end] = -free / (end - start)
    assert value == pytest.approx(expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9)


@pytest.mark.parametrize("kind", ["cispo", "aipo"])
def test_detached_ratios_are_capped_and_every_token_keeps_a_gradient(kind: str) -> None:
    ratios = np.array([0.01, 1.0, 4.0, 50.0])
    advantages = np.array([1.0, -1.0, 2.0, 1.0])
    tokens = sampled([-3.0] * 4, advantages.tolist())
    logprobs = np.log(ratios) - 3
    value, gradient = value_and_gradient(logprobs.tolist(), tokens, loss_of(kind, high=4.5))
    weights = np.minimum(ratios, 4.5)
    assert value == pytest.approx(-(weights * advantages * logprobs).sum())
    np.testing.assert_allclose(gradient, -weights * advantages, rtol=1e-9)


def test_on_policy_every_ratio_loss_has_the_gradient_of_reinforce() -> None:
    logprobs = [-0.3, -1.0, -2.5, -0.1]
    tokens = sampled(logprobs, [1.0, 1.0, -2.0, -2.0], [2, 2])
    for kind in KINDS:
        _, gradient = value_and_gradient(logprobs, tokens, loss_of(kind))
        np.testing.assert_allclose(gradient, [-1, -1, 2, 2], err_msg=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_no_ratio_however_extreme_makes_a_loss_or_gradient_infinite(kind: str) -> None:
    # prime-rl issue 2972: an unclamped exp overflows, and a mask then multiplies infinity by 0.
    tokens = sampled([-200.0, -0.0, -1.0], [1.0, 1.0, -1.0])
    value, gradient = value_and_gradient([-0.0, -200.0, -1.0], tokens, loss_of(kind, kl_tau=1e-3))
    assert math.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["trainer", "sampler"])
def test_a_logprob_that_is_not_a_number_is_not_masked_away(kind: str, side: str) -> None:
    nan = float("nan")
    tokens = sampled([-1.0, nan if side == "sampler" else -1.0], [1.0, 1.0])
    value, _ = value_and_gradient([-1.0, nan if side == "trainer" else -1.0], tokens, loss_of(kind))
    assert math.isnan(value)


def test_one_ratio_under_the_bound_leaves_out_its_whole_sequence() -> None:
    logprobs = [-1.0, -1.0, -14.0, -1.0]
    tokens = sampled([-1.0] * 4, [1.0] * 4, [1, 3])
    loss = loss_of("aipo", sequence_mask_below=1e-5, kl_tau=1.0)
    _, gradient = value_and_gradient(logprobs, tokens, loss)
    np.testing.assert_allclose(gradient, [-1.0, 0, 0, 0])
    kept = kept_tokens(torch.tensor(logprobs, dtype=torch.float64), tokens, loss)
    assert kept.tolist() == [True, False, False, False]


def test_a_sequence_bound_below_the_clamp_of_the_ratio_still_works() -> None:
    tokens = sampled([-1.0, -1.0], [1.0, 1.0], [1, 1])
    loss = loss_of("aipo", sequence_mask_below=math.exp(-30))
    _, gradient = value_and_gradient([-32.0, -30.0], tokens, loss)
    assert gradient[0] == 0
    assert gradient[1] != 0


def test_kl_tau_adds_the_squared_log_ratio() -> None:
    tokens = sampled([-1.0, -2.0], [0.0, 0.0])
    value, gradient = value_and_gradient([-0.5, -2.2], tokens, loss_of("icepop", kl_tau=0.1))
    assert value == pytest.approx(0.1 * (0.5**2 + 0.2**2))
    np.testing.assert_allclose(gradient, [0.1 * 2 * 0.5, 0.1 * 2 * -0.2])


def test_reference_kl_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    policy, reference = np.array([-1.0, -2.0, -0.5]), np.array([-1.4, -1.1, -0.5])
    x = torch.tensor(policy, requires_grad=True)
    kl_T = reference_kl(x, torch.tensor(reference))
    difference = reference - policy
    np.testing.assert_allclose(kl_T.detach().numpy(), np.exp(difference) - difference - 1)
    kl_T.sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), -difference)


def test_reference_kl_estimates_the_kl_and_its_gradient_over_many_samples() -> None:
    # A categorical policy over four outcomes: the estimate is averaged exactly, with the policy's probabilities.
    logits = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()
    true_kl = (logits.softmax(0) * (logits.log_softmax(0) - reference)).sum()
    (true_gradient,) = torch.autograd.grad(true_kl, logits)
    estimate = (logits.softmax(0).detach() * reference_kl(logits.log_softmax(0), reference)).sum()
    (gradient,) = torch.autograd.grad(estimate, logits)
    assert estimate.item() == pytest.approx(true_kl.item())
    torch.testing.assert_close(gradient, true_gradient)


def test_the_reference_enters_the_policy_loss() -> None:
    tokens = sampled([-1.0], [0.0])
    reference = torch.tensor([-1.5], dtype=torch.float64)
    value, gradient = value_and_gradient(
        [-1.0], tokens, loss_of("icepop", reference_kl=2.0), reference_logprobs_T=reference
    )
    assert value == pytest.approx(2.0 * (math.exp(-0.5) + 0.5 - 1))
    np.testing.assert_allclose(gradient, [2.0 * 0.5])


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        ("token_mean", [1 / 20] * 5),
        ("sequence_mean", [1 / (2 * 7)] * 2 + [1 / (3 * 7)] * 3),
        ("sequence_sum", [1 / 7] * 5),
        ("constant", [1 / (7 * 10)] * 5),
    ],
)
def test_reducers_divide_by_what_the_whole_step_holds(reducer: str, expected: list[float]) -> None:
    tokens = sampled([-1.0] * 5, [-1.0] * 5, [2, 3])
    x = torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True)
    policy_loss(x, tokens, loss_of("icepop", reducer=reducer), Denominators(20, 7)).backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_step_add_up_to_the_step_however_it_is_cut(kind: str, reducer: str) -> None:
    rng = np.random.default_rng(1)
    lengths = [4, 1, 6, 3]
    sampler, advantages = -rng.random(14) * 3, rng.normal(size=14)
    logprobs = sampler + rng.normal(scale=0.5, size=14)
    logprobs[11] -= 13
    loss = loss_of(kind, reducer=reducer, kl_tau=0.1, sequence_mask_below=1e-5)
    denominators = Denominators(14, 4)
    whole = policy_loss(
        torch.tensor(logprobs), sampled(sampler.tolist(), advantages.tolist(), lengths), loss, denominators
    )
    ends = np.cumsum(lengths)
    parts = [
        policy_loss(
            torch.tensor(logprobs[a:b]), sampled(sampler[a:b].tolist(), advantages[a:b].tolist()), loss, denominators
        )
        for a, b in zip(ends - lengths, ends, strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_an_empty_micro_batch_adds_nothing() -> None:
    none = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        for reducer in REDUCERS:
            loss = loss_of(kind, reducer=reducer)
            tokens = SampledTokens(none.detach(), none.detach(), torch.zeros(0, dtype=torch.int64), 1)
            assert policy_loss(none, tokens, loss, Denominators(5, 2)).item() == 0


def test_supervised_loss_is_the_mean_over_the_step() -> None:
    assert supervised_loss(torch.tensor([-1.0, -3.0]), Denominators(8, 1)).item() == pytest.approx(0.5)
