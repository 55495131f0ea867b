import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hone.model import ops, torch_ops
from hone.model.families import ModelConfig
from hone.model.layers.moe import Moe, route


def every_expert_masked(x_ND, ids_Nk, weights_Nk, gate_up_E2FD, down_EDF):
    """What the grouped products replace: every token through every expert, most of it times zero."""
    weights_NE = torch.zeros(len(x_ND), len(down_EDF)).scatter_add(1, ids_Nk, weights_Nk)
    gate_NEF, up_NEF = torch.einsum("nd,efd->nef", x_ND, gate_up_E2FD).chunk(2, dim=-1)
    return torch.einsum("nef,edf,ne->nd", functional.silu(gate_NEF) * up_NEF, down_EDF, weights_NE)


def random_experts(num_tokens, num_experts, choices, seed=0):
    torch.manual_seed(seed)
    ids_Nk = torch.rand(num_tokens, num_experts).topk(choices).indices
    values = (torch.randn(num_tokens, 16), torch.rand(num_tokens, choices))
    weights = (torch.randn(num_experts, 24, 16) / 4, torch.randn(num_experts, 16, 12) / 4)
    x_ND, weights_Nk, gate_up_E2FD, down_EDF = (value.requires_grad_() for value in (*values, *weights))
    return x_ND, ids_Nk, weights_Nk, gate_up_E2FD, down_EDF


@pytest.mark.parametrize(("num_tokens", "num_experts", "choices"), [(1, 8, 2), (50, 4, 4), (3, 16, 1), (64, 8, 2)])
def test_grouped_experts_equal_every_expert_masked(num_tokens, num_experts, choices, backend):
    arguments = random_experts(num_tokens, num_experts, choices)
    outputs = [run(*arguments) for run in (ops.experts, every_expert_masked)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)

    differentiable = [argument for argument in arguments if argument.requires_grad]
    gradients = [torch.autograd.grad(out.sin().sum(), differentiable) for out in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_for_all_experts_equals_one_product_for_each(dtype):
    x_ND, _, _, gate_up_E2FD, down_EDF = (x.to(dtype).detach() for x in random_experts(40, 4, 2))
    gate_up_E2FD, down_EDF = gate_up_E2FD[:, :16].contiguous(), down_EDF[..., :8].contiguous()
    arguments = [x.requires_grad_() for x in (x_ND, gate_up_E2FD, down_EDF)]
    ends_E = torch.tensor([7, 7, 30, 40], dtype=torch.int32)
    gradients = []
    for products in (torch_ops.grouped_products, torch_ops.sliced_products):
        out_ND = products(x_ND, ends_E, gate_up_E2FD, down_EDF)
        gradients.append((out_ND, *torch.autograd.grad(out_ND.sin().sum(), arguments)))
    tolerance = 0.02 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_no_tokens_pass_through_experts(backend):
    out_ND = ops.experts(*random_experts(0, 4, 2))
    assert out_ND.shape == (0, 16)


def moe_config(**changes):
    from_config = {
        "model_type": "glm4_moe",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 8,
        "moe_intermediate_size": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
    }
    return ModelConfig.from_hugging_face(from_config | changes).moe


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**20), groups=st.sampled_from([(1, 1), (2, 1), (4, 2)]))
def test_the_router_chooses_by_corrected_score_and_weighs_by_raw_score(seed, groups):
    num_groups, kept = groups
    config = moe_config(n_group=num_groups, topk_group=kept, routed_scaling_factor=2.5)
    generator = torch.Generator().manual_seed(seed)
    logits_NE, bias_E = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)

    ids_Nk, weights_Nk = route(logits_NE, bias_E, config)

    scores_NE = logits_NE.sigmoid()
    raw = scores_NE.gather(1, ids_Nk)
    torch.testing.assert_close(weights_Nk, 2.5 * raw / raw.sum(-1, keepdim=True))
    merits_NE = scores_NE + bias_E
    for chosen, merits in zip(ids_Nk.tolist(), merits_NE, strict=True):
        by_group = merits.view(num_groups, -1).topk(2).values.sum(-1).topk(kept).indices.tolist()
        size = 8 // num_groups
        allowed = [expert for expert in range(8) if expert // size in by_group]
        best = sorted(allowed, key=lambda expert: -merits[expert])[:2]
        assert sorted(chosen) == sorted(best)


def test_the_correction_gets_no_gradient_and_the_router_does(backend):
    logits_NE = torch.randn(4, 8, requires_grad=True)
    bias_E = torch.randn(8, requires_grad=True)
    route(logits_NE, bias_E, moe_config()).weights.square().sum().backward()
    assert logits_NE.grad is not None
    assert bias_E.grad is None


def test_the_route_of_a_token_does_not_depend_on_its_neighbours(backend):
    logits_NE, bias_E, config = torch.randn(37, 8), torch.randn(8), moe_config(num_experts_per_tok=5)
    ids_Nk, weights_Nk = route(logits_NE, bias_E, config)
    for row in range(37):
        alone = route(logits_NE[row : row + 1], bias_E, config)
        assert torch.equal(alone.expert_ids[0], ids_Nk[row])
        assert torch.equal(alone.weights[0], weights_Nk[row])


def test_scores_are_those_of_the_sigmoid_even_where_it_is_tiny(backend):
    logits_NE = torch.tensor([[-100.0, -30.0, -9.0, 0.0, 3.0, 30.0, 100.0, 1.0]])
    weights_Nk = route(logits_NE, None, moe_config(num_experts_per_tok=8, norm_topk_prob=False)).weights
    torch.testing.assert_close(weights_Nk[0].sort().values, logits_NE[0].sort().values.sigmoid())


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"n_group": 2, "topk_group": 1}, {"norm_topk_prob": False}], ids=str)
def test_a_layer_gives_the_same_bits_in_inference_in_training_and_while_it_counts(shared, changes, backend):
    moe = Moe(16, moe_config(n_shared_experts=shared, routed_scaling_factor=1.5, **changes))
    for tensor in moe.state_dict().values():
        tensor.normal_(generator=torch.Generator().manual_seed(tensor.numel()))
    x_ND = torch.randn(37, 16)

    trained = moe(x_ND).detach()
    with torch.no_grad():
        in_one_call = moe(x_ND)
        moe.expert_counts_E = torch.zeros(8, dtype=torch.int64)
        counted = moe(x_ND)

    assert torch.equal(in_one_call, trained)
    assert torch.equal(counted, trained)
    assert moe.expert_counts_E.sum() == 37 * 2
