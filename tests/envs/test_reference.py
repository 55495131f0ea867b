"""The reference of the library: nothing is missing, nothing is unexplained, and the page in docs/ is what the code says."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import hone.envs
from hone.config.public_names import Entry, Part
from hone.envs.reference import PAGE, PARTS

ROOT = Path(__file__).parents[2]
EVERYTHING = [entry for part in PARTS for entry in PAGE.entries(part)]

# What authors have no use for: workers, processes and their protocols, the commands' own machinery.
INTERNAL = {
    *(
        "attacks",
        "attempts",
        "blocking",
        "fingerprint",
        "guest_processes",
        "guest_sessions",
        "isolated",
        "isolation",
        "leftovers",
    ),
    *(
        "local_files",
        "local_programs",
        "local_spawner",
        "pacing",
        "permutation",
        "reference",
        "relay",
        "retries",
        "runner",
        "scaffold",
        "stalls",
        "worker",
    ),
    *("harness.anthropic_messages", "harness.dialect", "harness.matching", "harness.openai_chat"),
    *("harness.openai_responses", "harness.proxy", "harness.recorder", "bridges.inspect_sandbox"),
    *("verifiers.assertions", "verifiers.budget", "verifiers.expressions"),
}


def only(name: str) -> Entry:
    (found,) = (entry for entry in EVERYTHING if entry.name == name)
    return found


def test_every_name_of_the_package_is_there_once() -> None:
    names = [entry.name for entry in EVERYTHING]
    assert len(names) == len(set(names))
    assert set(hone.envs.__all__) == {name for name in names if "." not in name}


def test_every_module_is_in_the_reference_or_internal() -> None:
    defining = {getattr(_resolved(entry.name), "__module__", None) or "" for entry in EVERYTHING}
    defining |= {entry.name.rpartition(".")[0] for entry in EVERYTHING}
    modules = {
        found.name.removeprefix("hone.envs.")
        for found in pkgutil.walk_packages(hone.envs.__path__, "hone.envs.")
        if not found.ispkg and not {"guests", "templates"} & set(found.name.split("."))
    }
    described = {name.removeprefix("hone.envs.") for name in defining}
    assert modules - described == INTERNAL


def _resolved(name: str) -> object:
    module, _, own_name = name.rpartition(".")
    return getattr(importlib.import_module(module or "hone.envs"), own_name)


@pytest.mark.parametrize("entry", EVERYTHING, ids=lambda entry: entry.name)
def test_every_name_and_what_it_has_is_explained(entry: Entry) -> None:
    assert entry.doc, "it needs a docstring"
    unexplained = [member.signature for member in entry.members if not member.doc]
    assert unexplained == []


def test_a_function_is_shown_as_it_is_called_and_its_parameters_as_a_list() -> None:
    columns = only("columns")
    assert columns.code.startswith("columns(\n    prompt: str,\n    reference: str | None = None,\n    *,\n")
    assert columns.code.endswith(") -> TaskOf")
    page = PAGE.text()
    assert "\n- `reference`: text or a number.\n" in page
    assert (
        "\n- `num_prompt_tokens`, `num_completion_tokens`, `num_cached_tokens`: as the endpoint counts them.\n" in page
    )


def test_overloads_are_shown_and_constants_by_their_values() -> None:
    assert only("reward").code.startswith(
        "reward(function: Function, /) -> Measure\nreward(\n    *,\n    weight: float"
    )
    assert "max_characters: int = 20000," in only("tool").code


def test_classes_show_what_they_are_made_with() -> None:
    assert only("SingleTurn").code == "class SingleTurn(Environment)"
    assert only("Limits").code.startswith("class Limits:\n    max_turns: int | None = None\n")
    assert 'MAX_TURNS = "max_turns"  # Truncated: the budget of turns is used up.' in only("StopReason").code
    assert [member.signature for member in only("Task").members] == ["key: str"]
    assert "duplicates() -> list[Duplicate]" in [member.signature for member in only("Tasks").members]


def test_examples_become_blocks_of_code() -> None:
    page = PAGE.text()
    assert "::\n" not in page
    assert "```python\n@reward\ndef exact(answer: str, reference: str) -> float:\n" in page
    assert '```toml\n[project.entry-points."hone.environments"]\n' in page


def test_a_name_that_is_not_there_is_noticed() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        PAGE.entries(Part("", "", ("no_such_name",)))


def test_the_page_in_the_documentation_is_up_to_date() -> None:
    assert (ROOT / "docs" / "reference" / PAGE.name).read_text() == PAGE.text(), "run `make docs`"
