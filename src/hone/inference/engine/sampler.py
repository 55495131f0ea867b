"""Draws the next token of every sequence, each from its own distribution with its own random numbers.

A token's random number is a function of its request's seed and its position alone, and every operation works row by
row, so what is drawn does not depend on what else is in the batch.

S sequences that sample, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hone.inference.engine.request import Request, TopLogprobs
from hone.model import ops, torch_ops

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Sampled(NamedTuple):
    """Tokens, their logprobs before truncation, and the likeliest alternatives of the rows that asked for them."""

    tokens_S: np.ndarray
    logprobs_S: np.ndarray
    top_logprobs: dict[int, TopLogprobs]


class Sampler:
    """The sampling parameters of the running requests, by row, and the drawing itself.

    logprobs are those of the distribution after bias and temperature and before top-k, top-p and min-p; a greedy token
    has the logprob at temperature 1.
    """

    def __init__(self, max_running: int, device: torch.device) -> None:
        self._device = device
        self._requests: list[Request | None] = [None] * max_running
        self._temperatures = np.ones(max_running, np.float32)
        self._seeds = np.zeros(max_running, np.uint64)
        self._is_greedy = np.zeros(max_running, np.bool_)
        self._is_special = np.zeros(max_running, np.bool_)

    def admit(self, request: Request) -> None:
        """Remember the parameters of a request for its row."""
        row, sampling = request.row, request.sampling
        self._requests[row] = request
        self._temperatures[row] = sampling.temperature or 1.0
        self._seeds[row] = request.seed
        self._is_greedy[row] = sampling.temperature == 0
        self._is_special[row] = bool(
            sampling.logit_bias or sampling.top_logprobs or sampling.top_k or sampling.min_p or sampling.top_p < 1
        )

    def sample(self, logits_SV: Tensor, rows_S: np.ndarray, positions_S: np.ndarray) -> Sampled:
        """One token for each row; positions are the places that the new tokens take in their sequences."""
        temperatures_S = self._tensor(self._temperatures[rows_S])
        uniforms_S = self._tensor(uniforms(self._seeds[rows_S], positions_S))
        special = np.flatnonzero(self._is_special[rows_S])
        requests = [self._request(row) for row in rows_S[special].tolist()]
        for index, request in zip(special.tolist(), requests, strict=True):
            add_bias(logits_SV[index], request.sampling.logit_bias)
        is_greedy_S = self._is_greedy[rows_S]
        if is_greedy_S.all():
            tokens_S = logits_SV.argmax(-1)
        else:
            tokens_S = ops.draw(logits_SV, temperatures_S, uniforms_S)
            if len(special):
                tokens_S = self._redraw(tokens_S, logits_SV, uniforms_S, special, requests)
            if is_greedy_S.any():
                tokens_S = torch.where(self._tensor(is_greedy_S), logits_SV.argmax(-1), tokens_S)
        logprobs_S = ops.token_logprobs(logits_SV, tokens_S, temperatures_S)
        top_logprobs = {
            index: top(logits_SV[index] / float(temperatures_S[index]), request.sampling.top_logprobs)
            for index, request in zip(special.tolist(), requests, strict=True)
            if request.sampling.top_logprobs
        }
        return Sampled(tokens_S.cpu().numpy(), logprobs_S.cpu().numpy(), top_logprobs)

    def _redraw(
        self, tokens_S: Tensor, logits_SV: Tensor, uniforms_S: Tensor, special: np.ndarray, requests: list[Request]
    ) -> Tensor:
        cut = [(i, r.sampling) for i, r in zip(special.tolist(), requests, strict=True) if r.sampling.temperature]
        if not cut:
            return tokens_S
        indices = torch.tensor([index for index, _ in cut], device=self._device)
        settings = [(s.temperature, s.top_k or logits_SV.shape[-1], s.top_p, s.min_p) for _, s in cut]
        temperatures, top_k, top_p, min_p = torch.tensor(settings, device=self._device).T
        scaled_nV = logits_SV[indices] / temperatures[:, None]
        tokens_n = draw_truncated(scaled_nV, top_k, top_p, min_p, uniforms_S[indices])
        return tokens_S.index_copy(0, indices, tokens_n)

    def _request(self, row: int) -> Request:
        request = self._requests[row]
        assert request is not None, f"row {row} samples without having been admitted"
        return request

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each (seed, position), float32: the finaliser of splitmix64 over a counter."""
    x = seeds + positions.astype(np.uint64) * GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    drawn: np.ndarray = (x >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return drawn


def draw_truncated(scaled_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor, uniforms_S: Tensor) -> Tensor:
    """Draw among the top k, of these among the fewest that hold top_p of their mass, none below min_p of the best."""
    sorted_SV, order_SV = scaled_SV.sort(stable=True, dim=-1, descending=True)
    probs_SV = sorted_SV.softmax(-1)
    ranks_V = torch.arange(scaled_SV.shape[-1], device=scaled_SV.device)
    probs_SV = probs_SV.masked_fill(ranks_V >= top_k_S[:, None], 0.0)
    before_SV = probs_SV.cumsum(-1) - probs_SV
    limits_S1 = (top_p_S * probs_SV.sum(-1))[:, None]
    dropped_SV = (before_SV >= limits_S1) & (top_p_S < 1)[:, None]
    dropped_SV |= probs_SV < min_p_S[:, None] * probs_SV[:, :1]
    dropped_SV[:, 0] = False
    ranks_S = torch_ops.invert(probs_SV.masked_fill(dropped_SV, 0.0), uniforms_S)
    return order_SV.gather(-1, ranks_S[:, None])[:, 0]


def add_bias(logits_V: Tensor, bias: dict[int, float]) -> None:
    """Add to the logits of single tokens, in place."""
    if bias:
        token_ids = torch.tensor(list(bias), device=logits_V.device)
        logits_V.index_add_(0, token_ids, torch.tensor(list(bias.values()), device=logits_V.device))


def top(scaled_V: Tensor, count: int) -> TopLogprobs:
    """The likeliest tokens with their logprobs, best first."""
    values, token_ids = scaled_V.log_softmax(-1).topk(min(count, len(scaled_V)))
    return list(zip(token_ids.tolist(), values.tolist(), strict=True))
