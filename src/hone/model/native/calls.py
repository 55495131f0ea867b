"""The C functions on tensors, forward and backward, without autograd.

Tensor letters as in `hone.model.ops`. `d_x` is the gradient of the loss by x.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hone.model.native.library import functions
from hone.model.native.packs import pack_pointer

# Work under this many multiply-adds is done before a second thread has woken up.
THREAD_WORK = 500_000


class Scoring(NamedTuple):
    """How the weights of the chosen experts come from the router's logits."""

    sigmoids: bool
    normalise: bool
    scale: float


@dataclass(frozen=True, slots=True)
class Routing:
    """What the forward pass of the experts leaves for the backward pass."""

    order: Tensor
    first: Tensor
    hidden: Tensor


def linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    columns, depth = weight_OD.shape
    x, weight_OD = _last_contiguous(x), _contiguous(weight_OD)
    *outer, width = x.shape
    if width != depth:
        raise _mismatch("x", x, f"end in {depth} columns like the weight")
    out = x.new_empty(*outer, columns)
    rows, stride = (outer[0], x.stride()[0]) if len(outer) == 1 else (math.prod(outer), depth)
    bias = 0 if bias_O is None else _contiguous(bias_O).data_ptr()
    functions().hone_linear(
        x.data_ptr(), stride, weight_OD.data_ptr(), pack_pointer(weight_OD), bias, out.data_ptr(),
        rows, columns, depth, _threads(rows * columns * depth),
    )  # fmt: skip
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right."""
    left, right = _contiguous(left), _contiguous(right)
    (rows, depth), columns = left.shape, right.shape[1]
    out = left.new_empty(rows, columns)
    functions().hone_product(
        left.data_ptr(), right.data_ptr(), out.data_ptr(), rows, columns, depth, _threads(rows * columns * depth)
    )
    return out


def product_transposed(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right."""
    left, right = _contiguous(left), _contiguous(right)
    (depth, rows), columns = left.shape, right.shape[1]
    out = left.new_empty(rows, columns)
    functions().hone_product_transposed(
        left.data_ptr(), right.data_ptr(), out.data_ptr(), rows, columns, depth, _threads(rows * columns * depth)
    )
    return out


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, inverse: Tensor | None = None) -> Tensor:
    x, (*outer, width) = _rows(x), x.shape
    if weight_D.shape != (width,):
        raise _mismatch("weight", weight_D, f"be [{width}]")
    out = x.new_empty(*outer, width)
    functions().hone_rms_norm(
        x.data_ptr(), *_grouped(x), _contiguous(weight_D).data_ptr(), eps, out.data_ptr(), _pointer(inverse),
        math.prod(outer), width,
    )  # fmt: skip
    return out


def rms_norm_backward(d_out: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    x, d_out, (*outer, width) = _rows(x), _contiguous(d_out), x.shape
    d_x, d_weight = x.new_empty(*outer, width), torch.zeros_like(weight_D)
    functions().hone_rms_norm_backward(
        d_out.data_ptr(), x.data_ptr(), *_grouped(x), _contiguous(weight_D).data_ptr(), inverse.data_ptr(),
        d_x.data_ptr(), d_weight.data_ptr(), math.prod(outer), width,
    )  # fmt: skip
    return d_x, d_weight


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual, width = _contiguous(x), _contiguous(residual), x.shape[-1]
    if residual.shape != x.shape or weight_D.shape != (width,):
        raise _mismatch("residual", residual, f"be {list(x.shape)} like x, and the weight [{width}]")
    total, out = torch.empty_like(x), torch.empty_like(x)
    functions().hone_add_rms_norm(
        x.data_ptr(), residual.data_ptr(), _contiguous(weight_D).data_ptr(), eps,
        total.data_ptr(), out.data_ptr(), x.numel() // width, width,
    )  # fmt: skip
    return total, out


def rotary(q_NHd: Tensor, k_NKd: Tensor, cos_Nr: Tensor, sin_Nr: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    q_NHd, k_NKd, cos_Nr, sin_Nr = _rows(q_NHd), _rows(k_NKd), _contiguous(cos_Nr), _contiguous(sin_Nr)
    (rows, heads, size), (_, kv_heads, _), rotated = q_NHd.shape, k_NKd.shape, cos_Nr.shape[1]
    if cos_Nr.shape != sin_Nr.shape or cos_Nr.shape[0] != rows or rotated > size or rotated % 2:
        raise _mismatch("cos", cos_Nr, f"be [{rows}, an even number up to {size}] like sin")
    if k_NKd.shape != (rows, kv_heads, size):
        raise _mismatch("k", k_NKd, f"match q {list(q_NHd.shape)}")
    turned_q, turned_k = q_NHd.new_empty(rows, heads, size), q_NHd.new_empty(rows, kv_heads, size)
    functions().hone_rotary(
        q_NHd.data_ptr(), q_NHd.stride()[0], heads, k_NKd.data_ptr(), k_NKd.stride()[0], kv_heads,
        cos_Nr.data_ptr(), sin_Nr.data_ptr(), turned_q.data_ptr(), turned_k.data_ptr(), rows, size, rotated, back,
    )  # fmt: skip
    return turned_q, turned_k


def swiglu(gate_up: Tensor) -> Tensor:
    gate_up, (*outer, both) = _contiguous(gate_up), gate_up.shape
    out = gate_up.new_empty(*outer, both // 2)
    functions().hone_swiglu(gate_up.data_ptr(), out.data_ptr(), math.prod(outer), both // 2)
    return out


def swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    d_out, gate_up, width = _contiguous(d_out), _contiguous(gate_up), gate_up.shape[-1] // 2
    d_gate_up = torch.empty_like(gate_up)
    functions().hone_swiglu_backward(
        d_out.data_ptr(), gate_up.data_ptr(), d_gate_up.data_ptr(), d_out.numel() // max(width, 1), width
    )
    return d_gate_up


def token_logprobs(
    logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor, normalizers: Tensor | None = None
) -> Tensor:
    logits_NV, targets_N, temperature_N = map(_contiguous, (logits_NV, targets_N, temperature_N))
    rows, vocabulary = logits_NV.shape
    if targets_N.shape != (rows,) or targets_N.dtype is not torch.int64:
        raise _mismatch("targets", targets_N, f"be int64 [{rows}]")
    if temperature_N.numel() not in (1, rows) or temperature_N.dtype is not torch.float32:
        raise _mismatch("temperature", temperature_N, f"be one number or float32 [{rows}]")
    out = logits_NV.new_empty(rows)
    functions().hone_token_logprobs(
        logits_NV.data_ptr(), targets_N.data_ptr(), temperature_N.data_ptr(), int(temperature_N.numel() > 1),
        out.data_ptr(), 0 if normalizers is None else normalizers.data_ptr(), rows, vocabulary,
    )  # fmt: skip
    return out


def draw(logits_SV: Tensor, temperatures_S: Tensor, uniforms_S: Tensor) -> Tensor:
    logits_SV, temperatures_S, uniforms_S = map(_contiguous, (logits_SV, temperatures_S, uniforms_S))
    rows, vocabulary = logits_SV.shape
    for name, numbers_S in (("temperatures", temperatures_S), ("uniforms", uniforms_S)):
        if numbers_S.shape != (rows,) or numbers_S.dtype is not torch.float32:
            raise _mismatch(name, numbers_S, f"be float32 [{rows}]")
    tokens_S = torch.empty(rows, dtype=torch.int64)
    functions().hone_draw(
        logits_SV.data_ptr(), temperatures_S.data_ptr(), uniforms_S.data_ptr(), tokens_S.data_ptr(), rows, vocabulary
    )  # fmt: skip
    return tokens_S


def token_logprobs_backward(
    d_out: Tensor, logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor, normalizers: Tensor
) -> Tensor:
    d_out, logits_NV, targets_N, temperature_N = map(_contiguous, (d_out, logits_NV, targets_N, temperature_N))
    d_logits = torch.empty_like(logits_NV)
    functions().hone_token_logprobs_backward(
        d_out.data_ptr(), logits_NV.data_ptr(), targets_N.data_ptr(), temperature_N.data_ptr(),
        int(temperature_N.numel() > 1), normalizers.data_ptr(), d_logits.data_ptr(), *logits_NV.shape,
    )  # fmt: skip
    return d_logits


@functools.lru_cache(maxsize=64)
def constant(number: float) -> Tensor:
    """A tensor of one number, made once."""
    with torch.inference_mode(False):
        return torch.tensor([number], dtype=torch.float32)


def write_cache(k_NKd: Tensor, v_NKd: Tensor, key_cache: Tensor, value_cache: Tensor, slots_N: Tensor) -> None:
    k_NKd, v_NKd, slots_N = _rows(k_NKd), _rows(v_NKd), _contiguous(slots_N)
    rows, width = k_NKd.shape[0], k_NKd.shape[1] * k_NKd.shape[2]
    if slots_N.shape != (rows,) or slots_N.dtype is not torch.int64:
        raise _mismatch("slots", slots_N, f"be int64 [{rows}]")
    if k_NKd.shape != v_NKd.shape or k_NKd.shape[1:] != key_cache.shape[2:]:
        raise _mismatch("k", k_NKd, f"be like v {list(v_NKd.shape)} and match the cache {list(key_cache.shape)}")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise _mismatch("the cache", key_cache, "be contiguous")
    functions().hone_write_cache(
        k_NKd.data_ptr(), k_NKd.stride()[0], v_NKd.data_ptr(), v_NKd.stride()[0],
        key_cache.data_ptr(), value_cache.data_ptr(), slots_N.data_ptr(), rows, width,
    )  # fmt: skip


def route(
    logits_NE: Tensor,
    correction_bias_E: Tensor | None,
    num_chosen: int,
    num_groups: int,
    groups_per_token: int,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Expert ids and weights of each row, and the scores for the backward pass."""
    logits_NE = _contiguous(logits_NE)
    rows, num_experts = logits_NE.shape
    _check_choices(logits_NE, correction_bias_E, num_experts, num_chosen, num_groups, groups_per_token)
    ids = torch.empty(rows, num_chosen, dtype=torch.int64)
    weights, scores = logits_NE.new_empty(rows, num_chosen), torch.empty_like(logits_NE)
    functions().hone_route(
        logits_NE.data_ptr(), 0 if correction_bias_E is None else _contiguous(correction_bias_E).data_ptr(),
        ids.data_ptr(), weights.data_ptr(), scores.data_ptr(), rows, num_experts, num_chosen, num_groups,
        groups_per_token, *scoring,
    )  # fmt: skip
    return ids, weights, scores


def route_backward(d_weights: Tensor, ids: Tensor, scores: Tensor, scoring: Scoring) -> Tensor:
    d_weights, d_logits = _contiguous(d_weights), torch.empty_like(scores)
    functions().hone_route_backward(
        d_weights.data_ptr(), ids.data_ptr(), scores.data_ptr(), d_logits.data_ptr(),
        *scores.shape, ids.shape[1], *scoring,
    )  # fmt: skip
    return d_logits


def experts(
    x_ND: Tensor,
    expert_ids_Nk: Tensor,
    expert_weights_Nk: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    routing: Routing | None = None,
) -> Tensor:
    ids = expert_ids_Nk if expert_ids_Nk.dtype is torch.int64 else expert_ids_Nk.to(torch.int64)
    x_ND, ids, weights = _contiguous(x_ND), _contiguous(ids), _contiguous(expert_weights_Nk)
    gate_up_E2FD, down_EDF = _contiguous(gate_up_E2FD), _contiguous(down_EDF)
    (tokens, chosen), (num_experts, width, inner) = ids.shape, down_EDF.shape
    if gate_up_E2FD.shape != (num_experts, 2 * inner, width):
        raise _mismatch("gate_up", gate_up_E2FD, f"match down {list(down_EDF.shape)}")
    if x_ND.shape != (tokens, width) or weights.shape != (tokens, chosen):
        raise _mismatch("x", x_ND, f"be [{tokens}, {width}], and the weights [{tokens}, {chosen}] like the ids")
    gate_up_packed, down_packed = _both_packed(gate_up_E2FD, down_EDF)
    order, first, hidden = (
        (routing.order.data_ptr(), routing.first.data_ptr(), routing.hidden.data_ptr()) if routing else (0, 0, 0)
    )
    out = x_ND.new_empty(tokens, width)
    failed = functions().hone_experts(
        x_ND.data_ptr(), ids.data_ptr(), weights.data_ptr(), gate_up_E2FD.data_ptr(), down_EDF.data_ptr(),
        gate_up_packed, down_packed, out.data_ptr(), order, first, hidden,
        tokens, chosen, num_experts, width, inner, _threads(3 * tokens * chosen * width * inner),
    )  # fmt: skip
    if failed:
        raise ValueError(f"expert_ids lie in {int(ids.min())} to {int(ids.max())}; there are {num_experts} experts")
    return out


def mlp(x: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    x, gate_up_2FD, down_DF = _contiguous(x), _contiguous(gate_up_2FD), _contiguous(down_DF)
    width, inner = down_DF.shape
    if gate_up_2FD.shape != (2 * inner, width) or x.shape[-1] != width:
        raise _mismatch("x", x, f"match gate_up {list(gate_up_2FD.shape)} and down {list(down_DF.shape)}")
    out = torch.empty_like(x)
    rows = out.numel() // width
    functions().hone_mlp(
        x.data_ptr(), gate_up_2FD.data_ptr(), down_DF.data_ptr(), pack_pointer(gate_up_2FD), pack_pointer(down_DF),
        out.data_ptr(), rows, width, inner, _threads(3 * rows * width * inner),
    )  # fmt: skip
    return out


def mixture(
    x_ND: Tensor,
    router_ED: Tensor,
    correction_bias_E: Tensor | None,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    num_chosen: int,
    num_groups: int,
    groups_per_token: int,
    scoring: Scoring,
) -> Tensor:
    x_ND, router_ED = _contiguous(x_ND), _contiguous(router_ED)
    gate_up_E2FD, down_EDF = _contiguous(gate_up_E2FD), _contiguous(down_EDF)
    rows, (num_experts, width, inner) = x_ND.shape[0], down_EDF.shape
    if gate_up_E2FD.shape != (num_experts, 2 * inner, width) or router_ED.shape != (num_experts, width):
        raise _mismatch("gate_up", gate_up_E2FD, f"match down {list(down_EDF.shape)} and the router")
    if x_ND.shape != (rows, width):
        raise _mismatch("x", x_ND, f"be [{rows}, {width}]")
    _check_choices(router_ED, correction_bias_E, num_experts, num_chosen, num_groups, groups_per_token)
    gate_up_packed, down_packed = _both_packed(gate_up_E2FD, down_EDF)
    shared_pointers, shared_inner = (0, 0, 0, 0), 0
    if shared is not None:
        shared_gate_up, shared_down = _contiguous(shared[0]), _contiguous(shared[1])
        shared_inner = shared_down.shape[1]
        if shared_down.shape != (width, shared_inner) or shared_gate_up.shape != (2 * shared_inner, width):
            raise _mismatch("the shared gate_up", shared_gate_up, f"match its down {list(shared_down.shape)}")
        packed = pack_pointer(shared_gate_up), pack_pointer(shared_down)
        shared_pointers = (shared_gate_up.data_ptr(), shared_down.data_ptr(), *packed)
    out = torch.empty_like(x_ND)
    functions().hone_mixture(
        x_ND.data_ptr(), router_ED.data_ptr(), pack_pointer(router_ED),
        0 if correction_bias_E is None else _contiguous(correction_bias_E).data_ptr(),
        gate_up_E2FD.data_ptr(), down_EDF.data_ptr(), gate_up_packed, down_packed, *shared_pointers, out.data_ptr(),
        rows, width, num_experts, inner, shared_inner, num_chosen, num_groups, groups_per_token, *scoring,
        _threads(3 * rows * num_chosen * width * inner),
    )  # fmt: skip
    return out


def empty_routing(expert_ids_Nk: Tensor, down_EDF: Tensor) -> Routing:
    choices, (num_experts, _, inner) = expert_ids_Nk.numel(), down_EDF.shape
    return Routing(
        torch.empty(choices, dtype=torch.int64),
        torch.empty(num_experts + 1, dtype=torch.int64),
        torch.empty(choices, 2 * inner),
    )


def experts_backward(
    d_out: Tensor,
    x_ND: Tensor,
    expert_weights_Nk: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    routing: Routing,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, expert_weights, gate_up and down; `wanted` says which of x, gate_up, down are needed."""
    d_out, x_ND, expert_weights_Nk = map(_contiguous, (d_out, x_ND, expert_weights_Nk))
    gate_up_E2FD, down_EDF = _contiguous(gate_up_E2FD), _contiguous(down_EDF)
    (tokens, chosen), (num_experts, width, inner) = expert_weights_Nk.shape, down_EDF.shape
    d_x = torch.empty_like(x_ND) if wanted[0] else None
    d_weights = torch.empty_like(expert_weights_Nk)
    d_gate_up = torch.zeros_like(gate_up_E2FD) if wanted[1] else None
    d_down = torch.zeros_like(down_EDF) if wanted[2] else None
    functions().hone_experts_backward(
        d_out.data_ptr(), x_ND.data_ptr(), expert_weights_Nk.data_ptr(), gate_up_E2FD.data_ptr(), down_EDF.data_ptr(),
        routing.order.data_ptr(), routing.first.data_ptr(), routing.hidden.data_ptr(),
        _pointer(d_x), d_weights.data_ptr(), _pointer(d_gate_up), _pointer(d_down),
        tokens, chosen, num_experts, width, inner, _threads(6 * tokens * chosen * width * inner),
    )  # fmt: skip
    return d_x, d_weights, d_gate_up, d_down


def packed_attention(
    q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, starts: Tensor, scale: float, normalizers: Tensor | None = None
) -> Tensor:
    q_NHd, k_NKd, v_NKd = _rows(q_NHd), _rows(k_NKd), _rows(v_NKd)
    (tokens, heads, size), kv_heads = q_NHd.shape, k_NKd.shape[1]
    if k_NKd.shape != (tokens, kv_heads, size) or v_NKd.shape != k_NKd.shape or heads % kv_heads:
        raise _mismatch("k", k_NKd, f"be like v {list(v_NKd.shape)} and match q {list(q_NHd.shape)}")
    starts = _int32(starts)
    out = q_NHd.new_empty(tokens, heads, size)
    functions().hone_packed_attention(
        q_NHd.data_ptr(), q_NHd.stride()[0], k_NKd.data_ptr(), k_NKd.stride()[0], v_NKd.data_ptr(), v_NKd.stride()[0],
        starts.data_ptr(), scale, out.data_ptr(), _pointer(normalizers),
        starts.shape[0] - 1, heads, kv_heads, size, _threads(64 * tokens * heads * size),
    )  # fmt: skip
    return out


def packed_attention_backward(
    d_out: Tensor,
    q_NHd: Tensor,
    k_NKd: Tensor,
    v_NKd: Tensor,
    starts: Tensor,
    scale: float,
    out: Tensor,
    normalizers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q_NHd, k_NKd, v_NKd, d_out = _rows(q_NHd), _rows(k_NKd), _rows(v_NKd), _contiguous(d_out)
    (tokens, heads, size), kv_heads = q_NHd.shape, k_NKd.shape[1]
    starts = _int32(starts)
    d_q, d_k, d_v = q_NHd.new_empty(q_NHd.shape), q_NHd.new_empty(k_NKd.shape), q_NHd.new_empty(v_NKd.shape)
    functions().hone_packed_attention_backward(
        d_out.data_ptr(),
        q_NHd.data_ptr(), q_NHd.stride()[0], k_NKd.data_ptr(), k_NKd.stride()[0], v_NKd.data_ptr(), v_NKd.stride()[0],
        starts.data_ptr(), scale, out.data_ptr(), normalizers.data_ptr(),
        d_q.data_ptr(), d_k.data_ptr(), d_v.data_ptr(),
        starts.shape[0] - 1, heads, kv_heads, size, _threads(160 * tokens * heads * size),
    )  # fmt: skip
    return d_q, d_k, d_v


def paged_attention(
    q_NHd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables_Sm: Tensor,
    query_starts: Tensor,
    context_lengths_S: Tensor,
    scale: float,
) -> Tensor:
    q_NHd, (_, block_size, kv_heads, size) = _rows(q_NHd), key_cache.shape
    tokens, heads, _ = q_NHd.shape
    if q_NHd.shape[2] != size or heads % kv_heads or value_cache.shape != key_cache.shape:
        raise _mismatch("q", q_NHd, f"match the cache {list(key_cache.shape)}")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise _mismatch("the cache", key_cache, "be contiguous")
    tables, query_starts, contexts = _int32(block_tables_Sm), _int32(query_starts), _int32(context_lengths_S)
    sequences = contexts.shape[0]
    if tables.shape[0] != sequences or query_starts.shape[0] != sequences + 1:
        raise _mismatch("block_tables", tables, f"have {sequences} rows, and query_starts one more number")
    out = q_NHd.new_empty(tokens, heads, size)
    functions().hone_paged_attention(
        q_NHd.data_ptr(), q_NHd.stride()[0], key_cache.data_ptr(), value_cache.data_ptr(),
        tables.data_ptr(), tables.shape[1], query_starts.data_ptr(), contexts.data_ptr(), scale, out.data_ptr(),
        block_size, sequences, heads, kv_heads, size, _threads(64 * tokens * heads * size),
    )  # fmt: skip
    return out


def _both_packed(gate_up_E2FD: Tensor, down_EDF: Tensor) -> tuple[int, int]:
    """The packed copies of both, or of neither."""
    packed = pack_pointer(gate_up_E2FD), pack_pointer(down_EDF)
    return packed if all(packed) else (0, 0)


def _check_choices(
    x: Tensor, correction_bias_E: Tensor | None, num_experts: int, num_chosen: int, num_groups: int, kept_groups: int
) -> None:
    if num_experts % num_groups or num_chosen > num_experts // num_groups * kept_groups:
        raise _mismatch("the router", x, f"have {num_groups} equal groups, with {num_chosen} experts in {kept_groups}")
    if correction_bias_E is not None and correction_bias_E.shape != (num_experts,):
        raise _mismatch("correction_bias", correction_bias_E, f"be [{num_experts}]")


def _threads(work: int) -> int:
    return torch.get_num_threads() if work > THREAD_WORK else 1


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _int32(x: Tensor) -> Tensor:
    return _contiguous(x if x.dtype is torch.int32 else x.to(torch.int32))


def _last_contiguous(x: Tensor) -> Tensor:
    """A matrix may have its rows apart; anything else is made contiguous."""
    if x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]):
        return x
    return x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """Tokens may lie apart, the heads of one may not: so the parts of a joint projection need no copy."""
    if x.is_contiguous() or (x.dim() == 3 and x.stride()[1:] == (x.shape[2], 1)):
        return x
    return _last_contiguous(x)


def _grouped(x: Tensor) -> tuple[int, int]:
    """How far apart groups of rows lie, and how many rows lie together."""
    if x.dim() == 3:
        return x.stride()[0], x.shape[1]
    return (x.stride()[0] if x.dim() == 2 else x.shape[-1]), 1


def _mismatch(name: str, x: Tensor, demand: str) -> ValueError:
    return ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must {demand}")
