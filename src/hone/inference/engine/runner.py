"""Computes a planned step: flat inputs of prefill chunks and decodes together, one forward pass, the logits to sample.

N flat tokens, S sequences, H query heads, K key/value heads, d head size, V vocabulary, X KV blocks, b block size,
m blocks per sequence.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hone.inference.engine.request import Request
from hone.inference.engine.scheduler import Chunk, Plan
from hone.model import ops
from hone.model.transformer import Transformer


class Logits(NamedTuple):
    """What the sampler needs: logits, the rows of the requests that sample, the positions of their new tokens."""

    logits_SV: Tensor
    rows_S: np.ndarray
    positions_S: np.ndarray


class PagedAttention:
    """Writes the keys and values of a step to the KV blocks, then attends over each sequence's whole context."""

    __slots__ = ("_block_tables", "_caches", "_contexts", "_query_starts", "_scale", "_slots")

    def __init__(
        self,
        caches: list[tuple[Tensor, Tensor]],
        slots_N: Tensor,
        block_tables_Sm: Tensor,
        query_starts: Tensor,
        contexts_S: Tensor,
        scale: float,
    ) -> None:
        self._caches = caches
        self._slots = slots_N
        self._block_tables = block_tables_Sm
        self._query_starts = query_starts
        self._contexts = contexts_S
        self._scale = scale

    def __call__(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        keys, values = self._caches[layer]
        ops.write_cache(k_NKd, v_NKd, keys, values, self._slots)
        return ops.paged_attention(
            q_NHd, keys, values, self._block_tables, self._query_starts, self._contexts, self._scale
        )


class Runner:
    """The model with its KV blocks. What changes little from step to step is kept in arrays, by the requests' rows."""

    def __init__(
        self, model: Transformer, *, num_blocks: int, block_size: int, max_running: int, max_context: int
    ) -> None:
        self._model = model
        self._device = model.embedding.device
        self._block_size = block_size
        self._caches = empty_caches(model, num_blocks, block_size)
        self._scale = model.config.head_size**-0.5
        self._tables = np.zeros((max_running, -(-max_context // block_size)), np.int32)
        self._tokens = np.zeros(max_running, np.int64)
        self._lengths = np.zeros(max_running, np.int64)
        self._decodes: list[Request] = []
        self._rows = np.zeros(0, np.int64)
        self._starts = np.arange(max_running + 1, dtype=np.int32)

    def run(self, plan: Plan) -> Logits:
        """Compute the step. Keys and values of all its tokens are in the KV blocks afterwards."""
        for request in plan.admitted:
            self._tables[request.row, : len(request.blocks)] = request.blocks
        for request in plan.grown:
            self._tables[request.row, len(request.blocks) - 1] = request.blocks[-1]
        if plan.decodes is not self._decodes:
            self._decodes = plan.decodes
            self._rows = np.array([request.row for request in plan.decodes], np.int64)
        return self._decode() if not plan.chunks else self._mixed(plan.chunks)

    def record(self, rows_S: np.ndarray, tokens_S: np.ndarray) -> None:
        """The sampled tokens: each is its sequence's next input."""
        self._tokens[rows_S] = tokens_S

    def _decode(self) -> Logits:
        rows_S = self._rows
        positions_S = self._lengths[rows_S]
        lengths_S = positions_S + 1
        self._lengths[rows_S] = lengths_S
        starts = self._starts[: len(rows_S) + 1]
        hidden_SD = self._forward(self._tokens[rows_S], positions_S, rows_S, rows_S, starts, lengths_S)
        return Logits(self._model.unembed(hidden_SD), rows_S, lengths_S)

    def _mixed(self, chunks: list[Chunk]) -> Logits:
        chunk_rows = np.array([chunk.request.row for chunk in chunks], np.int64)
        counts = np.array([chunk.end - chunk.start for chunk in chunks], np.int64)
        ends = np.array([chunk.end for chunk in chunks], np.int64)
        decode_positions = self._lengths[self._rows]
        rows_S = np.concatenate([self._rows, chunk_rows])
        counts_S = np.concatenate([np.ones_like(self._rows), counts])
        lengths_S = np.concatenate([decode_positions + 1, ends])
        starts = np.zeros(len(rows_S) + 1, np.int32)
        np.cumsum(counts_S, out=starts[1:])
        token_ids: list[int] = []
        for chunk in chunks:
            token_ids += chunk.request.token_ids[chunk.start : chunk.end]
        tokens_N = np.concatenate([self._tokens[self._rows], np.array(token_ids, np.int64)])
        positions_N = np.arange(starts[-1]) - np.repeat(starts[1:] - lengths_S, counts_S)
        self._lengths[rows_S] = lengths_S
        hidden_ND = self._forward(tokens_N, positions_N, np.repeat(rows_S, counts_S), rows_S, starts, lengths_S)
        samples = np.concatenate([np.ones(len(self._rows), np.bool_), [chunk.is_last for chunk in chunks]])
        last_S = self._tensor((starts[1:] - 1)[samples].astype(np.int64))
        logits_SV = self._model.unembed(hidden_ND.index_select(0, last_S))
        return Logits(logits_SV, rows_S[samples], lengths_S[samples])

    def _forward(
        self,
        tokens_N: np.ndarray,
        positions_N: np.ndarray,
        token_rows_N: np.ndarray,
        rows_S: np.ndarray,
        query_starts: np.ndarray,
        lengths_S: np.ndarray,
    ) -> Tensor:
        size = self._block_size
        blocks_N, offsets_N = np.divmod(positions_N, size)
        slots_N = self._tables[token_rows_N, blocks_N] * size + offsets_N
        width = -(-int(lengths_S.max()) // size)
        attention = PagedAttention(
            self._caches,
            self._tensor(slots_N),
            self._tensor(self._tables[rows_S, :width]),
            self._tensor(query_starts),
            self._tensor(lengths_S.astype(np.int32)),
            self._scale,
        )
        return self._model.forward(self._tensor(tokens_N), self._tensor(positions_N), attention)

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def block_bytes(model: Transformer, block_size: int) -> int:
    """Memory of one KV block over all layers."""
    config = model.config
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_size
    return block_size * elements * model.embedding.element_size()


def empty_caches(model: Transformer, num_blocks: int, block_size: int) -> list[tuple[Tensor, Tensor]]:
    """The key and value blocks of each layer."""
    config, like = model.config, model.embedding
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_size)

    return [(_zeros(shape, like), _zeros(shape, like)) for _ in range(config.num_layers)]


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.is_cuda:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    # The system's zero pages: memory is taken when a block is first written, not for the whole cache at once.
    return torch.from_numpy(np.zeros(math.prod(shape) * like.element_size(), np.uint8)).view(like.dtype).view(shape)
