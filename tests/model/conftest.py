"""Tiny configurations of every family, models with random weights, and packed random tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hone.model import ops
from hone.model.families import ModelConfig
from hone.model.layers.attention import PackedAttention
from hone.model.transformer import Transformer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
GLM4_MOE = SIZES | {
    "model_type": "glm4_moe",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
QWEN3_MOE = SIZES | {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "glm4_moe": GLM4_MOE,
    "glm4_moe with groups": GLM4_MOE | {"n_group": 2, "topk_group": 1, "n_shared_experts": 2},
    "glm4_moe with qk norm and bias": GLM4_MOE | {"use_qk_norm": True, "attention_bias": True},
    "glm4_moe of raw weights": GLM4_MOE | {"norm_topk_prob": False},
    "qwen3": SIZES | {"model_type": "qwen3"},
    "qwen3 with bias, tied": SIZES | {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe with dense layers": QWEN3_MOE
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": False},
    "llama": SIZES | {"model_type": "llama"},
    "llama with llama3 rope, tied": SIZES
    | {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Packed:
    """Random tokens of a few sequences behind one another."""

    token_ids: Tensor
    positions: Tensor
    starts: Tensor
    attend: PackedAttention

    def logits(self, model: Transformer) -> Tensor:
        return model.unembed(model(self.token_ids, self.positions, self.attend))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[ops.Backend]:
    try:
        with ops.use_backend(request.param):
            yield request.param
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request: pytest.FixtureRequest) -> dict[str, object]:
    """The config.json of one family in one of its variants."""
    return dict(request.param)


@pytest.fixture
def glm4_moe() -> dict[str, object]:
    return dict(GLM4_MOE)


@pytest.fixture
def random_model() -> Callable[[dict[str, object]], Transformer]:
    """A model whose every parameter is random, norms and biases included."""

    def build(config: dict[str, object]) -> Transformer:
        model = Transformer(ModelConfig.from_hugging_face(config)).initialize(seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(torch.empty_like(tensor).normal_(0, 0.1, generator=generator))
        return model

    return build


@pytest.fixture
def pack() -> Callable[..., Packed]:
    def build(*lengths: int, vocabulary: int = 96) -> Packed:
        generator = torch.Generator().manual_seed(len(lengths))
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        token_ids = torch.randint(vocabulary, (sum(lengths),), generator=generator)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return Packed(token_ids, positions, starts, PackedAttention(starts, max(lengths)))

    return build
