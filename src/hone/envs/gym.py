"""Gym-style environments as conversations: the policy reads observations, and its answers are actions."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from hone.envs.blocking import call_blocking
from hone.envs.environment import Environment
from hone.envs.failures import deadline, failures_as
from hone.envs.messages import system, user
from hone.envs.rollout import Rollout
from hone.envs.rubric import Measure, Rubric, metric, reward
from hone.envs.sources import Tasks
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, StopReason

SEED = "seed"
"""Where a task's info has the seed of its episode."""


@dataclass(slots=True)
class Episode:
    """One game under way, the `state` of its rollout.

    game: what `make` made. rewards: of each step so far. is_cut: the game itself has ended the episode for its length.
    """

    game: Any
    observation: str = ""
    rewards: list[float] = field(default_factory=list)
    num_invalid_actions: int = 0
    is_over: bool = False
    is_cut: bool = False


class GymEnvironment(Environment):
    """Plays an object with `reset(seed=...)` and `step(action)`, a new one for each rollout.

    make: the object for a task; `reset` gives an observation, or one and an info; `step` gives the 4-tuple of old gym
    or the 5-tuple of gymnasium; both may be async, and `close` is called if there is one.
    parse: what the policy says to an action; a ValueError means that it is none, and its text is told to the policy.
    show: an observation to the text that the policy reads. instructions: a system message before the first one.
    max_steps: turns of the policy, those without a valid action included; an episode that needs more is truncated.
    returns: the episode's reward is the sum of the steps' rewards, or that of the last one.
    train, held_out: tasks with `info["seed"]`; by default `seeded_tasks`, the first `num_held_out` seeds held out.
    blocking: synchronous `reset` and `step` run in threads; False for those that take no time and do not wait.
    step_seconds: deadline of a step, a reset or a close; a late one is a failure of class timeout.
    measures: further rewards and metrics, which see the `Episode` as `state`.
    """

    def __init__(
        self,
        *,
        name: str,
        make: Callable[[Task], Any],
        parse: Callable[[str], Any],
        max_steps: int,
        show: Callable[[Any], str] = str,
        instructions: str | None = None,
        returns: Literal["sum", "last"] = "sum",
        train: Sequence[Task] | Tasks | None = None,
        held_out: Sequence[Task] | Tasks | None = None,
        num_held_out: int = 100,
        blocking: bool = True,
        step_seconds: float = 60.0,
        measures: Sequence[Measure] = (),
        version: str = "",
    ) -> None:
        if returns not in RETURNS:
            raise ValueError(f"environment {name!r}: returns {returns!r} is unknown; there are {', '.join(RETURNS)}")
        first = num_held_out if held_out is None else 0
        super().__init__(
            name=name,
            version=version,
            rubric=Rubric([RETURNS[returns], num_steps, num_invalid_actions, *measures]),
            train=seeded_tasks(instructions, start=first) if train is None else train,
            held_out=seeded_tasks(instructions, count=num_held_out) if held_out is None else held_out,
            max_turns=max_steps,
        )
        self._make = make
        self._parse = parse
        self._show = show
        self._blocking = blocking
        self._step_seconds = step_seconds

    async def setup(self, rollout: Rollout) -> None:
        """Make the game and begin the episode of the task's seed."""
        seed = rollout.task.info.get(SEED)
        if not isinstance(seed, int):
            raise ValueError(f"task {rollout.task.key} has no whole number under info[{SEED!r}]; use seeded_tasks")
        game = await self._call(functools.partial(self._make, rollout.task))
        rollout.state = episode = Episode(game)
        episode.observation = self._show(_observation(await self._call(functools.partial(game.reset, seed=seed))))

    async def run(self, rollout: Rollout) -> None:
        """Show the observation, take the action, until the game or the policy's turns are over."""
        episode: Episode = rollout.state
        rollout.append(user(episode.observation))
        while not episode.is_over:
            await rollout.turn()
            with failures_as(FailureClass.ENVIRONMENT, "step"):
                message = await self._act(episode, rollout.answer)
            rollout.append(user(message))
        if episode.is_cut:
            rollout.stop_reason = StopReason.MAX_TURNS

    async def teardown(self, rollout: Rollout) -> None:
        """Close the game, if it can be closed."""
        close = getattr(rollout.state.game, "close", None) if isinstance(rollout.state, Episode) else None
        if close is not None:
            await self._call(close)

    async def _act(self, episode: Episode, answer: str) -> str:
        """Take the policy's answer for an action; what it is told next."""
        try:
            action = self._parse(answer)
        except ValueError as error:
            episode.num_invalid_actions += 1
            return f"That is not a valid action: {error}"
        step = _step(await self._call(functools.partial(episode.game.step, action)))
        episode.rewards.append(step.reward)
        episode.is_over = step.terminated or step.truncated
        episode.is_cut = step.truncated and not step.terminated
        episode.observation = self._show(step.observation)
        return episode.observation

    async def _call(self, function: Callable[[], Any]) -> Any:
        if self._blocking and not inspect.iscoroutinefunction(function):
            result = await call_blocking(function, {}, self._step_seconds)
        else:
            result = function()
        if not inspect.isawaitable(result):
            return result
        async with deadline(self._step_seconds):
            return await result


def seeded_tasks(instructions: str | None = None, *, start: int = 0, count: int | None = None) -> Tasks:
    """One task for each seed from `start` on: an episode that begins the same each time."""
    prompt = () if instructions is None else (system(instructions),)
    return Tasks(lambda index: Task(prompt, info={SEED: start + index}), count)


@reward(name="episode")
def sum_of_rewards(state: Episode) -> float:
    """What all steps earned."""
    return sum(state.rewards)


@reward(name="episode")
def last_reward(state: Episode) -> float:
    """What the last step earned; 0 without a step."""
    return state.rewards[-1] if state.rewards else 0.0


@metric
def num_steps(state: Episode) -> int:
    """Actions that the game took."""
    return len(state.rewards)


@metric
def num_invalid_actions(state: Episode) -> int:
    """Answers that were no action."""
    return state.num_invalid_actions


RETURNS = {"sum": sum_of_rewards, "last": last_reward}


class _Step(NamedTuple):
    observation: Any
    reward: float
    terminated: bool
    truncated: bool


def _observation(result: Any) -> Any:
    is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
    return result[0] if is_pair else result


def _step(result: Any) -> _Step:
    if not isinstance(result, tuple) or len(result) not in (4, 5):
        raise TypeError(
            f"step returned {type(result).__name__}, not (observation, reward, terminated, truncated, info)"
        )
    observation, earned, terminated = result[:3]
    truncated = bool(result[3]) if len(result) == 5 else bool(result[3].get("TimeLimit.truncated", False))
    # Old gym sets both when its time limit ends the episode.
    is_terminated = bool(terminated) and not (len(result) == 4 and truncated)
    return _Step(observation, float(earned), is_terminated, truncated)
