"""A tiny mixture of experts, random samples, and a trainer around them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hone.config.recipe import OptimizerSection
from hone.model.families import ModelConfig
from hone.model.transformer import Transformer
from hone.trainer.optim import build_optimizers
from hone.trainer.packing import Samples
from hone.trainer.ranks import Ranks
from hone.trainer.step import Trainer

CONFIG = {
    "model_type": "glm4_moe",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> Transformer:
    return Transformer(ModelConfig.from_hugging_face(CONFIG)).initialize(seed=3)


@pytest.fixture
def trainer(model: Transformer) -> Trainer:
    return Trainer(
        model=model,
        optimizers=build_optimizers(model, OptimizerSection(lr=1e-2)),
        ranks=Ranks.alone(torch.device("cpu")),
        micro_batch_tokens=64,
        max_grad_norm=1.0,
    )


@pytest.fixture
def random_samples() -> Callable[..., Samples]:
    def build(*lengths: int, seed: int = 0) -> Samples:
        generator = np.random.default_rng(seed)
        num_tokens = sum(lengths)
        trains_N = generator.random(num_tokens) < 0.6
        trains_N[np.cumsum([0, *lengths[:-1]])] = False
        return Samples(
            lengths_S=np.array(lengths, np.int64),
            versions_S=np.zeros(len(lengths), np.int64),
            temperatures_S=np.full(len(lengths), 1.0, np.float32),
            rewards_S=generator.random(len(lengths), np.float32),
            token_ids_N=generator.integers(0, CONFIG["vocab_size"], num_tokens),
            trains_N=trains_N,
            sampler_logprobs_N=-4 * generator.random(num_tokens, np.float32) * trains_N,
            advantages_N=generator.normal(size=num_tokens).astype(np.float32) * trains_N,
        )

    return build
