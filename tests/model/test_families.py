import dataclasses

import pytest

from hone.model.families import ModelConfig


def test_a_config_survives_the_way_to_hugging_face_and_back(variant):
    config = ModelConfig.from_hugging_face(variant)
    assert ModelConfig.from_hugging_face(config.to_hugging_face()) == config


def test_the_published_layout_of_glm_4_5_air_is_understood():
    config = ModelConfig.from_hugging_face(
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "pad_token_id": 151329,
            "eos_token_id": [151329, 151336, 151338],
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "partial_rotary_factor": 0.5,
            "initializer_range": 0.02,
            "intermediate_size": 10944,
            "max_position_embeddings": 131072,
            "model_type": "glm4_moe",
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,
            "num_attention_heads": 96,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.0,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 46,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "num_nextn_predict_layers": 1,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.54.0",
            "use_cache": True,
            "use_qk_norm": False,
            "vocab_size": 151552,
        }
    )
    assert (config.rope.theta, config.rope.dims, config.rope.scaling) == (1_000_000.0, 64, None)
    assert config.moe is not None
    assert config.moe.sparse_layers == tuple(range(1, 46))
    assert config.eos_token_ids == (151329, 151336, 151338)


def test_rope_fields_of_older_and_newer_files_mean_the_same(glm4_moe):
    newer = ModelConfig.from_hugging_face(glm4_moe)
    del glm4_moe["rope_parameters"]
    older = ModelConfig.from_hugging_face(glm4_moe | {"rope_theta": 10_000, "partial_rotary_factor": 0.5})
    assert older == newer


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "no low_freq_factor"),
        ({"logit_softcap": 30.0}, "logit_softcap are not known to family glm4_moe"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"hidden_size": -4}, "hidden_size = -4"),
        ({"vocab_size": 0}, "vocabulary_size = 0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ({"attention_bias": 1}, "attention_bias = 1"),
        ({"eos_token_id": ["x"]}, "eos_token_id"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"partial_rotary_factor": 0.3, "rope_parameters": None}, "4.8|gives 4|even"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9"),
        ({"n_group": 3}, "n_group 3"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "exceeds the 2 experts"),
        ({"n_group": 8, "topk_group": 2}, "at least 2 experts"),
    ],
)
def test_a_config_that_would_be_computed_differently_is_refused_by_name(glm4_moe, change, complaint):
    if "partial_rotary_factor" in change:
        change = change | {"head_dim": 10}
    with pytest.raises(ValueError, match=complaint):
        ModelConfig.from_hugging_face(glm4_moe | change)


def test_a_config_is_immutable(glm4_moe):
    config = ModelConfig.from_hugging_face(glm4_moe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 1
