"""The documentation of the configuration: complete, true, and the page in docs/ is what the models say."""

from pathlib import Path

import pytest

from hone.config.explain import PAGES, FieldDescription, explain, reference_page
from hone.config.recipe import Recipe

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def only(path: str) -> FieldDescription:
    (found,) = explain(path)
    return found


@pytest.mark.parametrize("field", explain(), ids=lambda field: field.path)
def test_every_field_says_what_it_means(field: FieldDescription) -> None:
    assert field.meaning.endswith(".")
    assert len(field.meaning) > 10
    assert field.default or field.is_section


def test_every_section_of_a_recipe_is_there() -> None:
    assert {field.path.split(".")[0] for field in explain()} == set(Recipe.model_fields)


def test_a_path_is_listed_once() -> None:
    paths = [field.path for field in explain()]
    assert len(set(paths)) == len(paths)


def test_limits_types_and_defaults_are_those_of_the_models() -> None:
    size = only("rl.group_size")
    assert (size.type, size.default, size.constraints) == ("integer", "8", "≥ 2")
    momentum = only("sft.optimizer.momentum")
    assert (momentum.type, momentum.default, momentum.constraints) == ("number", "none", "≥ 0, < 1")
    assert only("environments.0.name").default == "required"
    assert only("model.dtype").type == '"float32" or "bfloat16"'
    assert only("run.folder").default == '"runs"'
    assert only("sft.optimizer.betas").default == "[0.9, 0.95]"


def test_a_default_that_the_parent_gives_is_shown() -> None:
    assert only("rl.optimizer.lr").default == "1e-06"
    assert only("sft.optimizer.lr").default == "0.0001"


def test_a_prefix_gives_its_section_and_nothing_else() -> None:
    assert [field.path for field in explain("rl.sampling")][:2] == ["rl.sampling", "rl.sampling.temperature"]
    assert all(field.path.startswith("rl.sampling") for field in explain("rl.sampling"))
    assert [field.path for field in explain("environments.3.weight")] == ["environments.N.weight"]
    assert {field.path.split(".")[0] for field in explain("rl")} == {"rl"}


def test_a_path_that_leads_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no field or section 'rl\.magic'.*sections are run, model"):
        explain("rl.magic")


def test_fields_of_evaluation_files_are_explained() -> None:
    assert only("evaluation.num_attempts").default == "1"
    assert only("models.0.prices.prompt").default == "required"


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_in_the_documentation_are_up_to_date(name: str) -> None:
    assert (REFERENCE / name).read_text() == reference_page(name), "run `make docs`"
