"""reasoning-gym as an environment: its sound data sets work, its broken scorers are refused with what they do."""

import pytest

from hone.envs import check_gold, play
from hone.envs.bridges import BridgeError

reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra")

from hone.envs.bridges.reasoning_gym import flaws, load_environment  # noqa: E402 - after the skip


async def test_a_data_set_is_an_environment_whose_gold_answers_are_right_and_others_not():
    environment = load_environment(["leg_counting", "caesar_cipher"], size=20)
    assert environment.num_train_tasks + environment.num_held_out_tasks == 40
    for index in range(0, 30, 6):
        task = environment.train_task(index)
        assert (await check_gold(environment, task)).reward == 1.0
        for answer in ("", task.reference, "<answer></answer>", "<answer>no idea</answer>"):
            assert (await play(environment, task, answer)).reward < 1.0
        assert (await play(environment, task, f"<answer>1</answer> or <answer>{task.reference}</answer>")).reward == 1.0


def test_the_tasks_are_the_same_whenever_they_are_made_and_no_question_is_on_both_sides():
    first, again = load_environment("chain_sum", size=50), load_environment("chain_sum", size=50)
    assert [first.train_task(n) for n in range(9, -1, -1)] == [again.train_task(n) for n in range(9, -1, -1)]
    held_out = {first.held_out_task(n).prompt[-1].content for n in range(first.num_held_out_tasks)}
    assert not held_out & {first.train_task(n).prompt[-1].content for n in range(first.num_train_tasks)}
    other = load_environment("chain_sum", size=50, seed=1)
    assert other.train_task(0) != first.train_task(0)


def test_a_data_sets_own_arguments_reach_it():
    environment = load_environment("chain_sum", size=5, configs={"chain_sum": {"min_terms": 7, "max_terms": 7}})
    assert (
        environment.train_task(0).prompt[-1].content.count("+")
        + environment.train_task(0).prompt[-1].content.count("-")
        >= 6
    )


async def test_a_task_of_other_arguments_is_a_failure_and_not_a_wrong_score():
    task = load_environment("chain_sum", size=5, seed=1).train_task(0)
    trace = await play(load_environment("chain_sum", size=5), task, f"<answer>{task.reference}</answer>")
    assert "is another one here: its arguments differ" in trace.failure.message


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("coin_flip", "'0' earns full marks for"),
        ("complex_arithmetic", "'nan' earns full marks for 15 of 15"),
        ("game_of_life_halting", "'I do not know.' earns full marks for 15 of 15"),
        ("puzzle24", "the answer to another question earns full marks for"),
        ("graph_color", "15 of 15 questions have no answer that could be checked"),
        ("prime_factorization", "its scorer raises on an answer that a policy may give: ValueError"),
    ],
)
def test_a_scorer_that_cannot_tell_right_from_wrong_is_refused(name, complaint):
    with pytest.raises(BridgeError, match="do not tell right from wrong") as refusal:
        load_environment(["leg_counting", name], size=20)
    assert f"  {name}: " in str(refusal.value)
    assert complaint in str(refusal.value)
    assert "leg_counting" not in str(refusal.value)


@pytest.mark.parametrize("name", ["calendar_arithmetic", "n_queens", "leg_counting", "countdown", "word_sorting"])
def test_a_sound_scorer_has_no_flaws(name):
    assert flaws(reasoning_gym.create_dataset(name, size=15, seed=3)) == []


def test_a_data_set_that_does_not_exist_or_cannot_be_made_is_named():
    with pytest.raises(BridgeError, match=r"no data set 'chess'; it has ab, acre"):
        load_environment("chess")
    with pytest.raises(BridgeError, match=r"chain_sum cannot be made with \{'colour': 'red'\}"):
        load_environment("chain_sum", configs={"chain_sum": {"colour": "red"}})
