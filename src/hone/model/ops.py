"""The products and reductions of the model by name: native CPU kernels where they apply, torch elsewhere.

N flat tokens, S sequences, D width, H query heads, K key/value heads, d head size, r rotary channels,
E experts, k experts per token, F expert hidden, V vocabulary, X KV blocks, b block size, m blocks per sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor

from hone.model import torch_ops
from hone.model.native import kernels, library

Backend = Literal["auto", "native", "torch"]
Score = Literal["sigmoid", "softmax"]

_backend: Backend = "auto"


class Kernels(Protocol):
    """What a backend computes; training needs all but `mixture` and the paged pair to be differentiable."""

    def rms_norm(self, x_xD: Tensor, weight_D: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(
        self, x_xD: Tensor, residual_xD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...

    def linear(self, x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor: ...

    def rotary(self, q_NHd: Tensor, k_NKd: Tensor, cos_Nr: Tensor, sin_Nr: Tensor) -> tuple[Tensor, Tensor]: ...

    def packed_attention(
        self, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, sequence_starts: Tensor, scale: float
    ) -> Tensor: ...

    def paged_attention(
        self,
        q_NHd: Tensor,
        key_cache_XbKd: Tensor,
        value_cache_XbKd: Tensor,
        block_tables_Sm: Tensor,
        query_starts: Tensor,
        context_lengths_S: Tensor,
        scale: float,
    ) -> Tensor: ...

    def write_cache(
        self, k_NKd: Tensor, v_NKd: Tensor, key_cache_XbKd: Tensor, value_cache_XbKd: Tensor, slots_N: Tensor
    ) -> None: ...

    def route(
        self,
        logits_NE: Tensor,
        correction_bias_E: Tensor | None,
        num_chosen: int,
        *,
        score: Score,
        num_groups: int = 1,
        groups_per_token: int = 1,
        normalise: bool = True,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]: ...

    def experts(
        self,
        x_ND: Tensor,
        expert_ids_Nk: Tensor,
        expert_weights_Nk: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor: ...

    def mixture(
        self,
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
    ) -> Tensor: ...

    def mlp(self, x_ND: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor: ...

    def swiglu(self, gate_up_N2F: Tensor) -> Tensor: ...

    def token_logprobs(self, logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor | float = 1.0) -> Tensor: ...

    def draw(self, logits_SV: Tensor, temperatures_S: Tensor, uniforms_S: Tensor) -> Tensor: ...


def set_backend(backend: Backend) -> None:
    """Choose for this process: "auto" takes native kernels for float32 on the CPU where there are any."""
    global _backend
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"backend {backend!r} must be 'auto', 'native' or 'torch'")
    if backend == "native" and (obstacle := library.obstacle()) is not None:
        raise ValueError(f"the native kernels, which strict numerics need, cannot be used on this machine: {obstacle}")
    _backend = backend


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """`set_backend` for the time of a with block."""
    before = _backend
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def rms_norm(x_xD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / root mean square of its last dimension, times weight."""
    return _kernels_for(x_xD).rms_norm(x_xD, weight_D, eps)


def add_rms_norm(x_xD: Tensor, residual_xD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and the norm of it."""
    return _kernels_for(x_xD).add_rms_norm(x_xD, residual_xD, weight_D, eps)


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias."""
    return _kernels_for(x_ND).linear(x_ND, weight_OD, bias_O)


def rotary(q_NHd: Tensor, k_NKd: Tensor, cos_Nr: Tensor, sin_Nr: Tensor) -> tuple[Tensor, Tensor]:
    """Turn channel i with channel i + r/2 for the first r channels; both halves of cos and sin are equal."""
    return _kernels_for(q_NHd).rotary(q_NHd, k_NKd, cos_Nr, sin_Nr)


def packed_attention(
    q_NHd: Tensor,
    k_NKd: Tensor,
    v_NKd: Tensor,
    sequence_starts: Tensor,
    scale: float,
    max_length: int | None = None,
) -> Tensor:
    """Causal attention within each of the packed sequences. `max_length` spares CUDA a synchronisation."""
    if q_NHd.is_cuda:
        return torch_ops.packed_attention(q_NHd, k_NKd, v_NKd, sequence_starts, scale, max_length)
    return _kernels_for(q_NHd).packed_attention(q_NHd, k_NKd, v_NKd, sequence_starts, scale)


def paged_attention(
    q_NHd: Tensor,
    key_cache_XbKd: Tensor,
    value_cache_XbKd: Tensor,
    block_tables_Sm: Tensor,
    query_starts: Tensor,
    context_lengths_S: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of each sequence's queries, the last positions of its context, over its KV blocks.

    Every sequence has at least one query. What the blocks hold beyond a context has no effect if it is finite.
    """
    return _kernels_for(q_NHd).paged_attention(
        q_NHd, key_cache_XbKd, value_cache_XbKd, block_tables_Sm, query_starts, context_lengths_S, scale
    )


def write_cache(
    k_NKd: Tensor, v_NKd: Tensor, key_cache_XbKd: Tensor, value_cache_XbKd: Tensor, slots_N: Tensor
) -> None:
    """Store keys and values at slot = block * block size + offset."""
    _kernels_for(k_NKd).write_cache(k_NKd, v_NKd, key_cache_XbKd, value_cache_XbKd, slots_N)


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
    return _kernels_for(logits_NE).route(
        logits_NE,
        correction_bias_E,
        num_chosen,
        score=score,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        normalise=normalise,
        scale=scale,
    )


def experts(
    x_ND: Tensor, expert_ids_Nk: Tensor, expert_weights_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Weighted sum over the chosen experts' gated MLPs; no token meets an expert that it did not choose."""
    return _kernels_for(x_ND).experts(x_ND, expert_ids_Nk, expert_weights_Nk, gate_up_E2FD, down_EDF)


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

    Has the bits of its parts, but no gradient: one call for decoding, where a call costs more than what it computes.
    """
    return _kernels_for(x_ND).mixture(
        x_ND,
        router_ED,
        correction_bias_E,
        gate_up_E2FD,
        down_EDF,
        shared,
        num_chosen,
        score=score,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        normalise=normalise,
        scale=scale,
    )


def mlp(x_ND: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    """swiglu(x @ gate_up.T) @ down.T, with the bits of these three."""
    return _kernels_for(x_ND).mlp(x_ND, gate_up_2FD, down_DF)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(first half) * second half."""
    return _kernels_for(gate_up_N2F).swiglu(gate_up_N2F)


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor | float = 1.0) -> Tensor:
    """Float32 logprobs of the targets under logits / temperature."""
    return _kernels_for(logits_NV).token_logprobs(logits_NV, targets_N, temperature_N)


def draw(logits_SV: Tensor, temperatures_S: Tensor, uniforms_S: Tensor) -> Tensor:
    """One token per row from softmax(logits / temperature), decided by the row's number in [0, 1) alone."""
    return _kernels_for(logits_SV).draw(logits_SV, temperatures_S, uniforms_S)


def _kernels_for(x: Tensor) -> Kernels:
    if _backend == "torch" or not x.is_cpu or x.dtype is not torch.float32:
        return torch_ops
    return _native_kernels() or torch_ops


def _native_kernels() -> Kernels | None:
    return kernels if library.available() else None
