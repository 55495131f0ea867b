"""Policy losses as pure functions: ratio, surrogate with its mask, penalties, reducer.

All tensors are flat over the T trained tokens of a micro-batch; S sequences. The anchor of every ratio is the
policy that sampled the token, so there is no third forward pass and no correction weight to add: a weight on top
of these ratios would count the mismatch twice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from hone.config.recipe import LossSection

MAX_LOG_RATIO = 20.0

Kind = Literal["icepop", "dppo_tv", "ppo_clip", "gspo", "cispo", "aipo"]
Reducer = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A policy loss with every bound resolved. `max_tokens` is the length that the constant reducer divides by."""

    kind: Kind
    low: float
    high: float
    sequence_mask_below: float = 0.0
    reducer: Reducer = "token_mean"
    max_tokens: int = 1
    kl_tau: float = 0.0
    reference_kl: float = 0.0

    @classmethod
    def from_section(cls, section: LossSection, max_tokens: int) -> Self:
        """Fill the bounds that a recipe leaves open."""
        low, high = DEFAULT_BOUNDS[section.kind]
        return cls(
            kind=section.kind,
            low=low if section.low is None else section.low,
            high=high if section.high is None else section.high,
            sequence_mask_below=section.sequence_mask_below,
            reducer=section.reducer,
            max_tokens=max_tokens,
            kl_tau=section.kl_tau,
            reference_kl=section.reference_kl,
        )


# Sources: IcePop as in INTELLECT-3; DPPO 2602.04879; PPO 1707.06347; GSPO 2507.18071; ScaleRL's cap for the others.
DEFAULT_BOUNDS: dict[Kind, tuple[float, float]] = {
    "icepop": (0.5, 5.0),
    "dppo_tv": (0.2, 0.2),
    "ppo_clip": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (0.0, 5.0),
    "aipo": (0.0, 5.0),
}


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What is known of the trained tokens before the forward pass. `sequence_ids_T` counts from 0 to S - 1."""

    sampler_logprobs_T: Tensor
    advantages_T: Tensor
    sequence_ids_T: Tensor
    num_sequences: int


@dataclass(frozen=True, slots=True)
class Denominators:
    """Trained tokens, and sequences that have any, of the whole step: over all micro-batches and ranks."""

    num_tokens: int
    num_sequences: int


class Surrogate(NamedTuple):
    """The loss of every token, and where its gradient is let through."""

    loss_T: Tensor
    kept_T: Tensor


def policy_loss(
    logprobs_T: Tensor,
    tokens: SampledTokens,
    loss: PolicyLoss,
    denominators: Denominators,
    reference_logprobs_T: Tensor | None = None,
) -> Tensor:
    """The part of the step's loss that these tokens contribute; the parts of all micro-batches add up to the loss."""
    loss_T = SURROGATES[loss.kind](logprobs_T, tokens, loss.low, loss.high).loss_T
    if loss.kl_tau:
        loss_T = loss_T + loss.kl_tau * log_ratio(logprobs_T, tokens.sampler_logprobs_T).square()
    if loss.reference_kl:
        assert reference_logprobs_T is not None, "a reference KL needs the reference's logprobs"
        loss_T = loss_T + loss.reference_kl * reference_kl(logprobs_T, reference_logprobs_T)
    healthy_T = healthy_sequences(logprobs_T, tokens, loss.sequence_mask_below)
    weights_T = reduction_weights(loss.reducer, tokens, denominators, loss.max_tokens)
    return torch.where(healthy_T, loss_T, 0.0).mul(weights_T).sum()


def supervised_loss(logprobs_T: Tensor, denominators: Denominators) -> Tensor:
    """Cross entropy, a mean over the trained tokens of the whole step."""
    return -logprobs_T.sum() / denominators.num_tokens


def kept_tokens(logprobs_T: Tensor, tokens: SampledTokens, loss: PolicyLoss) -> Tensor:
    """Where the surrogate's gradient is let through, by token and by sequence."""
    kept_T = SURROGATES[loss.kind](logprobs_T, tokens, loss.low, loss.high).kept_T
    return kept_T & healthy_sequences(logprobs_T, tokens, loss.sequence_mask_below)


def log_ratio(logprobs_T: Tensor, sampler_logprobs_T: Tensor) -> Tensor:
    """log of the importance ratio, clamped: exp of it is finite, so a mask never multiplies infinity by 0."""
    return (logprobs_T - sampler_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def icepop(logprobs_T: Tensor, tokens: SampledTokens, low: float, high: float) -> Surrogate:
    """-ratio * advantage, with the ratio zeroed outside [low, high]; the gradient flows through the ratio."""
    ratio_T = log_ratio(logprobs_T, tokens.sampler_logprobs_T).exp()
    # Asked this way round, NaN is kept and makes the loss NaN, which stops the step; a mask must not hide it.
    kept_T = ~((ratio_T < low) | (ratio_T > high))
    return Surrogate(torch.where(kept_T, -ratio_T * tokens.advantages_T, 0.0), kept_T)


def dppo_tv(logprobs_T: Tensor, tokens: SampledTokens, low: float, high: float) -> Surrogate:
    """-ratio * advantage, masked where the probability has already moved by more than the bound the advantage's way."""
    ratio_T = log_ratio(logprobs_T, tokens.sampler_logprobs_T).exp()
    moved_T = logprobs_T.detach().exp() - tokens.sampler_logprobs_T.exp()
    too_far_up_T = (tokens.advantages_T > 0) & (moved_T > high)
    too_far_down_T = (tokens.advantages_T < 0) & (moved_T < -low)
    kept_T = ~(too_far_up_T | too_far_down_T)
    return Surrogate(torch.where(kept_T, -ratio_T * tokens.advantages_T, 0.0), kept_T)


def ppo_clip(logprobs_T: Tensor, tokens: SampledTokens, low: float, high: float) -> Surrogate:
    """-min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)."""
    ratio_T = log_ratio(logprobs_T, tokens.sampler_logprobs_T).exp()
    return _clipped(ratio_T, tokens.advantages_T, low, high)


def gspo(logprobs_T: Tensor, tokens: SampledTokens, low: float, high: float) -> Surrogate:
    """PPO's clipping of the sequence's geometric mean ratio.

    In the token form of 2507.18071, eq. 14: every token carries the value of its sequence's ratio and the gradient of
    its own logprob, which with the sequence_mean reducer is the gradient of the sequence form.
    """
    sums_S = logprobs_T.new_zeros(tokens.num_sequences)
    log_ratio_T = log_ratio(logprobs_T, tokens.sampler_logprobs_T).detach()
    sums_S = sums_S.index_add(0, tokens.sequence_ids_T, log_ratio_T)
    means_S = sums_S / _lengths(tokens).clamp(min=1)
    ratio_T = means_S.exp()[tokens.sequence_ids_T] * (logprobs_T - logprobs_T.detach()).exp()
    return _clipped(ratio_T, tokens.advantages_T, low, high)


def detached_ratio(logprobs_T: Tensor, tokens: SampledTokens, low: float, high: float) -> Surrogate:
    """-sg(min(ratio, high)) * advantage * logprob: every token trains, none with more than `high` times its weight.

    CISPO (2506.13585) and AIPO (2505.24034) are this one formula when both are anchored on the sampler.
    """
    ratio_T = log_ratio(logprobs_T, tokens.sampler_logprobs_T).detach().exp()
    loss_T = -ratio_T.clamp(low, high) * tokens.advantages_T * logprobs_T
    return Surrogate(loss_T, torch.ones_like(ratio_T, dtype=torch.bool))


SURROGATES: dict[Kind, Callable[[Tensor, SampledTokens, float, float], Surrogate]] = {
    "icepop": icepop,
    "dppo_tv": dppo_tv,
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": detached_ratio,
    "aipo": detached_ratio,
}


def _clipped(ratio_T: Tensor, advantages_T: Tensor, low: float, high: float) -> Surrogate:
    free_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - low, 1 + high) * advantages_T
    kept_T = (free_T <= clipped_T).detach()
    return Surrogate(-torch.where(kept_T, free_T, clipped_T.detach()), kept_T)


def healthy_sequences(logprobs_T: Tensor, tokens: SampledTokens, sequence_mask_below: float) -> Tensor:
    """False for every token of a sequence that has a token ratio under the bound."""
    if sequence_mask_below == 0:
        return torch.ones_like(logprobs_T, dtype=torch.bool)
    # The logs are compared, unclamped: a bound under exp(-20) means what it says.
    too_low_T = (logprobs_T - tokens.sampler_logprobs_T).detach() < math.log(sequence_mask_below)
    num_low_S = logprobs_T.new_zeros(tokens.num_sequences).index_add(
        0, tokens.sequence_ids_T, too_low_T.to(logprobs_T.dtype)
    )
    return (num_low_S == 0)[tokens.sequence_ids_T]


def reference_kl(logprobs_T: Tensor, reference_logprobs_T: Tensor) -> Tensor:
    """KL to the reference policy, estimated per token: the value of k3, the gradient of k2.

    k3 = exp(x) - x - 1 with x = reference - policy has low variance and no negative values, but its gradient is not
    that of the KL; the gradient of k2 = x^2 / 2 is (Schulman, "Approximating KL divergence").
    """
    x_T = log_ratio(reference_logprobs_T, logprobs_T)
    k2_T = x_T.square() / 2
    k3_T = (x_T.exp() - x_T - 1).detach()
    return k2_T + (k3_T - k2_T.detach())


def reduction_weights(
    reducer: Reducer, tokens: SampledTokens, denominators: Denominators, max_tokens: int
) -> Tensor | float:
    """What every token's loss is multiplied by before the sum over the step.

    The denominators are those of the whole step, masked tokens included: however the step is cut into micro-batches
    and ranks, and whatever a mask drops, the remaining tokens keep their weight.
    """
    match reducer:
        case "token_mean":
            return 1 / denominators.num_tokens
        case "sequence_mean":
            # Micro-batches never split a sequence, so its length is known here.
            return 1 / (_lengths(tokens)[tokens.sequence_ids_T] * denominators.num_sequences)
        case "sequence_sum":
            return 1 / denominators.num_sequences
        case "constant":
            return 1 / (denominators.num_sequences * max_tokens)


def _lengths(tokens: SampledTokens) -> Tensor:
    """Trained tokens per sequence, as numbers to divide by."""
    counts_S = torch.bincount(tokens.sequence_ids_T, minlength=tokens.num_sequences)
    return counts_S.to(tokens.sampler_logprobs_T.dtype)
