"""Samples of a step to micro-batches: which sample goes where, and the tensors that a rank forwards at once.

N flat tokens, S sequences, T trained tokens (those whose logprob is wanted).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hone.model.layers.attention import PackedAttention, SharedRows
from hone.trainer.losses import SampledTokens
from hone.trainer.samples import Integers, Samples, family_heads, starts_of


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples packed behind one another without padding, each common context once.

    N: the tokens that are forwarded. rows_T: the hidden states that predict the trained tokens `targets_T`. places_T:
    where these tokens are among all trained tokens of the step. A rank that has nothing left to do gets one token that
    does not train.
    """

    token_ids_N: Tensor
    positions_N: Tensor
    attend: PackedAttention
    rows_T: Tensor
    targets_T: Tensor
    temperatures_T: Tensor
    places_T: Tensor
    sampled: SampledTokens


def plan_micro_batches(samples: Samples, max_tokens: int, num_ranks: int = 1) -> list[list[list[int]]]:
    """All samples, as [rank][micro-batch][sample]; families stay together where they fit, to share their context."""
    units: list[list[int]] = []
    for family in samples.families:
        whole = int(samples.lengths_S[family].sum())
        units += [family] if whole <= max_tokens else [[index] for index in family]
    plan = pack([int(samples.lengths_S[unit].sum()) for unit in units], max_tokens, num_ranks)
    return [[[index for unit in part for index in units[unit]] for part in rank] for rank in plan]


def pack(lengths: Sequence[int], max_tokens: int, num_ranks: int = 1) -> list[list[list[int]]]:
    """Samples to micro-batches of at most `max_tokens`, as [rank][micro-batch][sample].

    All ranks get the same number of micro-batches, because each of them takes part in every collective; some may be
    empty. The longest samples are placed first, each into the emptiest micro-batch, which balances the ranks; the
    number of micro-batches is the smallest for which that works, and never above first-fit-decreasing's.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise ValueError(
            f"a sample of {longest} tokens does not fit into trainer.micro_batch_tokens = {max_tokens};"
            f" set it to {longest} or more"
        )
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    first_fit = _first_fit(order, lengths, max_tokens)
    fewest = max(1, -(-sum(lengths) // max_tokens))
    for num_bins in range(_round_up(fewest, num_ranks), len(first_fit), num_ranks):
        if (bins := _emptiest_first(order, lengths, max_tokens, num_bins)) is not None:
            return _deal(bins, num_ranks)
    num_bins = _round_up(max(1, len(first_fit)), num_ranks)
    balanced = _emptiest_first(order, lengths, max_tokens, num_bins)
    return _deal(balanced or first_fit + [[]] * (num_bins - len(first_fit)), num_ranks)


def micro_batch(samples: Samples, chosen: Sequence[int], device: torch.device) -> MicroBatch:
    """The tensors of some of a step's samples."""
    chosen = [index for index in chosen if samples.needed_lengths[index]]
    if not chosen:
        return _idle_micro_batch(device)
    layout = lay_out(samples, chosen)
    source_T, sequence_ids_T = layout.source_T, layout.sequence_ids_T
    places_N = np.cumsum(samples.trains_N) - 1

    def tensor(array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return MicroBatch(
        token_ids_N=tensor(samples.token_ids_N[layout.source_N]),
        positions_N=tensor(layout.positions_N),
        attend=PackedAttention(
            tensor(starts_of(layout.lengths_S).astype(np.int32)),
            int(layout.lengths_S.max()),
            SharedRows(tensor(layout.rows_M), tensor(layout.places_N)) if layout.is_shared else None,
        ),
        rows_T=tensor(layout.rows_T),
        targets_T=tensor(samples.token_ids_N[source_T]),
        temperatures_T=tensor(samples.temperatures_S[chosen][sequence_ids_T]),
        places_T=tensor(places_N[source_T]),
        sampled=SampledTokens(
            sampler_logprobs_T=tensor(samples.sampler_logprobs_N[source_T]),
            advantages_T=tensor(samples.advantages_N[source_T]),
            sequence_ids_T=tensor(sequence_ids_T),
            num_sequences=len(chosen),
        ),
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tokens of some samples are forwarded, and where each sample finds its own.

    A sample needs its tokens before its last trained one; M counts these, sample by sample (lengths_S). Samples with
    the same tokens before their first trained one (the rollouts of a group) forward these once: N of the M tokens are
    left. source: places in the step's arrays. rows: places in N. places_N: where in M each of the N stands.
    """

    lengths_S: Integers
    source_N: Integers
    positions_N: Integers
    rows_M: Integers
    places_N: Integers
    rows_T: Integers
    source_T: Integers
    sequence_ids_T: Integers

    @property
    def is_shared(self) -> bool:
        return len(self.source_N) < len(self.rows_M)


def lay_out(samples: Samples, chosen: Sequence[int]) -> Layout:
    """The layout of some samples, which train at least one token among them."""
    starts_S = samples.starts[:-1][chosen]
    contexts_S, lengths_S = samples.context_lengths[chosen], samples.needed_lengths[chosen]
    heads_S = family_heads(samples, starts_S, contexts_S)
    is_head_S = heads_S == np.arange(len(chosen))
    sequence_M = np.repeat(np.arange(len(chosen)), lengths_S)
    position_M = np.arange(len(sequence_M)) - np.repeat(starts_of(lengths_S)[:-1], lengths_S)
    is_own_M = is_head_S[sequence_M] | (position_M >= contexts_S[sequence_M])
    places_N = np.flatnonzero(is_own_M)
    # A sample's own rows stand together; its context's rows stand where its family's head has them.
    row_of_M = np.cumsum(is_own_M) - 1
    first_rows_S = row_of_M[starts_of(lengths_S)[:-1].clip(max=max(0, len(row_of_M) - 1))]
    rows_M = np.where(is_own_M, row_of_M, first_rows_S[heads_S[sequence_M]] + position_M)
    source_M = starts_S[sequence_M] + position_M
    # The token behind each of these is predicted by it.
    predicts_M = samples.trains_N[source_M + 1]
    return Layout(
        lengths_S=lengths_S,
        source_N=source_M[places_N],
        positions_N=position_M[places_N],
        rows_M=rows_M,
        places_N=places_N,
        rows_T=rows_M[predicts_M],
        source_T=source_M[predicts_M] + 1,
        sequence_ids_T=sequence_M[predicts_M],
    )


def _idle_micro_batch(device: torch.device) -> MicroBatch:
    one, none = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return MicroBatch(
        token_ids_N=one,
        positions_N=one,
        attend=PackedAttention(torch.tensor([0, 1], dtype=torch.int32, device=device), 1),
        rows_T=none,
        targets_T=none,
        temperatures_T=none.float(),
        places_T=none,
        sampled=SampledTokens(none.float(), none.float(), none, num_sequences=1),
    )


def _first_fit(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fitting = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if fitting is None:
            fitting = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[fitting].append(index)
        room[fitting] -= lengths[index]
    return bins


def _emptiest_first(
    order: Sequence[int], lengths: Sequence[int], max_tokens: int, num_bins: int
) -> list[list[int]] | None:
    """None when a sample finds no room: it did not fit into the emptiest bin, so into none."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for index in order:
        load, emptiest = heap[0]
        if load + lengths[index] > max_tokens:
            return None
        bins[emptiest].append(index)
        heapq.heapreplace(heap, (load + lengths[index], emptiest))
    return bins


def _deal(bins: list[list[int]], num_ranks: int) -> list[list[list[int]]]:
    """The bins filled one after the other go to different ranks; samples keep their order inside."""
    return [[sorted(part) for part in bins[rank::num_ranks]] for rank in range(num_ranks)]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
