"""What is refused before any work, although the recipe by itself is in order."""

from pathlib import Path
from typing import Any

import pytest

from hone.config.load import ConfigError, recipe_from
from hone.config.recipe import Recipe
from hone.launch.preflight import preflight

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def recipe(folder: Path, **environment: Any) -> Recipe:
    tree = {
        "run": {"folder": str(folder), "name": "x"},
        "model": {"config": {"model_type": "qwen3"} | SIZES},
        "tokenizer": {"vocab_size": 64, "chat_template": "chatml"},
        "environments": [environment],
        "rl": {},
    }
    return recipe_from(tree, "test")


@pytest.mark.parametrize("section", ["pools", "curriculum"])
def test_pools_and_curricula_are_for_environments_that_can_have_them(tmp_path: Path, section: str) -> None:
    preflight(recipe(tmp_path, name="arithmetic", arguments={"num_train_tasks": 50}, **{section: {}}))
    with pytest.raises(ConfigError, match=rf"environments.{section} of 'arithmetic': its train tasks are endless"):
        preflight(recipe(tmp_path, name="arithmetic", **{section: {}}))


def test_a_curriculum_needs_an_environment_that_tells_difficulties(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the environment declares no difficulty"):
        preflight(recipe(tmp_path, name="reverse_text", curriculum={}))
