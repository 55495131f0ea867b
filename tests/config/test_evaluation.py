"""Evaluation files: what is accepted, what is refused with which words, and how they are told from recipes."""

from pathlib import Path
from typing import Any

import pytest

from hone.config.evaluation import EvaluationFile
from hone.config.load import ConfigError, load_evaluated, save_recipe
from hone.config.recipe import Recipe

FILE = """
[run]
name = "math"
[evaluation]
num_tasks = 32
sampling = { temperature = 0.6, max_tokens = 100 }
[[environments]]
name = "reverse_text"
[[environments]]
name = "reverse_text"
label = "long"
arguments = { min_words = 3 }
num_attempts = 8
sampling = { max_tokens = 1000 }
[[models]]
name = "ours"
path = "runs/demo/export"
[[models]]
name = "theirs"
address = "https://api.example.com/v1"
model = "some-model"
api_key_variable = "EXAMPLE_KEY"
prices = { prompt = 1.0, completion = 2.5 }
"""


def load(tmp_path: Path, text: str = FILE, *overrides: str) -> Any:
    path = tmp_path / "file.toml"
    path.write_text(text)
    return load_evaluated(path, overrides)


def test_an_evaluation_file_is_known_by_its_models(tmp_path: Path) -> None:
    tree = load(tmp_path)
    assert isinstance(tree, EvaluationFile)
    assert tree.folder == Path("evals/math")
    assert [environment.shown for environment in tree.environments] == ["reverse_text", "long"]


def test_a_recipe_is_known_by_its_model(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, '[model]\npath = "somewhere"'), Recipe)


def test_an_environment_overrides_single_fields_of_the_sampling(tmp_path: Path) -> None:
    tree = load(tmp_path)
    first, second = (tree.sampling_of(environment) for environment in tree.environments)
    assert (first.temperature, first.max_tokens) == (0.6, 100)
    assert (second.temperature, second.max_tokens) == (0.6, 1000)


def test_fields_are_overridden_by_their_path(tmp_path: Path) -> None:
    tree = load(tmp_path, FILE, "--evaluation.num_attempts=4", "--models.0.path=other", "--run.seed=7")
    assert (tree.evaluation.num_attempts, tree.models[0].path, tree.run.seed) == (4, Path("other"), 7)


def test_a_saved_file_is_loaded_again(tmp_path: Path) -> None:
    tree = load(tmp_path)
    save_recipe(tree, tmp_path / "saved.toml")
    assert load_evaluated(tmp_path / "saved.toml") == tree


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("[run]\nname = 'x'", "neither a recipe, which has a [model], nor an evaluation file"),
        ("[model]\npath = 'x'\n[[models]]\nname = 'x'", "has [model] and [[models]]"),
        (FILE.replace("num_tasks", "num_task"), "unknown field evaluation.num_task; did you mean num_tasks?"),
        (FILE.replace('path = "runs/demo/export"', ""), "model 'ours' has neither recipe, path nor address"),
        (FILE.replace('model = "some-model"', 'path = "x"'), "model 'theirs' has path and address"),
        (FILE.replace('path = "runs/demo/export"', 'path = "x"\nmodel = "y"'), "model has no effect without address"),
        (FILE.replace("https://", "ftp://"), "begins with neither http:// nor https://"),
        (FILE.replace('label = "long"', ""), "environment 'reverse_text' is listed twice; give one a label"),
        (FILE.replace('"theirs"', '"ours"'), "model 'ours' is listed twice"),
        (FILE.replace('"theirs"', '"../theirs"'), "model '../theirs' is no name for a folder"),
        (FILE.replace('"long"', '".servers"'), "environment '.servers' is no name for a folder"),
        ("[[models]]\nname = 'm'\naddress = 'http://a'", "environments"),
        ("models = []\n[[environments]]\nname = 'e'", "models"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, text: str, phrase: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text)
    assert phrase in str(refused.value)


def test_the_file_in_the_guide_is_one(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "evaluate.md").read_text()
    tree = load(tmp_path, guide.partition("```toml\n")[2].partition("```")[0])
    assert [model.name for model in tree.models] == ["ours", "base", "theirs"]
