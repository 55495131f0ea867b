"""Grouped-query attention; what it attends to (packed training rows, paged KV blocks) is handed in.

N flat tokens, S sequences, D width, H query heads, K key/value heads, d head size, r rotary channels.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hone.model import ops
from hone.model.families import ModelConfig
from hone.model.layers.norm import RmsNorm


class Attend(Protocol):
    """Mixes the values of one layer; an engine's also stores the keys and values."""

    def __call__(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class SharedRows:
    """How sequences that share tokens (the prompt of a group) are made whole for attention.

    rows_M: for each token of the whole sequences, behind one another, its row among the N forwarded tokens.
    places_N: for each forwarded token, one place in M where it stands.
    """

    rows_M: Tensor
    places_N: Tensor


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """Attends within each of S sequences packed behind one another: sequence s is starts[s]:starts[s+1].

    With `shared`, tokens that several sequences have in common are forwarded once; the starts are those of the whole
    sequences. Every other layer works on the forwarded tokens alone.
    """

    sequence_starts: Tensor
    max_length: int
    shared: SharedRows | None = None

    def __call__(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        scale = q_NHd.shape[-1] ** -0.5
        if self.shared is None:
            return ops.packed_attention(q_NHd, k_NKd, v_NKd, self.sequence_starts, scale, self.max_length)
        q_MHd, k_MKd, v_MKd = (x.index_select(0, self.shared.rows_M) for x in (q_NHd, k_NKd, v_NKd))
        mixed_MHd = ops.packed_attention(q_MHd, k_MKd, v_MKd, self.sequence_starts, scale, self.max_length)
        return mixed_MHd.index_select(0, self.shared.places_N)


class Attention(nn.Module):
    """Projects to queries, keys and values in one product, turns them by position, attends, projects back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        rows = sum(self.heads) * config.head_size
        self.qkv = nn.Parameter(torch.zeros(rows, config.width))
        self.qkv_bias = nn.Parameter(torch.zeros(rows)) if config.attention_bias else None
        self.q_norm = RmsNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RmsNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.out = nn.Parameter(torch.zeros(config.width, config.num_heads * config.head_size))
        self.out_bias = nn.Parameter(torch.zeros(config.width)) if config.output_bias else None

    def forward(self, x_ND: Tensor, cos_Nr: Tensor, sin_Nr: Tensor, attend: Attend) -> Tensor:
        qkv_Nhd = ops.linear(x_ND, self.qkv, self.qkv_bias).view(len(x_ND), -1, self.head_size)
        q_NHd, k_NKd, v_NKd = torch.split_with_sizes(qkv_Nhd, self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_NHd, k_NKd = self.q_norm.forward(q_NHd), self.k_norm.forward(k_NKd)
        q_NHd, k_NKd = ops.rotary(q_NHd, k_NKd, cos_Nr, sin_Nr)
        mixed_NHd = attend(self.layer, q_NHd, k_NKd, v_NKd)
        return ops.linear(mixed_NHd.flatten(1), self.out, self.out_bias)
