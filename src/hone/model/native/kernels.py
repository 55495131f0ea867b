"""The native kernels under the names of `hone.model.ops`, differentiable where the model trains.

A row's result depends bit for bit on its own inputs alone: not on how many rows there are, how sequences are packed,
chunked or paged, or on the number of threads. Only float32 tensors on the CPU are welcome.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hone.model.native import calls
from hone.model.native.library import available
from hone.model.native.packs import forget_packs

__all__ = [
    "add_rms_norm",
    "available",
    "draw",
    "experts",
    "forget_packs",
    "linear",
    "mixture",
    "mlp",
    "packed_attention",
    "paged_attention",
    "rms_norm",
    "rotary",
    "route",
    "swiglu",
    "token_logprobs",
    "write_cache",
]


Score = Literal["sigmoid", "softmax"]


def rms_norm(x_xD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if _trains(x_xD, weight_D):
        out: Tensor = _applied(_RmsNorm, x_xD, weight_D, eps)
        return out
    return calls.rms_norm(x_xD, weight_D, eps)


def add_rms_norm(x_xD: Tensor, residual_xD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of x and residual, and its norm: the step between two blocks of the model."""
    if _trains(x_xD, residual_xD, weight_D):
        total = x_xD + residual_xD
        return total, rms_norm(total, weight_D, eps)
    return calls.add_rms_norm(x_xD, residual_xD, weight_D, eps)


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    if _trains(x_ND, weight_OD) or (bias_O is not None and _trains(bias_O)):
        out: Tensor = _applied(_Linear, x_ND, weight_OD, bias_O)
        return out
    return calls.linear(x_ND, weight_OD, bias_O)


def rotary(q_NHd: Tensor, k_NKd: Tensor, cos_Nr: Tensor, sin_Nr: Tensor) -> tuple[Tensor, Tensor]:
    if _trains(q_NHd, k_NKd):
        turned: tuple[Tensor, Tensor] = _applied(_Rotary, q_NHd, k_NKd, cos_Nr, sin_Nr)
        return turned
    return calls.rotary(q_NHd, k_NKd, cos_Nr, sin_Nr)


def packed_attention(q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, sequence_starts: Tensor, scale: float) -> Tensor:
    if _trains(q_NHd, k_NKd, v_NKd):
        out: Tensor = _applied(_PackedAttention, q_NHd, k_NKd, v_NKd, sequence_starts, scale)
        return out
    return calls.packed_attention(q_NHd, k_NKd, v_NKd, sequence_starts, scale)


def paged_attention(
    q_NHd: Tensor,
    key_cache_XbKd: Tensor,
    value_cache_XbKd: Tensor,
    block_tables_Sm: Tensor,
    query_starts: Tensor,
    context_lengths_S: Tensor,
    scale: float,
) -> Tensor:
    return calls.paged_attention(
        q_NHd, key_cache_XbKd, value_cache_XbKd, block_tables_Sm, query_starts, context_lengths_S, scale
    )


def write_cache(
    k_NKd: Tensor, v_NKd: Tensor, key_cache_XbKd: Tensor, value_cache_XbKd: Tensor, slots_N: Tensor
) -> None:
    calls.write_cache(k_NKd, v_NKd, key_cache_XbKd, value_cache_XbKd, slots_N)


def route(
    logits_NE: Tensor,
    correction_bias_E: Tensor | None,
    num_chosen: int,
    *,
    score: Score,
    num_groups: int = 1,
    groups_per_token: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Ids and weights of the chosen experts, best first: chosen by score plus correction within the best groups
    (those with the best two experts), weighed by the scores alone."""
    scoring = calls.Scoring(score == "sigmoid", normalise, scale)
    if _trains(logits_NE):
        chosen: tuple[Tensor, Tensor] = _applied(
            _Route, logits_NE, correction_bias_E, num_chosen, num_groups, groups_per_token, scoring
        )
        return chosen
    return calls.route(logits_NE, correction_bias_E, num_chosen, num_groups, groups_per_token, scoring)[:2]


def experts(
    x_ND: Tensor, expert_ids_Nk: Tensor, expert_weights_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    if _trains(x_ND, expert_weights_Nk, gate_up_E2FD, down_EDF):
        out: Tensor = _applied(_Experts, x_ND, expert_ids_Nk, expert_weights_Nk, gate_up_E2FD, down_EDF)
        return out
    return calls.experts(x_ND, expert_ids_Nk, expert_weights_Nk, gate_up_E2FD, down_EDF)


def mlp(x_ND: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    """swiglu(x @ gate_up.T) @ down.T: in one call unless it trains, with the same bits."""
    if _trains(x_ND, gate_up_2FD, down_DF):
        return linear(swiglu(linear(x_ND, gate_up_2FD)), down_DF)
    return calls.mlp(x_ND, gate_up_2FD, down_DF)


def mixture(
    x_ND: Tensor,
    router_ED: Tensor,
    correction_bias_E: Tensor | None,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    num_chosen: int,
    *,
    score: Score,
    num_groups: int = 1,
    groups_per_token: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """`experts` on what `route` chooses by the router's logits, plus the `mlp` of the shared (gate_up, down).

    Not differentiable: one call for decoding, with the bits of its parts.
    """
    scoring = calls.Scoring(score == "sigmoid", normalise, scale)
    return calls.mixture(
        x_ND, router_ED, correction_bias_E, gate_up_E2FD, down_EDF, shared,
        num_chosen, num_groups, groups_per_token, scoring,
    )  # fmt: skip


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    if _trains(gate_up_N2F):
        out: Tensor = _applied(_Swiglu, gate_up_N2F)
        return out
    return calls.swiglu(gate_up_N2F)


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor | float = 1.0) -> Tensor:
    temperatures = temperature_N if isinstance(temperature_N, Tensor) else calls.constant(temperature_N)
    if _trains(logits_NV):
        out: Tensor = _applied(_TokenLogprobs, logits_NV, targets_N, temperatures)
        return out
    return calls.token_logprobs(logits_NV, targets_N, temperatures)


def draw(logits_SV: Tensor, temperatures_S: Tensor, uniforms_S: Tensor) -> Tensor:
    return calls.draw(logits_SV, temperatures_S, uniforms_S)


def _trains(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _applied(function: type[Function], *inputs: Any) -> Any:
    return function.apply(*inputs)  # type: ignore[no-untyped-call]


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OD)
        return calls.linear(x, weight_OD, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OD = ctx.saved_tensors
        d_rows = d_out.reshape(-1, weight_OD.shape[0])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            calls.product(d_rows, weight_OD).view(x.shape) if wants_x else None,
            calls.product_transposed(d_rows, x.reshape(-1, weight_OD.shape[1])) if wants_weight else None,
            d_rows.sum(0) if wants_bias else None,
        )


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_xD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse = torch.empty(x_xD.shape[:-1])
        ctx.save_for_backward(x_xD, weight_D, inverse)
        return calls.rms_norm(x_xD, weight_D, eps, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        return *calls.rms_norm_backward(d_out, *ctx.saved_tensors), None


class _Rotary(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos_Nr: Tensor, sin_Nr: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_Nr, sin_Nr)
        return calls.rotary(q, k, cos_Nr, sin_Nr)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
        cos_Nr, sin_Nr = ctx.saved_tensors
        return *calls.rotary(d_q, d_k, cos_Nr, sin_Nr, back=True), None, None


class _PackedAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequence_starts: Tensor, scale: float) -> Tensor:
        normalizers = torch.empty(q.shape[:2])
        out = calls.packed_attention(q, k, v, sequence_starts, scale, normalizers)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, sequence_starts, out, normalizers)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, out, normalizers = ctx.saved_tensors
        return *calls.packed_attention_backward(d_out, q, k, v, starts, ctx.scale, out, normalizers), None, None


class _Route(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NE: Tensor,
        correction_bias_E: Tensor | None,
        num_chosen: int,
        num_groups: int,
        groups_per_token: int,
        scoring: calls.Scoring,
    ) -> tuple[Tensor, Tensor]:
        ids, weights, scores = calls.route(
            logits_NE, correction_bias_E, num_chosen, num_groups, groups_per_token, scoring
        )
        ctx.scoring = scoring
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(ids, scores)
        return ids, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, d_weights: Tensor) -> tuple[Tensor | None, ...]:
        ids, scores = ctx.saved_tensors
        return calls.route_backward(d_weights, ids, scores, ctx.scoring), None, None, None, None, None


class _Experts(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routing = calls.empty_routing(ids, down)
        ctx.save_for_backward(x, weights, gate_up, down, routing.order, routing.first, routing.hidden)
        return calls.experts(x, ids, weights, gate_up, down, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, *routing = ctx.saved_tensors
        wants_x, _, _, wants_gate_up, wants_down = ctx.needs_input_grad
        d_x, d_weights, d_gate_up, d_down = calls.experts_backward(
            d_out, x, weights, gate_up, down, calls.Routing(*routing), (wants_x, wants_gate_up, wants_down)
        )
        return d_x, None, d_weights, d_gate_up, d_down


class _Swiglu(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return calls.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        return calls.swiglu_backward(d_out, *ctx.saved_tensors)


class _TokenLogprobs(Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, temperatures: Tensor) -> Tensor:
        normalizers = torch.empty(len(logits_NV))
        ctx.save_for_backward(logits_NV, targets_N, temperatures, normalizers)
        return calls.token_logprobs(logits_NV, targets_N, temperatures, normalizers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        return calls.token_logprobs_backward(d_out, *ctx.saved_tensors), None, None
