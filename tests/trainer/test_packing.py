"""Which sample goes into which micro-batch, and the tensors made of them."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hone.schema.batches import TrainingSample
from hone.trainer.packing import micro_batch, pack, plan_micro_batches
from hone.trainer.samples import Samples
from hone.transport.batches import batch_from

CPU = torch.device("cpu")
MAX_TOKENS = 50
lengths_of_samples = st.lists(st.integers(1, MAX_TOKENS), max_size=60)


@given(lengths_of_samples, st.integers(1, 4))
def test_every_sample_is_packed_once_within_the_budget(lengths: list[int], num_ranks: int) -> None:
    plan = pack(lengths, MAX_TOKENS, num_ranks)
    placed = [index for rank in plan for part in rank for index in part]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in part) <= MAX_TOKENS for rank in plan for part in rank)


@given(lengths_of_samples, st.integers(1, 4))
def test_all_ranks_have_equally_many_micro_batches(lengths: list[int], num_ranks: int) -> None:
    plan = pack(lengths, MAX_TOKENS, num_ranks)
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1
    assert plan[0]


@given(lengths_of_samples, st.integers(1, 4))
def test_no_more_micro_batches_than_half_filled_ones_would_need(lengths: list[int], num_ranks: int) -> None:
    # First-fit-decreasing, which the packing never exceeds, leaves at most one bin half empty.
    num_micro_batches = sum(len(rank) for rank in pack(lengths, MAX_TOKENS, num_ranks))
    assert num_micro_batches <= 2 * sum(lengths) / MAX_TOKENS + 1 + num_ranks


@given(lengths_of_samples)
def test_packing_is_deterministic(lengths: list[int]) -> None:
    assert pack(lengths, MAX_TOKENS, 2) == pack(list(lengths), MAX_TOKENS, 2)


def test_ranks_carry_about_the_same_load() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=400).tolist()
    plan = pack(lengths, 2048, 4)
    loads = [sum(lengths[index] for part in rank for index in part) for rank in plan]
    assert max(loads) - min(loads) < 100


def test_what_fits_at_once_stays_one_micro_batch_in_order() -> None:
    assert pack([3, 9, 5], 20) == [[[0, 1, 2]]]


def test_a_sample_longer_than_the_budget_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens = 50; set it to 60"):
        pack([10, 60], MAX_TOKENS)


def sample(token_ids: list[int], loss_mask: list[int], temperature: float = 1.0) -> TrainingSample:
    return TrainingSample(
        token_ids=token_ids,
        loss_mask=loss_mask,
        logprobs=[-0.5 * mask * token for mask, token in zip(loss_mask, token_ids, strict=True)],
        advantages=[1.5 * mask for mask in loss_mask],
        temperature=temperature,
        version=2,
        reward=0.25,
    )


@pytest.fixture
def three_samples() -> Samples:
    batch = batch_from(
        7, 1, [sample([10, 11, 12], [0, 1, 1]), sample([20, 21], [0, 1], 0.5), sample([30, 31, 32, 33], [0, 0, 1, 0])]
    )
    return Samples.from_batch(batch)


def test_a_micro_batch_holds_what_its_trained_tokens_need_behind_one_another(three_samples: Samples) -> None:
    part = micro_batch(three_samples, [0, 2], CPU)
    assert part.token_ids_N.tolist() == [10, 11, 30, 31]
    assert part.positions_N.tolist() == [0, 1, 0, 1]
    assert part.attend.sequence_starts.tolist() == [0, 2, 4]
    assert part.attend.sequence_starts.dtype == torch.int32
    assert part.attend.max_length == 2
    assert part.attend.shared is None


GROUP = [
    sample([1, 2, 3, 7, 8], [0, 0, 0, 1, 1]),
    sample([1, 2, 3, 9, 8, 5], [0, 0, 0, 1, 1, 1]),
    sample([1, 2, 4, 6], [0, 0, 0, 1]),
]


def test_rollouts_of_a_group_forward_their_prompt_once() -> None:
    part = micro_batch(Samples.from_batch(batch_from(1, 1, GROUP)), [0, 1, 2], CPU)
    assert part.token_ids_N.tolist() == [1, 2, 3, 7, 9, 8, 1, 2, 4]
    assert part.positions_N.tolist() == [0, 1, 2, 3, 3, 4, 0, 1, 2]
    shared = part.attend.shared
    assert shared is not None
    assert part.token_ids_N[shared.rows_M].tolist() == [1, 2, 3, 7, 1, 2, 3, 9, 8, 1, 2, 4]
    assert part.attend.sequence_starts.tolist() == [0, 4, 9, 12]
    assert part.targets_T.tolist() == [7, 8, 9, 8, 5, 6]
    assert part.token_ids_N[part.rows_T].tolist() == [3, 7, 3, 9, 8, 4]


@st.composite
def groups_of_samples(draw: st.DrawFn) -> list[TrainingSample]:
    def tokens(least: int, most: int) -> list[int]:
        return draw(st.lists(st.integers(1, 60), min_size=least, max_size=most))

    samples = []
    for _ in range(draw(st.integers(1, 4))):
        context = tokens(1, 6)
        for _ in range(draw(st.integers(1, 4))):
            rest = tokens(0, 6)
            mask = draw(st.lists(st.integers(0, 1), min_size=len(rest), max_size=len(rest)))
            samples.append(sample(context + rest, [0] * len(context) + mask))
    return samples


@given(groups_of_samples())
def test_every_whole_sequence_is_found_again_among_the_shared_rows(found: list[TrainingSample]) -> None:
    samples = Samples.from_batch(batch_from(1, 1, found))
    part = micro_batch(samples, range(len(found)), CPU)
    needed = [s.token_ids[: max(i for i, m in enumerate(s.loss_mask) if m)] for s in found if any(s.loss_mask)]
    if not needed:
        return
    shared, starts = part.attend.shared, part.attend.sequence_starts.tolist()
    rows_M = torch.arange(len(part.token_ids_N)) if shared is None else shared.rows_M
    whole = [part.token_ids_N[rows_M[a:b]].tolist() for a, b in itertools.pairwise(starts)]
    positions = [part.positions_N[rows_M[a:b]].tolist() for a, b in itertools.pairwise(starts)]
    assert whole == needed
    assert positions == [list(range(len(sequence))) for sequence in needed]
    if shared is not None:
        assert rows_M[shared.places_N].tolist() == list(range(len(part.token_ids_N)))


@given(groups_of_samples(), st.integers(1, 3))
def test_families_stay_in_one_micro_batch_where_they_fit(found: list[TrainingSample], num_ranks: int) -> None:
    samples = Samples.from_batch(batch_from(1, 1, found))
    plan = plan_micro_batches(samples, MAX_TOKENS, num_ranks)
    part_of = {index: (r, p) for r, rank in enumerate(plan) for p, part in enumerate(rank) for index in part}
    assert sorted(part_of) == list(range(len(found)))
    for family in samples.families:
        if samples.lengths_S[family].sum() <= MAX_TOKENS:
            assert len({part_of[index] for index in family}) == 1


def test_trained_tokens_are_predicted_by_the_token_before_them(three_samples: Samples) -> None:
    part = micro_batch(three_samples, [1, 2], CPU)
    assert part.targets_T.tolist() == [21, 32]
    assert part.token_ids_N[part.rows_T].tolist() == [20, 31]
    assert part.temperatures_T.tolist() == [0.5, 1.0]
    assert part.sampled.sampler_logprobs_T.tolist() == [-10.5, -16.0]
    assert part.sampled.sequence_ids_T.tolist() == [0, 1]


def test_places_lead_back_to_the_order_of_the_step(three_samples: Samples) -> None:
    whole = three_samples.trained_tokens()
    for chosen in ([2, 0], [1], [0, 1, 2]):
        part = micro_batch(three_samples, chosen, CPU)
        torch.testing.assert_close(whole.sampler_logprobs_T[part.places_T], part.sampled.sampler_logprobs_T)


def test_denominators_count_trained_tokens_and_the_sequences_that_have_them(three_samples: Samples) -> None:
    untrained = sample([1, 2], [0, 0])
    denominators = Samples.from_batch(batch_from(1, 1, [sample([1, 2, 3], [0, 1, 1]), untrained])).denominators()
    assert (denominators.num_tokens, denominators.num_sequences) == (2, 1)
    assert three_samples.denominators().num_sequences == 3


def test_a_first_token_never_trains_because_nothing_predicts_it() -> None:
    samples = Samples.from_batch(batch_from(1, 1, [sample([1, 2], [1, 1]), sample([3, 4], [1, 0])]))
    assert samples.trains_N.tolist() == [False, True, False, False]


def test_an_idle_micro_batch_has_a_token_to_forward_and_none_to_train(
    random_samples: Callable[..., Samples],
) -> None:
    part = micro_batch(random_samples(5), [], CPU)
    assert len(part.token_ids_N) == 1
    assert len(part.targets_T) == 0
