"""The model's operations in plain torch: the reference for the native kernels and the path of other devices.

Tensor letters as in `hone.model.ops`; G groups of sequences, L positions of a padded sequence, C context positions.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

# Sequences whose lengths round up to the same multiple are attended in one padded batch.
LENGTH_BUCKET = 32
# On a CPU `grouped_mm` wins up to about 1,000 rows (1.1 to 1.6 times) and loses at 4,000 (0.6 times).
MAX_GROUPED_ROWS = 1024


def rms_norm(x_xD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x_xD, weight_D.shape, weight_D, eps)


def add_rms_norm(x_xD: Tensor, residual_xD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total_xD = x_xD + residual_xD
    return total_xD, rms_norm(total_xD, weight_D, eps)


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return functional.linear(x_ND, weight_OD, bias_O)


def rotary(q_NHd: Tensor, k_NKd: Tensor, cos_Nr: Tensor, sin_Nr: Tensor) -> tuple[Tensor, Tensor]:
    half = cos_Nr.shape[-1] // 2
    cos_N1r, sin_N1r = cos_Nr[:, None, :half], sin_Nr[:, None, :half]
    return _turn(q_NHd, cos_N1r, sin_N1r), _turn(k_NKd, cos_N1r, sin_N1r)


def write_cache(
    k_NKd: Tensor, v_NKd: Tensor, key_cache_XbKd: Tensor, value_cache_XbKd: Tensor, slots_N: Tensor
) -> None:
    key_cache_XbKd.flatten(0, 1).index_copy_(0, slots_N, k_NKd)
    value_cache_XbKd.flatten(0, 1).index_copy_(0, slots_N, v_NKd)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return functional.silu(gate_NF) * up_NF


def draw(logits_SV: Tensor, temperatures_S: Tensor, uniforms_S: Tensor) -> Tensor:
    return invert(torch.softmax(logits_SV / temperatures_S[:, None], -1), uniforms_S)


def invert(probs_SV: Tensor, uniforms_S: Tensor) -> Tensor:
    """The first token at which the probabilities, summed in the order of the vocabulary, exceed uniform * their sum."""
    cumulative_SV = probs_SV.cumsum(-1)
    total_S1 = cumulative_SV[:, -1:]
    # Strictly below the total, so that a token of probability 0 at the end is never reached by rounding.
    wanted_S1 = torch.minimum(uniforms_S[:, None] * total_S1, total_S1.nextafter(torch.zeros_like(total_S1)))
    tokens_S: Tensor = torch.searchsorted(cumulative_SV, wanted_S1, right=True)[:, 0]
    return tokens_S.clamp(max=probs_SV.shape[-1] - 1)


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor | float = 1.0) -> Tensor:
    scaled_NV = logits_NV.float()
    if isinstance(temperature_N, Tensor):
        scaled_NV = scaled_NV / temperature_N[:, None]
    elif temperature_N != 1.0:
        scaled_NV = scaled_NV / temperature_N
    return scaled_NV.gather(-1, targets_N[:, None])[:, 0] - scaled_NV.logsumexp(-1)


def packed_attention(
    q_NHd: Tensor,
    k_NKd: Tensor,
    v_NKd: Tensor,
    sequence_starts: Tensor,
    scale: float,
    max_length: int | None = None,
) -> Tensor:
    if q_NHd.is_cuda and q_NHd.dtype in (torch.bfloat16, torch.float16):
        return _variable_length_attention(q_NHd, k_NKd, v_NKd, sequence_starts, scale, max_length)
    starts = sequence_starts.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if len(set(lengths)) == 1:
        return _equal_lengths_attention(q_NHd, k_NKd, v_NKd, len(lengths), scale)
    return _bucketed_attention(q_NHd, k_NKd, v_NKd, starts, lengths, scale)


def paged_attention(
    q_NHd: Tensor,
    key_cache_XbKd: Tensor,
    value_cache_XbKd: Tensor,
    block_tables_Sm: Tensor,
    query_starts: Tensor,
    context_lengths_S: Tensor,
    scale: float,
) -> Tensor:
    keys_SCKd = _context(key_cache_XbKd, block_tables_Sm)
    values_SCKd = _context(value_cache_XbKd, block_tables_Sm)
    if len(q_NHd) == len(context_lengths_S):  # the shapes alone tell that every sequence has one query
        return _last_attention(q_NHd, keys_SCKd, values_SCKd, context_lengths_S, scale)
    query_lengths_S = query_starts.diff()
    offsets_L = torch.arange(int(query_lengths_S.max()), device=q_NHd.device)
    rows_SL = (query_starts[:-1, None] + offsets_L).clamp(max=len(q_NHd) - 1)
    positions_SL = (context_lengths_S - query_lengths_S)[:, None] + offsets_L
    visible_SLC = torch.arange(keys_SCKd.shape[1], device=q_NHd.device) <= positions_SL[..., None]
    out_SHLd = functional.scaled_dot_product_attention(
        q_NHd[rows_SL].transpose(1, 2),
        keys_SCKd.transpose(1, 2),
        values_SCKd.transpose(1, 2),
        attn_mask=visible_SLC[:, None],
        scale=scale,
        enable_gqa=True,
    )
    return out_SHLd.transpose(1, 2)[offsets_L < query_lengths_S[:, None]]


def route(
    logits_NE: Tensor,
    correction_bias_E: Tensor | None,
    num_chosen: int,
    *,
    score: Literal["sigmoid", "softmax"],
    num_groups: int = 1,
    groups_per_token: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    scores_NE = _sigmoid(logits_NE) if score == "sigmoid" else logits_NE.softmax(-1)
    merits_NE = scores_NE.detach() if correction_bias_E is None else scores_NE.detach() + correction_bias_E
    if groups_per_token < num_groups:
        merits_NE = _within_best_groups(merits_NE, num_groups, groups_per_token)
    expert_ids_Nk = merits_NE.topk(num_chosen, dim=-1).indices
    weights_Nk = scores_NE.gather(1, expert_ids_Nk)
    if normalise:
        # A running sum adds in the same order whatever the number of rows; `sum` does not.
        weights_Nk = weights_Nk / (weights_Nk.cumsum(-1)[:, -1:] + 1e-20)
    return expert_ids_Nk, weights_Nk if scale == 1.0 else weights_Nk * scale


def experts(
    x_ND: Tensor, expert_ids_Nk: Tensor, expert_weights_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    num_tokens, choices = expert_ids_Nk.shape
    sorted_ids, order = expert_ids_Nk.flatten().sort(stable=True)
    all_experts = torch.arange(len(gate_up_E2FD), device=x_ND.device)
    ends_E = torch.searchsorted(sorted_ids, all_experts, right=True, out_int32=True)
    chosen_ND = x_ND.index_select(0, order // choices)
    products = grouped_products if _grouping_pays(chosen_ND, down_EDF) else sliced_products
    out_ND = products(chosen_ND, ends_E, gate_up_E2FD, down_EDF)
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    out_NkD = out_ND.index_select(0, places).view(num_tokens, choices, x_ND.shape[-1])
    return (out_NkD * expert_weights_Nk[..., None]).sum(1).to(x_ND.dtype)


def mixture(
    x_ND: Tensor,
    router_ED: Tensor,
    correction_bias_E: Tensor | None,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    num_chosen: int,
    *,
    score: Literal["sigmoid", "softmax"],
    num_groups: int = 1,
    groups_per_token: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> Tensor:
    expert_ids_Nk, expert_weights_Nk = route(
        linear(x_ND.float(), router_ED.float()),
        correction_bias_E,
        num_chosen,
        score=score,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        normalise=normalise,
        scale=scale,
    )
    out_ND = experts(x_ND, expert_ids_Nk, expert_weights_Nk, gate_up_E2FD, down_EDF)
    return out_ND if shared is None else out_ND + mlp(x_ND, *shared)


def mlp(x_ND: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    return linear(swiglu(linear(x_ND, gate_up_2FD)), down_DF)


def grouped_products(x_ND: Tensor, ends_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """The experts' MLPs of rows sorted by expert, those of expert e ending before ends[e]: one call per product."""
    gate_up_N2F = functional.grouped_mm(x_ND, gate_up_E2FD.transpose(1, 2), offs=ends_E)
    return functional.grouped_mm(swiglu(gate_up_N2F), down_EDF.transpose(1, 2), offs=ends_E)


def sliced_products(x_ND: Tensor, ends_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """`grouped_products` as one product per expert that has rows."""
    sizes = [end - start for start, end in pairwise([0, *ends_E.tolist()])]
    slices = zip(torch.split_with_sizes(x_ND, sizes), gate_up_E2FD.unbind(), down_EDF.unbind(), strict=True)
    outputs = [
        functional.linear(swiglu(functional.linear(x_nD, gate_up_2FD)), down_DF)
        for x_nD, gate_up_2FD, down_DF in slices
        if len(x_nD)
    ]
    return torch.cat(outputs) if outputs else x_ND


def _turn(x_NHd: Tensor, cos_N1r: Tensor, sin_N1r: Tensor) -> Tensor:
    half = cos_N1r.shape[-1]
    first, second, rest = x_NHd[..., :half], x_NHd[..., half : 2 * half], x_NHd[..., 2 * half :]
    turned = (first * cos_N1r - second * sin_N1r, second * cos_N1r + first * sin_N1r)
    return torch.cat([part.to(x_NHd.dtype) for part in turned] + [rest], dim=-1)


def _sigmoid(logits_NE: Tensor) -> Tensor:
    # torch's own sigmoid rounds an element differently by its place in the tensor (vector lanes or the tail),
    # so a token's weights would depend on its neighbours; its softmax over the last dimension does not.
    return torch.stack((logits_NE, torch.zeros_like(logits_NE)), -1).softmax(-1)[..., 0]


def _within_best_groups(merits_NE: Tensor, num_groups: int, groups_per_token: int) -> Tensor:
    """Leaves out the experts of all but the best groups; a group is as good as its two best experts."""
    merits_Nge = merits_NE.view(len(merits_NE), num_groups, -1)
    group_merits_Ng = merits_Nge.topk(2, dim=-1).values.sum(-1)
    best = group_merits_Ng.topk(groups_per_token, dim=-1, sorted=False).indices
    closed_Ng = torch.ones_like(group_merits_Ng, dtype=torch.bool).scatter(1, best, False)
    return merits_Nge.masked_fill(closed_Ng[..., None], -torch.inf).flatten(1)


def _grouping_pays(x_ND: Tensor, down_EDF: Tensor) -> bool:
    """Whether `grouped_mm` is there for these tensors, and faster than a product per expert."""
    if any(size * x_ND.element_size() % 16 for size in down_EDF.shape[1:]):
        return False  # its rows must start at multiples of 16 bytes
    if x_ND.is_cuda:
        return x_ND.dtype is torch.bfloat16
    return 0 < len(x_ND) <= MAX_GROUPED_ROWS


def _variable_length_attention(
    q_NHd: Tensor,
    k_NKd: Tensor,
    v_NKd: Tensor,
    sequence_starts: Tensor,
    scale: float,
    max_length: int | None,
) -> Tensor:
    """Flash attention over packed sequences; it wants equal heads and even-sized half precision."""
    starts, longest = sequence_starts.to(torch.int32), max_length or int(sequence_starts.diff().max())
    repeats = q_NHd.shape[1] // k_NKd.shape[1]
    if repeats > 1:
        k_NKd, v_NKd = k_NKd.repeat_interleave(repeats, 1), v_NKd.repeat_interleave(repeats, 1)
    out_NHd = varlen_attn(q_NHd, k_NKd, v_NKd, starts, starts, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out_NHd, Tensor)
    return out_NHd


def _equal_lengths_attention(q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, num_sequences: int, scale: float) -> Tensor:
    q_SHLd, k_SKLd, v_SKLd = (x.view(num_sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q_NHd, k_NKd, v_NKd))
    return _causal(q_SHLd, k_SKLd, v_SKLd, scale).transpose(1, 2).reshape(q_NHd.shape)


def _bucketed_attention(
    q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, starts: list[int], lengths: list[int], scale: float
) -> Tensor:
    """Sequences of similar length share a batch padded on the right, where causality hides the padding."""
    rows, outputs = [], []
    buckets: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        buckets.setdefault(-(-length // LENGTH_BUCKET), []).append(sequence)
    for sequences in buckets.values():
        max_length = max(lengths[s] for s in sequences)
        starts_S = torch.tensor([starts[s] for s in sequences], device=q_NHd.device)
        lengths_S = torch.tensor([lengths[s] for s in sequences], device=q_NHd.device)
        offsets_L = torch.arange(max_length, device=q_NHd.device)
        rows_SL = (starts_S[:, None] + offsets_L).clamp(max=len(q_NHd) - 1)
        real_SL = offsets_L < lengths_S[:, None]
        q_SHLd, k_SKLd, v_SKLd = (_rows(x, rows_SL).transpose(1, 2) for x in (q_NHd, k_NKd, v_NKd))
        outputs.append(_causal(q_SHLd, k_SKLd, v_SKLd, scale).transpose(1, 2)[real_SL])
        rows.append(rows_SL[real_SL])
    places = torch.cat(rows).argsort()
    return torch.cat(outputs).index_select(0, places)


def _rows(x_NHd: Tensor, rows_SL: Tensor) -> Tensor:
    # The gradient of index_select adds rows up directly; that of x[rows] sorts them first.
    return x_NHd.index_select(0, rows_SL.flatten()).view(*rows_SL.shape, *x_NHd.shape[1:])


def _causal(q_SHLd: Tensor, k_SKLd: Tensor, v_SKLd: Tensor, scale: float) -> Tensor:
    return functional.scaled_dot_product_attention(q_SHLd, k_SKLd, v_SKLd, is_causal=True, scale=scale, enable_gqa=True)


def _last_attention(
    q_SHd: Tensor, keys_SCKd: Tensor, values_SCKd: Tensor, context_lengths_S: Tensor, scale: float
) -> Tensor:
    """One query per sequence: the heads that share keys take the place of positions, 3 times as fast in bfloat16."""
    visible_SC = torch.arange(keys_SCKd.shape[1], device=q_SHd.device) < context_lengths_S[:, None]
    out_SKgd = functional.scaled_dot_product_attention(
        q_SHd.reshape(len(q_SHd), keys_SCKd.shape[2], -1, q_SHd.shape[2]),
        keys_SCKd.transpose(1, 2),
        values_SCKd.transpose(1, 2),
        attn_mask=visible_SC[:, None, None],
        scale=scale,
    )
    return out_SKgd.reshape(q_SHd.shape)


def _context(cache_XbKd: Tensor, block_tables_Sm: Tensor) -> Tensor:
    # Tables are padded with any number for blocks beyond the context; those keys are masked.
    return cache_XbKd[block_tables_Sm.clamp(min=0)].flatten(1, 2)
