import gzip
import json

import pytest

from hone.envs import Rubric, SingleTurn, Task, play, reward, user
from hone.envs.verifiers.match import is_choice, is_close, is_exact, is_final_answer, is_same_grid, is_same_text
from public_data import ABSENT, DATA


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("yes", "yes", True),
        (" yes\n", "yes", True),
        ("Yes", "yes", False),
        ("", "yes", False),
        ("yes yes", "yes", False),
    ],
)
def test_exact_answers(answer, reference, expected):
    assert is_exact(answer, reference) is expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", True),
        ("  an   APPLE ", "Apple.", True),
        ("\uff21pple", "apple", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("eiffel", "eiffel tower", False),
        ("theory", "ory", False),
        ("the", "eiffel tower", False),
        ("", "eiffel tower", False),
    ],
)
def test_answers_that_are_the_same_text(answer, reference, expected):
    assert is_same_text(answer, reference) is expected


@pytest.mark.parametrize("verify", [is_exact, is_same_text])
@pytest.mark.parametrize("reference", ["", " \n"])
def test_an_empty_reference_is_refused(verify, reference):
    with pytest.raises(ValueError, match="is empty"):
        verify("", reference)


def test_choices():
    assert is_choice("The answer is (B).", "B")
    assert is_choice("b", "(B)")
    assert not is_choice("The answer is A or B", "B")
    assert not is_choice("A cat", "A")
    assert is_choice("Answer: J", "J", letters="ABCDEFGHIJ")
    with pytest.raises(ValueError, match="none of the letters ABCD"):
        is_choice("E", "E")


@pytest.mark.parametrize(
    ("answer", "reference", "tolerance", "expected"),
    [
        ("so 18 dollars", "#### 18", {}, True),
        ("17 or 19", "18", {}, False),
        ("0.5", "1/2", {}, True),
        ("1,000.0", "1000", {}, True),
        ("3.14", "3.14159", {}, False),
        ("3.14", "3.14159", {"absolute": 0.01}, True),
        ("990", "1000", {"relative": 0.01}, True),
        ("989", "1000", {"relative": 0.01}, False),
        ("-18", "18", {}, False),
        ("0.1", "0.3", {"absolute": 0.2}, True),
        ("10000000000000001", "10000000000000000", {}, False),
        ("", "18", {}, False),
        ("no idea", "18", {}, False),
    ],
)
def test_numbers_with_tolerance(answer, reference, tolerance, expected):
    assert is_close(answer, reference, **tolerance) is expected


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(ValueError, match="has no number"):
        is_close("18", "many")


async def test_a_verifier_is_declared_as_a_reward_as_it_is():
    task = Task(prompt=(user("2 + 2?"),), reference="4")
    environment = SingleTurn(name="sum", rubric=Rubric([reward(is_close)]), train=[task])
    assert (await play(environment, task, "it is 4")).rewards["is_close"].value == 1
    assert (await play(environment, task, "it is 5")).reward == 0


def test_gold_answers_of_big_bench_hard_are_right_and_others_wrong():
    paths = sorted((DATA / "bbh").glob("*.json"))
    if not paths:
        pytest.skip(ABSENT)
    for path in paths:
        targets = [example["target"] for example in json.loads(path.read_text())["examples"]]
        for target, other in zip(targets, [*targets[1:], targets[0]], strict=True):
            assert is_final_answer(f"Let us see.\nSo the answer is {target}.", target)
            assert is_final_answer(f"Hm.\n{target}", target)
            assert is_final_answer(f"So the answer is {other}.", target) is (other == target)
            assert not is_final_answer("", target)


def test_gold_grids_of_arc_are_right_and_changed_ones_wrong():
    path = DATA / "arc_agi_1" / "training.json.gz"
    if not path.exists():
        pytest.skip(f"the public data is not at {path}")
    puzzles = json.loads(gzip.decompress(path.read_bytes()))
    for puzzle in puzzles.values():
        output = puzzle["test"][0]["output"]
        reference = json.dumps(output)
        assert is_same_grid(f"I think:\n{reference}", reference)
        assert is_same_grid("\n".join(" ".join(map(str, row)) for row in output), reference)
        changed = [[(output[0][0] + 1) % 10, *output[0][1:]], *output[1:]]
        assert not is_same_grid(json.dumps(changed), reference)
        assert not is_same_grid("", reference)


def test_a_reference_that_is_no_grid_is_refused():
    with pytest.raises(ValueError, match="is no grid"):
        is_same_grid("[[1]]", "one")
