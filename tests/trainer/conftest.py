"""A tiny mixture of experts, random samples, and a trainer around them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hone.config.load import recipe_from, save_recipe
from hone.config.recipe import OptimizerSection
from hone.model.checkpoint import save_model
from hone.model.families import ModelConfig
from hone.model.transformer import Transformer
from hone.text.training import train_tokenizer
from hone.trainer.optim import build_optimizers
from hone.trainer.ranks import Ranks
from hone.trainer.samples import Samples
from hone.trainer.step import Trainer
from hone.transport.folders import RunFolder

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


WORDS = ["abc", "bcd", "cda", "dab", "acbd", "bdac", "ccd", "aab"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., RunFolder]:
    """A run's folder with a recipe, a tiny model with its tokenizer, and 40 conversations."""

    def build(name: str = "run", **sections: dict[str, Any]) -> RunFolder:
        folder = RunFolder(tmp_path / name)
        tokenizer = train_tokenizer(WORDS, None, chat_template="chatml", alphabet="seen")
        tokenizer.save(tmp_path / "tokenizer")
        config = ModelConfig.from_hugging_face(CONFIG | {"vocab_size": tokenizer.vocab_size})
        save_model(Transformer(config).initialize(seed=3), config, folder.model, tokenizer_from=tmp_path / "tokenizer")
        write_conversations(tmp_path / "data.jsonl")
        save_recipe(recipe_from(recipe_tree(tmp_path, name, sections), "test"), folder.config)
        return folder

    return build


def recipe_tree(path: Path, name: str, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "run": {"name": name, "folder": str(path)},
        "model": {"path": "base", "device": "cpu"},
        "environments": [{"name": "reverse_text"}],
        "trainer": {"micro_batch_tokens": 128},
        "sft": {"data": str(path / "data.jsonl"), "batch_tokens": 200, "optimizer": {"lr": 5e-3}},
        "rl": {"batch_size": 4, "group_size": 2, "optimizer": {"lr": 1e-3}},
    }
    for section, values in sections.items():
        tree[section] = tree[section] | values
    return tree


def write_conversations(path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}]}
        for word in WORDS * 5
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
