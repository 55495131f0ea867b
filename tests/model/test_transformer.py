import pytest
import torch

from hone.model.families import ModelConfig
from hone.model.layers.attention import PackedAttention
from hone.model.transformer import Transformer


def model_of(config, seed=0):
    return Transformer(ModelConfig.from_hugging_face(config)).initialize(seed)


def test_initial_values_depend_on_the_seed_and_the_name_alone(glm4_moe):
    narrow, deep = model_of(glm4_moe), model_of(glm4_moe | {"num_hidden_layers": 5})
    for name, value in narrow.state_dict().items():
        assert torch.equal(value, deep.state_dict()[name])
    assert not torch.equal(narrow.embedding, model_of(glm4_moe, seed=1).embedding)
    assert not torch.equal(narrow.embedding, narrow.unembedding)


def test_initial_weights_have_the_spread_of_the_config(glm4_moe):
    model = model_of(glm4_moe | {"initializer_range": 0.05, "attention_bias": True})
    assert model.embedding.std().item() == pytest.approx(0.05, rel=0.1)
    assert (model.norm.weight == 1).all()
    assert (model.layers[0].attention.qkv_bias == 0).all()


def test_a_token_sees_neither_later_tokens_nor_other_sequences(variant, random_model, pack, backend):
    model, packed = random_model(variant), pack(7, 12, 3)
    alone = PackedAttention(torch.tensor([0, 5], dtype=torch.int32), 5)

    with torch.no_grad():
        together = packed.logits(model)
        start = model.unembed(model(packed.token_ids[7:12], torch.arange(5), alone))

    torch.testing.assert_close(together[7:12], start, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_leaves_losses_gradients_and_counts_alone(glm4_moe, random_model, pack, backend):
    packed, results = pack(9, 4, 20), []
    for checkpointed in (False, True):
        model = random_model(glm4_moe)
        model.activation_checkpointing = checkpointed
        assert model.activation_checkpointing is checkpointed
        model.count_expert_tokens()
        packed.logits(model).logsumexp(-1).sum().backward()
        results.append(([p.grad for p in model.parameters()], model.take_expert_tokens()))

    (plain_gradients, plain_counts), (gradients, counts) = results
    for gradient, plain in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-6)
    assert {layer: c.tolist() for layer, c in counts.items()} == {
        layer: c.tolist() for layer, c in plain_counts.items()
    }


def test_expert_counts_add_up_until_they_are_taken(glm4_moe, random_model, pack):
    model, packed = random_model(glm4_moe), pack(9, 4)
    assert model.take_expert_tokens() == {}
    model.count_expert_tokens()
    with torch.no_grad():
        packed.logits(model), packed.logits(model)

    counts = model.take_expert_tokens()

    assert {layer: counts_E.sum().item() for layer, counts_E in counts.items()} == {1: 52, 2: 52}
    assert all(counts_E.sum() == 0 for counts_E in model.take_expert_tokens().values())
    model.count_expert_tokens(False)
    assert model.take_expert_tokens() == {}


def test_a_load_balancer_steers_the_choice_through_the_correction_biases(glm4_moe, random_model, pack):
    model, packed = random_model(glm4_moe), pack(40)
    model.count_expert_tokens()
    for bias_E in model.correction_biases().values():
        bias_E[3] = 10.0
    with torch.no_grad():
        packed.logits(model)
    assert [counts_E[3].item() for counts_E in model.take_expert_tokens().values()] == [40, 40]


def test_a_cast_to_bfloat16_keeps_positions_and_router_corrections_exact(glm4_moe, random_model, pack):
    model, packed = random_model(glm4_moe), pack(30, 9)
    exact = packed.logits(model)
    correction = model.layers[1].mlp.correction_bias.clone()

    model.to(torch.bfloat16)

    assert model.embedding.dtype is torch.bfloat16
    assert model.cos_Pr.dtype is model.sin_Pr.dtype is torch.float32
    assert torch.equal(model.layers[1].mlp.correction_bias, correction)
    logits = packed.logits(model)
    assert logits.dtype is torch.float32
    # A rounded router may send a token elsewhere, so compare the bulk of the logits.
    assert (logits - exact).abs().median() < 0.05 * exact.std()


def test_tied_models_have_one_table(glm4_moe):
    tied = model_of(glm4_moe | {"tie_word_embeddings": True})
    assert tied.unembedding is None
    assert (
        sum(p.numel() for p in tied.parameters()) == sum(p.numel() for p in model_of(glm4_moe).parameters()) - 96 * 32
    )
