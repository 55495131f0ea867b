import sys
from pathlib import Path

import pytest
import torch

from hone.model.families import ModelConfig
from hone.model.transformer import Transformer

sys.path.append(str(Path(__file__).parent))  # for served.py: tests are no package

CONFIG = {
    "model_type": "glm4_moe",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 1,
}


def make_model(seed: int = 0) -> Transformer:
    return Transformer(ModelConfig.from_hugging_face(CONFIG)).initialize(seed)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Transformer:
    return make_model()
