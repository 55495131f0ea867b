import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hone.model import ops, torch_ops


def heads(num_tokens, num_heads, head_size=8):
    return torch.randn(num_tokens, num_heads, head_size, requires_grad=True)


def naive_attention(q_NHd, k_NKd, v_NKd, scale, first_position=0):
    """One sequence, spelled out; query i sits at position first_position + i."""
    k_NHd, v_NHd = (x.repeat_interleave(q_NHd.shape[1] // k_NKd.shape[1], 1) for x in (k_NKd, v_NKd))
    scores_HNC = torch.einsum("qhd,khd->hqk", q_NHd, k_NHd) * scale
    positions = first_position + torch.arange(len(q_NHd))
    hidden = torch.arange(len(k_NHd)) > positions[:, None]
    return torch.einsum("hqk,khd->qhd", scores_HNC.masked_fill(hidden, -torch.inf).softmax(-1), v_NHd)


@pytest.mark.parametrize("lengths", [(1,), (6, 6, 6), (3, 1, 70, 33, 2, 64)])
def test_packed_attention_equals_attention_of_each_sequence(lengths, backend):
    torch.manual_seed(0)
    total = sum(lengths)
    q_NHd, k_NKd, v_NKd = heads(total, 4), heads(total, 2), heads(total, 2)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    packed = ops.packed_attention(q_NHd, k_NKd, v_NKd, starts, 0.3)
    sequences = zip(*(x.split(lengths) for x in (q_NHd, k_NKd, v_NKd)), strict=True)
    alone = torch.cat([naive_attention(q, k, v, 0.3) for q, k, v in sequences])

    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out.sin().sum(), (q_NHd, k_NKd, v_NKd)) for out in (packed, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", ["torch", "native"])
def test_paged_attention_equals_attention_over_the_whole_context(name, sequences, seed):
    if name == "native" and ops._native_kernels() is None:
        pytest.skip("no native kernels")
    with ops.use_backend(name), torch.no_grad():
        check_paged_attention(sequences, torch.Generator().manual_seed(seed))


def check_paged_attention(sequences, generator, block_size=4, num_blocks=64):
    blocks = iter(torch.randperm(num_blocks, generator=generator).tolist())
    key_cache = torch.full((num_blocks, block_size, 2, 8), 1e4)
    value_cache = torch.full((num_blocks, block_size, 2, 8), 1e4)
    tables, queries, expected = [], [], []
    for num_queries, num_cached in sequences:
        context = num_queries + num_cached
        table = [next(blocks) for _ in range(-(-context // block_size))]
        slots = torch.tensor([table[i // block_size] * block_size + i % block_size for i in range(context)])
        k, v = (torch.randn(context, 2, 8, generator=generator) for _ in range(2))
        ops.write_cache(k, v, key_cache, value_cache, slots)
        queries.append(torch.randn(num_queries, 4, 8, generator=generator))
        tables.append(table)
        expected.append(naive_attention(queries[-1], k, v, 0.5, first_position=num_cached))
    longest = max(map(len, tables))
    out = ops.paged_attention(
        torch.cat(queries),
        key_cache,
        value_cache,
        torch.tensor([table + [0] * (longest - len(table)) for table in tables], dtype=torch.int32),
        torch.tensor([0, *map(len, queries)]).cumsum(0).to(torch.int32),
        torch.tensor([sum(sequence) for sequence in sequences], dtype=torch.int32),
        0.5,
    )
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_rotary_turns_the_first_channels_and_keeps_the_rest(backend):
    q_NHd, k_NKd, angle = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2)
    cos_Nr, sin_Nr = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    turned = ops.rotary(q_NHd, k_NKd, cos_Nr, sin_Nr)

    for before, after in zip((q_NHd, k_NKd), turned, strict=True):
        pairs = torch.complex(before[..., :2], before[..., 2:4]) * torch.polar(torch.ones(5, 1, 2), angle[:, None])
        torch.testing.assert_close(after, torch.cat([pairs.real, pairs.imag, before[..., 4:]], -1))


@pytest.mark.parametrize("temperature", [1.0, 0.6, "per token"])
def test_token_logprobs_are_those_of_the_scaled_logits(temperature, backend):
    logits_NV, targets_N = torch.randn(6, 40, requires_grad=True), torch.randint(40, (6,))
    temperature = torch.rand(6) + 0.5 if temperature == "per token" else temperature
    divisor = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature

    ours = ops.token_logprobs(logits_NV, targets_N, temperature)
    theirs = -functional.cross_entropy(logits_NV / divisor, targets_N, reduction="none")

    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(x.sin().sum(), logits_NV)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_token_logprobs_of_half_precision_logits_are_float32():
    logprobs = ops.token_logprobs(torch.randn(3, 9, dtype=torch.bfloat16), torch.tensor([0, 1, 2]))
    assert logprobs.dtype is torch.float32


def test_a_chosen_backend_ends_with_its_block():
    x = torch.randn(2, 4)
    before = ops._kernels_for(x)
    with ops.use_backend("torch"):
        assert ops._kernels_for(x) is torch_ops
    assert ops._kernels_for(x) is before


def test_native_kernels_are_for_float32_on_the_cpu_only():
    assert ops._kernels_for(torch.zeros(1, dtype=torch.bfloat16)) is torch_ops


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend 'cuda' must be"):
        ops.set_backend("cuda")
