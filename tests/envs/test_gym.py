"""Gym-style games as rollouts: both kinds of step, sync or async, and what goes wrong in them."""

import asyncio
import threading
import time

import pytest

from fakes import ScriptedSampler
from hone.envs import GymEnvironment, Limits, SamplingParameters, Task, metric, play, run_group, user
from hone.schema.traces import FailureClass, StopReason


class Countdown:
    """Say 1 or 2 until nothing is left; the seed says how much there is. Each step earns what it took."""

    def __init__(self):
        self.left = 0
        self.is_closed = False
        self.threads = set()

    def reset(self, seed):
        self.left = seed
        return self.left, {"seed": seed}

    def step(self, action):
        self.threads.add(threading.current_thread())
        self.left -= action
        return self.left, float(action), self.left <= 0, False, {}

    def close(self):
        self.is_closed = True


class OldCountdown(Countdown):
    def reset(self, seed):
        return super().reset(seed)[0]

    def step(self, action):
        return (*super().step(action)[:3], {})


class AsyncCountdown(Countdown):
    async def reset(self, seed):
        await asyncio.sleep(0)
        return super().reset(seed)

    async def step(self, action):
        await asyncio.sleep(0)
        return super().step(action)


def one_or_two(answer):
    if answer not in ("1", "2"):
        raise ValueError(f"{answer!r} is neither 1 nor 2")
    return int(answer)


def environment(game=Countdown, **changes):
    games = []

    def make(task):
        games.append(game())
        return games[-1]

    made = GymEnvironment(name="countdown", **{"make": make, "parse": one_or_two, "max_steps": 5} | changes)
    made.games = games
    return made


def task(seed=3):
    return Task(prompt=(), info={"seed": seed})


def contents(trace):
    return [message.content for message in trace.messages]


@pytest.mark.parametrize("game", [Countdown, OldCountdown, AsyncCountdown])
@pytest.mark.parametrize("blocking", [True, False])
async def test_an_episode_is_a_conversation(game, blocking):
    trace = await play(environment(game, blocking=blocking), task(), "1", "2")
    assert trace.failure is None
    assert contents(trace) == ["3", "1", "2", "2", "0"]
    assert [message.role for message in trace.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert (trace.reward, trace.stop_reason) == (3.0, StopReason.COMPLETED)
    assert trace.metrics == {"num_steps": 2, "num_invalid_actions": 0}


async def test_the_reward_may_be_that_of_the_last_step():
    assert (await play(environment(returns="last"), task(), "1", "2")).reward == 2.0
    assert (await play(environment(returns="last", max_steps=1), task(), "?")).reward == 0.0


async def test_an_answer_that_is_no_action_is_told_and_costs_a_turn():
    trace = await play(environment(), task(), "three", "2", "1")
    assert contents(trace)[:4] == ["3", "three", "That is not a valid action: 'three' is neither 1 nor 2", "2"]
    assert trace.metrics == {"num_steps": 2, "num_invalid_actions": 1}


async def test_too_many_steps_truncate_the_episode():
    trace = await play(environment(max_steps=2), task(10), "1", "1")
    assert trace.failure is None
    assert (trace.stop_reason, trace.is_truncated, trace.reward) == (StopReason.MAX_TURNS, True, 2.0)


@pytest.mark.parametrize("result", [(0, 1.0, False, True, {}), (0, 1.0, True, {"TimeLimit.truncated": True})])
async def test_a_game_that_ends_for_its_length_is_truncated_too(result):
    class Short(Countdown):
        def step(self, action):
            return result

    trace = await play(environment(Short), task(), "1")
    assert (trace.stop_reason, trace.reward) == (StopReason.MAX_TURNS, 1.0)


async def test_observations_are_shown_and_instructions_come_first():
    made = environment(show=lambda left: f"{left} left", instructions="Take 1 or 2.", num_held_out=3)
    trace = await play(made, made.train_task(0), "2", "1")
    assert contents(trace)[:2] == ["Take 1 or 2.", "3 left"]


def test_seeds_are_tasks_and_no_held_out_one_is_trained():
    made = environment(num_held_out=3)
    assert made.num_held_out_tasks == 3
    assert made.num_train_tasks is None
    assert [made.held_out_task(n).info for n in range(3)] == [{"seed": n} for n in range(3)]
    assert made.train_task(0).info == {"seed": 3}


async def test_further_measures_see_the_episode():
    @metric
    def left(state):
        return state.game.left

    trace = await play(environment(measures=[left]), task(), "2", "2")
    assert trace.metrics["left"] == -1


async def test_every_rollout_has_its_own_game_which_is_closed_also_after_a_failure():
    made = environment()
    await run_group(made, task(), range(4), ScriptedSampler(["1"]), SamplingParameters(), 0)
    await play(made, task())
    assert len(made.games) == 5
    assert all(game.is_closed for game in made.games)


async def test_blocking_steps_leave_the_event_loop_alone_and_may_be_kept_on_it():
    made = environment()
    await play(made, task(), "1", "2")
    assert threading.current_thread() not in made.games[0].threads
    made = environment(blocking=False)
    await play(made, task(), "1", "2")
    assert made.games[0].threads == {threading.current_thread()}


class Late(Countdown):
    def step(self, action):
        time.sleep(0.5)
        return super().step(action)


class AsyncLate(Countdown):
    async def step(self, action):
        await asyncio.sleep(60)


@pytest.mark.parametrize("game", [Late, AsyncLate])
async def test_a_step_that_hangs_is_a_timeout(game):
    trace = await play(environment(game, step_seconds=0.05), task(), "1")
    assert (trace.failure.kind, trace.failure.where) == (FailureClass.TIMEOUT, "step")


def broken_step(result):
    class Broken(Countdown):
        def step(self, action):
            if isinstance(result, Exception):
                raise result
            return result

    return Broken


@pytest.mark.parametrize(
    ("game", "complaint"),
    [
        (broken_step(RuntimeError("the board fell")), "RuntimeError: the board fell"),
        (broken_step(ValueError("not for the policy")), "ValueError: not for the policy"),
        (broken_step(None), "step returned NoneType"),
        (broken_step((1, 2.0)), "step returned tuple"),
        (broken_step((1, "much", False, False, {})), "could not convert"),
    ],
)
async def test_a_broken_step_is_a_failure_of_the_environment_and_never_a_reward(game, complaint):
    trace = await play(environment(game), task(), "1")
    assert trace.failure.kind is FailureClass.ENVIRONMENT
    assert complaint in trace.failure.message
    assert trace.rewards == {}


async def test_a_reward_that_is_not_finite_is_a_failure():
    trace = await play(environment(broken_step((0, float("nan"), True, False, {}))), task(), "1")
    assert trace.failure.kind is FailureClass.ENVIRONMENT


async def test_a_game_that_cannot_begin_is_a_failure_of_the_setup():
    class Broken(Countdown):
        def reset(self, seed):
            raise OSError("no such level")

    trace = await play(environment(Broken), task())
    assert (trace.failure.kind, trace.failure.where) == (FailureClass.ENVIRONMENT, "setup")
    trace = await play(environment(), Task(prompt=(user("Go"),)))
    assert "no whole number under info['seed']" in trace.failure.message


async def test_the_deadline_of_the_rollout_holds_during_a_step():
    made = environment(AsyncLate)
    [trace] = await run_group(
        made, task(), [0], ScriptedSampler(["1"]), SamplingParameters(), 0, Limits(deadline_seconds=0.1)
    )
    assert trace.failure.kind is FailureClass.TIMEOUT
    assert made.games[0].is_closed
