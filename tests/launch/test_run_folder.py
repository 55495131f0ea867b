from pathlib import Path

import pytest

from hone.config.load import ConfigError, load_recipe, recipe_from
from hone.config.recipe import Recipe
from hone.launch.run_folder import claim


def recipe(folder: Path, **rl: object) -> Recipe:
    return recipe_from(
        {
            "run": {"folder": str(folder), "name": "x"},
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"vocab_size": 64, "chat_template": "chatml"},
            "environments": [{"name": "reverse_text"}],
            "rl": rl,
        },
        "test",
    )


def test_the_resolved_recipe_is_saved_with_the_run(tmp_path: Path) -> None:
    with claim(recipe(tmp_path)) as folder:
        assert load_recipe(folder / "config.toml") == recipe(tmp_path)


def test_two_launchers_cannot_hold_one_folder(tmp_path: Path) -> None:
    with claim(recipe(tmp_path)), pytest.raises(ConfigError, match="another process runs in"), claim(recipe(tmp_path)):
        pass


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with claim(recipe(tmp_path)):
        pass
    with pytest.raises(ConfigError, match=r"rl.group_size = 8, now it is 4"), claim(recipe(tmp_path, group_size=4)):
        pass


def test_a_run_may_be_made_longer(tmp_path: Path) -> None:
    with claim(recipe(tmp_path, num_steps=3)):
        pass
    with claim(recipe(tmp_path, num_steps=5)) as folder:
        assert load_recipe(folder / "config.toml").rl.num_steps == 5


def test_a_folder_that_cannot_be_made_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the run's folder"), claim(recipe(tmp_path / "file")):
        pass


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    with claim(given):
        pass
    reseeded = given.model_copy(update={"run": given.run.model_copy(update={"seed": 1})})
    with pytest.raises(ConfigError, match=r"run.seed = 0, now it is 1"), claim(reseeded):
        pass
