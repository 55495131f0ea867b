"""The native kernels against torch in float64, and their rows against themselves in other company."""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hone.model.native import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="needs a C compiler")
quick = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_close(ours: Tensor, exact: Tensor, tolerance: float = 2e-6) -> None:
    assert ours.shape == exact.shape
    if ours.numel():
        assert (ours.double() - exact).abs().max() <= tolerance * (1 + exact.abs().max())


def assert_same_values_and_gradients(
    ours: Callable[..., Tensor | tuple[Tensor, ...]], exact: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
) -> None:
    """Runs `exact` in float64, `ours` with and without gradients in float32."""
    single = [x.clone().requires_grad_() for x in inputs]
    double = [x.double().requires_grad_() for x in inputs]
    out, out_exact = ours(*single), exact(*double)
    outs = out if isinstance(out, tuple) else (out,)
    outs_exact = out_exact if isinstance(out_exact, tuple) else (out_exact,)
    with torch.no_grad():
        plain = ours(*inputs)
    for a, b, c in zip(outs, outs_exact, plain if isinstance(plain, tuple) else (plain,), strict=True):
        assert_close(a, b)
        assert torch.equal(a, c)
    d_outs = [torch.randn(x.shape) for x in outs]
    gradients = torch.autograd.grad(outs, single, d_outs, retain_graph=True)
    gradients_exact = torch.autograd.grad(outs_exact, double, [d.double() for d in d_outs])
    again = torch.autograd.grad(outs, single, d_outs)
    for a, b, c in zip(gradients, gradients_exact, again, strict=True):
        assert_close(a, b, 1e-5)
        assert torch.equal(a, c)


def exact_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for choice in range(ids.shape[1]):
        gate, up = torch.einsum("nd,nfd->nf", x, gate_up[ids[:, choice]]).chunk(2, -1)
        hidden = functional.silu(gate) * up
        total = total + weights[:, choice, None] * torch.einsum("nf,ndf->nd", hidden, down[ids[:, choice]])
    return total


def exact_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    group, outs = q.shape[1] // k.shape[1], []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        queries, keys, values = (
            x[start:end].repeat_interleave(repeats, 1).transpose(0, 1)
            for x, repeats in ((q, 1), (k, group), (v, group))
        )
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(future, -math.inf)
        outs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outs)


def random_choices(tokens: int, chosen: int, num_experts: int) -> Tensor:
    return torch.rand(tokens, num_experts).topk(chosen, -1).indices


# Values and gradients


@quick
@given(st.integers(0, 40), st.integers(1, 150), st.integers(1, 90), st.booleans())
def test_linear_equals_torch(rows: int, columns: int, depth: int, has_bias: bool) -> None:
    inputs = [torch.randn(rows, depth), torch.randn(columns, depth), *([torch.randn(columns)] if has_bias else [])]
    assert_same_values_and_gradients(kernels.linear, functional.linear, *inputs)


def test_linear_takes_a_depth_beyond_its_blocks_and_outer_dimensions() -> None:
    x, weight = torch.randn(2, 7, 1300), torch.randn(70, 1300) / 36
    assert_same_values_and_gradients(kernels.linear, functional.linear, x, weight)


def test_linear_takes_rows_that_lie_apart() -> None:
    x, weight = torch.randn(9, 48), torch.randn(20, 16)
    assert torch.equal(kernels.linear(x[:, 16:32], weight), kernels.linear(x[:, 16:32].contiguous(), weight))


@quick
@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 140))
def test_rms_norm_equals_torch(rows: int, heads: int, width: int) -> None:
    assert_same_values_and_gradients(
        lambda x, weight: kernels.rms_norm(x, weight, 1e-5),
        lambda x, weight: functional.rms_norm(x, (width,), weight, 1e-5),
        torch.randn(rows, heads, width),
        torch.randn(width),
    )


def test_rms_norm_takes_heads_out_of_a_joint_projection() -> None:
    joint, weight = torch.randn(5, 6, 20), torch.randn(20)
    part = joint[:, 1:4]
    assert torch.equal(kernels.rms_norm(part, weight, 1e-5), kernels.rms_norm(part.contiguous(), weight, 1e-5))


def test_add_rms_norm_equals_its_parts() -> None:
    x, residual, weight = torch.randn(7, 40), torch.randn(7, 40), torch.randn(40)
    total, out = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, kernels.rms_norm(x + residual, weight, 1e-5))


@quick
@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 2), st.integers(0, 40), st.integers(1, 9))
def test_rotary_equals_its_formula(rows: int, group: int, kv_heads: int, half: int, rest: int) -> None:
    angles = torch.randn(rows, half).repeat(1, 2).double()
    q, k = (torch.randn(rows, heads, 2 * half + rest) for heads in (group * kv_heads, kv_heads))

    def turn(x: Tensor) -> Tensor:
        first, second, kept = x.split((half, half, rest), -1)
        cos, sin = angles[:, None, :half].cos(), angles[:, None, :half].sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, kept), -1)

    assert_same_values_and_gradients(
        lambda q, k: kernels.rotary(q, k, angles.cos().float(), angles.sin().float()),
        lambda q, k: (turn(q), turn(k)),
        q,
        k,
    )


@quick
@given(st.integers(0, 9), st.integers(1, 70))
def test_swiglu_equals_torch(rows: int, width: int) -> None:
    assert_same_values_and_gradients(
        kernels.swiglu, lambda x: functional.silu(x[:, :width]) * x[:, width:], 9 * torch.randn(rows, 2 * width)
    )


def test_swiglu_survives_large_gates() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -80.0, 1.0, 1.0, 1.0]])
    assert_close(kernels.swiglu(gate_up), functional.silu(gate_up[:, :3].double()))


@quick
@given(st.integers(0, 9), st.integers(1, 70), st.sampled_from([1.0, 0.6, "each"]))
def test_token_logprobs_equal_log_softmax(rows: int, vocabulary: int, temperature: float | str) -> None:
    targets, temperatures = torch.randint(vocabulary, (rows,)), torch.rand(rows) + 0.5
    ours = temperatures if temperature == "each" else temperature
    divisor = temperatures[:, None] if temperature == "each" else temperature
    assert_same_values_and_gradients(
        lambda logits: kernels.token_logprobs(logits, targets, ours),
        lambda logits: (logits / divisor).log_softmax(-1).gather(1, targets[:, None])[:, 0],
        9 * torch.randn(rows, vocabulary),
    )


def test_token_logprobs_of_broken_logits_or_targets_are_nan() -> None:
    logits = torch.zeros(3, 20)
    logits[0, 3] = math.nan
    assert kernels.token_logprobs(logits, torch.tensor([0, 20, 1])).isnan().tolist() == [True, True, False]


@quick
@given(st.integers(0, 120), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
def test_experts_equal_a_sum_over_choices(tokens: int, chosen: int, width: int, inner: int) -> None:
    ids = random_choices(tokens, chosen, 5)
    assert_same_values_and_gradients(
        lambda x, weights, gate_up, down: kernels.experts(x, ids, weights, gate_up, down),
        lambda x, weights, gate_up, down: exact_experts(x, ids, weights, gate_up, down),
        torch.randn(tokens, width),
        torch.rand(tokens, chosen),
        torch.randn(5, 2 * inner, width) / width**0.5,
        torch.randn(5, width, inner) / inner**0.5,
    )


def test_experts_refuse_an_unknown_expert() -> None:
    x, gate_up, down = torch.randn(1, 8), torch.randn(3, 8, 8), torch.randn(3, 8, 4)
    with pytest.raises(ValueError, match="there are 3 experts"):
        kernels.experts(x, torch.tensor([[0, 3]]), torch.rand(1, 2), gate_up, down)


@quick
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([16, 24, 32, 80]),
)
def test_packed_attention_equals_softmax(lengths: list[int], group: int, kv_heads: int, size: int) -> None:
    tokens, starts = sum(lengths), starts_of(lengths)
    assert_same_values_and_gradients(
        lambda q, k, v: kernels.packed_attention(q, k, v, starts, size**-0.5),
        lambda q, k, v: exact_attention(q, k, v, starts, size**-0.5),
        torch.randn(tokens, group * kv_heads, size),
        torch.randn(tokens, kv_heads, size),
        torch.randn(tokens, kv_heads, size),
    )


@pytest.mark.parametrize(("num_groups", "groups_per_token"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_route_weighs_the_best_experts_of_the_best_groups(
    score: str, normalise: bool, num_groups: int, groups_per_token: int
) -> None:
    bias = 0.1 * torch.randn(20)

    def ours(logits: Tensor) -> Tensor:
        ids, weights = kernels.route(
            logits, bias, 3, score=score, num_groups=num_groups, groups_per_token=groups_per_token,
            normalise=normalise, scale=2.5,
        )  # fmt: skip
        return torch.zeros_like(logits).scatter(1, ids, weights)

    def exact(logits: Tensor) -> Tensor:
        scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
        merits = (scores + bias).view(len(logits), num_groups, -1)
        groups = merits.topk(2).values.sum(-1).topk(groups_per_token).indices
        open_groups = torch.zeros(len(logits), num_groups, dtype=torch.bool).scatter(1, groups, True)
        ids = merits.masked_fill(~open_groups[..., None], -math.inf).flatten(1).topk(3).indices
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) if normalise else weights
        return torch.zeros_like(logits).scatter(1, ids, 2.5 * weights)

    assert_same_values_and_gradients(ours, exact, torch.randn(30, 20))


def test_gradients_pass_through_activation_checkpointing_and_shared_weights() -> None:
    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(24, 24, requires_grad=True)

    def twice(x: Tensor) -> Tensor:
        return kernels.linear(kernels.swiglu(kernels.linear(kernels.linear(x, weight), weight.repeat(2, 1))), weight)

    direct = torch.autograd.grad(twice(x).sum(), (x, weight))
    kept: Tensor = checkpoint(twice, x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(kept.sum(), (x, weight)), direct))


# A row's result does not depend on its company


@quick
@given(st.integers(2, 40), st.integers(1, 200), st.integers(1, 700))
def test_a_row_of_a_product_is_the_same_alone(rows: int, columns: int, depth: int) -> None:
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    together = kernels.linear(x, weight, bias)
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(kernels.linear(x[row : row + 1], weight, bias), together[row : row + 1])


def test_a_trained_and_a_frozen_weight_give_the_same_product() -> None:
    x, weight = torch.randn(33, 50), torch.randn(70, 50)
    assert torch.equal(kernels.linear(x, weight), kernels.linear(x, weight.clone().requires_grad_()))


def test_a_row_of_each_row_kernel_is_the_same_alone() -> None:
    gate_up, logits, x, weight = torch.randn(37, 90), torch.randn(37, 45), torch.randn(37, 75), torch.randn(75)
    targets, bias = torch.randint(45, (37,)), torch.randn(45)
    row_kernels: list[Callable[[slice], Tensor]] = [
        lambda rows: kernels.swiglu(gate_up[rows]),
        lambda rows: kernels.rms_norm(x[rows], weight, 1e-6),
        lambda rows: kernels.token_logprobs(logits[rows], targets[rows], 0.7),
        lambda rows: kernels.route(logits[rows], bias, 4, score="sigmoid")[1],
    ]
    for kernel in row_kernels:
        alone = torch.cat([kernel(slice(row, row + 1)) for row in range(37)])
        assert torch.equal(alone, kernel(slice(None)))


def test_a_token_gets_the_same_from_its_experts_alone() -> None:
    x, ids, weights = torch.randn(250, 40), random_choices(250, 2, 6), torch.rand(250, 2)
    gate_up, down = torch.randn(6, 56, 40), torch.randn(6, 40, 28)
    together = kernels.experts(x, ids, weights, gate_up, down)
    trained = kernels.experts(x, ids, weights, gate_up.clone().requires_grad_(), down)
    alone = [kernels.experts(x[i : i + 1], ids[i : i + 1], weights[i : i + 1], gate_up, down) for i in range(0, 250, 9)]
    assert torch.equal(torch.cat(alone), together[::9])
    assert torch.equal(trained, together)


class Pages:
    """Sequences in a shuffled paged cache whose unused slots are not numbers."""

    def __init__(self, k: Tensor, v: Tensor, starts: Tensor, block_size: int) -> None:
        lengths = starts.diff().tolist()
        width = max(1, *(-(-length // block_size) for length in lengths))
        shape = (len(lengths) * width + 1, block_size, *k.shape[1:])
        self.keys, self.values = torch.full(shape, math.nan), torch.full(shape, math.nan)
        self.tables = torch.randperm(shape[0])[: len(lengths) * width].view(-1, width).int()
        places = torch.cat([torch.arange(length) for length in lengths])
        sequences = torch.repeat_interleave(torch.arange(len(lengths)), starts.diff())
        slots = self.tables[sequences, places // block_size].long() * block_size + places % block_size
        kernels.write_cache(k, v, self.keys, self.values, slots)

    def attend(self, q: Tensor, query_lengths: list[int], contexts: list[int]) -> Tensor:
        return kernels.paged_attention(
            q, self.keys, self.values, self.tables, starts_of(query_lengths), torch.tensor(contexts).int(), 0.2
        )


@quick
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.sampled_from([(4, 2, 32), (3, 1, 24), (2, 2, 16), (7, 1, 80)]),
    st.integers(1, 40),
    st.data(),
)
def test_paged_attention_in_chunks_gives_the_bits_of_packed_attention(
    lengths: list[int], heads: tuple[int, int, int], block_size: int, data: st.DataObject
) -> None:
    starts, (num_heads, kv_heads, size) = starts_of(lengths), heads
    q, k, v = (torch.randn(sum(lengths), h, size) for h in (num_heads, kv_heads, kv_heads))
    packed = kernels.packed_attention(q, k, v, starts, 0.2)
    pages = Pages(k, v, starts, block_size)
    assert torch.equal(pages.attend(q, lengths, lengths), packed)
    contexts = [data.draw(st.integers(1, length)) for length in lengths]
    chunks = [data.draw(st.integers(1, context)) for context in contexts]
    rows = torch.cat(
        [torch.arange(s + c - n, s + c) for s, c, n in zip(starts.tolist(), contexts, chunks, strict=False)]
    )
    assert torch.equal(pages.attend(q[rows], chunks, contexts), packed[rows])


def test_attention_takes_the_parts_of_a_joint_projection() -> None:
    joint, starts = torch.randn(30, 8, 16), starts_of([10, 20])
    parts = joint.split((4, 2, 2), dim=1)
    together = kernels.packed_attention(*(part.contiguous() for part in parts), starts, 0.25)
    assert torch.equal(kernels.packed_attention(*parts, starts, 0.25), together)


def test_two_threads_give_the_bits_of_one() -> None:
    x, weight = torch.randn(400, 64, requires_grad=True), torch.randn(160, 64, requires_grad=True)
    ids, weights = random_choices(400, 2, 6), torch.rand(400, 2)
    gate_up, down = torch.randn(6, 64, 64, requires_grad=True), torch.randn(6, 64, 32, requires_grad=True)
    qkv, starts = torch.randn(400, 12, 32, requires_grad=True), starts_of([150, 1, 200, 49])

    def everything() -> list[Tensor]:
        outs = [
            kernels.linear(x, weight),
            kernels.linear(x[:7], weight),
            kernels.experts(x, ids, weights, gate_up, down),
            kernels.packed_attention(*qkv.split((8, 2, 2), 1), starts, 0.2),
        ]
        gradients = torch.autograd.grad([out.sum() for out in outs], (x, weight, gate_up, down, qkv))
        return [*outs, *gradients]

    one = everything()
    torch.set_num_threads(2)
    assert all(map(torch.equal, everything(), one))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("rows", [0, 1, 205])
def test_a_whole_feed_forward_layer_gives_the_bits_of_its_parts(
    rows: int, score: Literal["sigmoid", "softmax"]
) -> None:
    x, router, bias = torch.randn(rows, 40), torch.randn(6, 40), torch.randn(6)
    gate_up, down = torch.randn(6, 56, 40), torch.randn(6, 40, 28)
    shared = torch.randn(70, 40), torch.randn(40, 35)
    by_parts = kernels.experts(x, *kernels.route(kernels.linear(x, router), bias, 3, score=score), gate_up, down)
    shared_by_parts = kernels.linear(kernels.swiglu(kernels.linear(x, shared[0])), shared[1])
    assert torch.equal(kernels.mlp(x, *shared), shared_by_parts)
    assert torch.equal(kernels.mixture(x, router, bias, gate_up, down, None, 3, score=score), by_parts)
    whole = kernels.mixture(x, router, bias, gate_up, down, shared, 3, score=score)
    assert torch.equal(whole, by_parts + shared_by_parts)


# Packed copies of frozen weights


def test_a_weight_written_in_place_is_packed_anew() -> None:
    x, weight = torch.randn(3, 20), torch.randn(30, 20)
    kernels.linear(x, weight)
    weight.mul_(2.0)
    assert_close(kernels.linear(x, weight), functional.linear(x.double(), weight.double()))


def test_a_weight_written_behind_its_version_needs_forget_packs() -> None:
    x, weight = torch.randn(3, 20), torch.randn(30, 20)
    kernels.linear(x, weight)
    weight.data.mul_(2.0)
    kernels.forget_packs()
    assert_close(kernels.linear(x, weight), functional.linear(x.double(), weight.double()))


def test_inference_tensors_are_welcome() -> None:
    with torch.inference_mode():
        x, weight = torch.randn(3, 20), torch.randn(30, 20)
        weight_before = kernels.linear(x, weight)
        weight.mul_(2.0)
        assert_close(kernels.linear(x, weight), 2.0 * weight_before.double())


def test_a_wrong_shape_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"x is torch.float32 \[3, 21\]; it must end in 20 columns"):
        kernels.linear(torch.randn(3, 21), torch.randn(30, 20))
