"""gymnasium's toy games, played in text."""

import pytest

from hone.envs import play
from hone.envs.bridges import BridgeError
from hone.schema.traces import StopReason

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is an extra")

from hone.envs.bridges.gymnasium import load_environment  # noqa: E402 - after the skip

WAY_TO_THE_GOAL = ["down", "down", "right", "right", "down", "right"]


@pytest.fixture
def lake():
    return load_environment("FrozenLake-v1", arguments={"is_slippery": False})


async def test_a_walk_over_the_frozen_lake_reaches_the_goal(lake):
    trace = await play(lake, lake.train_task(0), *WAY_TO_THE_GOAL)
    assert trace.failure is None
    assert (trace.reward, trace.stop_reason) == (1.0, StopReason.COMPLETED)
    contents = [message.content for message in trace.messages]
    assert contents[0] == "You play FrozenLake-v1. Answer with one of these actions: left, down, right, up."
    assert contents[1] == "[S]FFF\nFHFH\nFFFH\nHFFG"
    assert contents[3] == "(Down)\nSFFF\n[F]HFH\nFFFH\nHFFG"


async def test_a_hole_ends_the_walk_without_reward(lake):
    trace = await play(lake, lake.train_task(0), "I go down.", "Not up, but RIGHT")
    assert (trace.reward, trace.stop_reason, trace.metrics["num_steps"]) == (0.0, StopReason.COMPLETED, 2)


async def test_an_answer_without_an_action_is_told_the_actions(lake):
    trace = await play(lake, lake.train_task(0), "upwards and downright", *WAY_TO_THE_GOAL)
    assert trace.messages[3].content == "That is not a valid action: name one of left, down, right, up"
    assert trace.metrics["num_invalid_actions"] == 1


async def test_the_same_task_is_the_same_game_and_others_are_not():
    blackjack = load_environment("Blackjack-v1", num_held_out=5)
    begins = []
    for task in [*map(blackjack.train_task, range(8)), *map(blackjack.train_task, range(8))]:
        trace = await play(blackjack, task, "stick")
        assert trace.reward in (-1.0, 0.0, 1.0)
        begins.append((trace.messages[1].content, trace.reward))
    assert begins[:8] == begins[8:]
    assert len(set(begins)) > 3
    assert begins[0][0].startswith("Your hand is worth ")


async def test_the_games_own_limit_truncates():
    game = load_environment("CliffWalking-v1", max_steps=3)
    trace = await play(game, game.train_task(0), "up", "up", "up")
    assert (trace.reward, trace.stop_reason) == (-3.0, StopReason.MAX_TURNS)


async def test_actions_may_have_other_names():
    game = load_environment("FrozenLake-v1", arguments={"is_slippery": False}, actions={"South": 1, "East": 2})
    trace = await play(game, game.train_task(0), "south", "south", "east", "east", "south", "east")
    assert trace.reward == 1.0


@pytest.mark.parametrize(
    ("game", "changes", "complaint"),
    [
        ("Chess-v1", {}, "gymnasium cannot make 'Chess-v1'"),
        ("Pendulum-v1", {}, "only a discrete space"),
        ("FrozenLake-v1", {"actions": {"jump": 4}}, "has the actions 0 to 3"),
        ("FrozenLake-v1", {"arguments": {"colour": "red"}}, "cannot make 'FrozenLake-v1' with {'colour': 'red'}"),
    ],
)
def test_what_is_no_text_game_is_refused(game, changes, complaint):
    with pytest.raises(BridgeError) as refusal:
        load_environment(game, **changes)
    assert complaint in str(refusal.value)
