"""gymnasium's environments as text games: the policy reads what they render and answers with the name of an action."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from hone.envs.bridges import BridgeError
from hone.envs.gym import GymEnvironment
from hone.schema.tasks import Task

DEFAULT_STEPS = 100
HIGHLIGHT = re.compile("\x1b\\[[0-9;]*4[0-9]m(.*?)\x1b\\[0m", re.DOTALL)
"""A background colour, with which the toy games show where the player is."""
COLOUR = re.compile("\x1b\\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class _Toy:
    """What gymnasium's documentation says of a toy game and its code does not."""

    actions: tuple[str, ...]
    show: Callable[[Any], str] | None = None


def _blackjack(observation: Any) -> str:
    hand, dealer, ace = (int(value) for value in observation)
    return f"Your hand is worth {hand}{' with a usable ace' if ace else ''}, the dealer shows {dealer}."


TOYS = {
    "FrozenLake": _Toy(("left", "down", "right", "up")),
    "FrozenLake8x8": _Toy(("left", "down", "right", "up")),
    "CliffWalking": _Toy(("up", "right", "down", "left")),
    "Taxi": _Toy(("south", "north", "east", "west", "pickup", "dropoff")),
    "Blackjack": _Toy(("stick", "hit"), _blackjack),
}


def load_environment(
    game: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    actions: Mapping[str, int] | None = None,
    show: Callable[[Any], str] | None = None,
    instructions: str | None = None,
    max_steps: int | None = None,
    num_held_out: int = 100,
) -> GymEnvironment:
    """A registered gymnasium environment with a discrete action space; the reward is the sum of its steps' rewards.

    game: its id, such as FrozenLake-v1. arguments: of `gymnasium.make`. actions: their names; default: those of the toy
    games, numbers elsewhere. show: an observation to text; default: what the game renders, else the observation itself.
    instructions: a system message; default: one that lists the actions. max_steps: turns of the policy; default: the
    game's own limit.

    Each seed is a task, and the first `num_held_out` seeds are held out.
    """
    given = dict(arguments or {})
    first = _make(game, given)
    toy = TOYS.get(first.spec.name, _Toy(()))
    names = _names(game, first.action_space, toy, actions)
    renders = show is None and toy.show is None and "ansi" in first.metadata.get("render_modes", ())
    limit = max_steps or first.spec.max_episode_steps or DEFAULT_STEPS
    first.close()
    if renders:
        given["render_mode"] = "ansi"

    def make(task: Task) -> Any:
        made = _make(game, given)
        return _Rendered(made) if renders else made

    return GymEnvironment(
        name="gymnasium",
        version=metadata.version("gymnasium"),
        make=make,
        parse=lambda answer: _parse(answer, names),
        show=show or toy.show or str,
        instructions=instructions or f"You play {game}. Answer with one of these actions: {', '.join(names)}.",
        max_steps=limit,
        num_held_out=num_held_out,
    )


class _Rendered:
    """A game whose observation is what it renders."""

    def __init__(self, game: Any) -> None:
        self._game = game

    def reset(self, *, seed: int) -> str:
        self._game.reset(seed=seed)
        return self._text()

    def step(self, action: int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        _, reward, terminated, truncated, info = self._game.step(action)
        return self._text(), reward, terminated, truncated, info

    def close(self) -> None:
        self._game.close()

    def _text(self) -> str:
        return COLOUR.sub("", HIGHLIGHT.sub(r"[\1]", self._game.render())).strip()


def _make(game: str, arguments: Mapping[str, Any]) -> Any:
    try:
        import gymnasium  # an extra
    except ImportError as error:
        raise BridgeError("gymnasium is not installed: pip install 'hone[gymnasium]'") from error
    try:
        return gymnasium.make(game, **arguments)
    except (gymnasium.error.Error, TypeError, ValueError, ImportError) as error:
        raise BridgeError(f"gymnasium cannot make {game!r} with {dict(arguments)}: {error}") from error


def _names(game: str, space: Any, toy: _Toy, given: Mapping[str, int] | None) -> dict[str, int]:
    import gymnasium  # an extra, and imported by now

    if not isinstance(space, gymnasium.spaces.Discrete):
        raise BridgeError(f"gymnasium's {game} has the actions {space}; only a discrete space can be named in text")
    numbers = range(int(space.start), int(space.start + space.n))
    if given is not None:
        unknown = [name for name, number in given.items() if number not in numbers]
        if unknown or not given:
            raise BridgeError(
                f"gymnasium's {game} has the actions {numbers.start} to {numbers.stop - 1}; {dict(given)} names others"
            )
        return {name.lower(): number for name, number in given.items()}
    if len(toy.actions) == len(numbers):
        return dict(zip(toy.actions, numbers, strict=True))
    return {str(number): number for number in numbers}


def _parse(answer: str, names: Mapping[str, int]) -> int:
    """The action that is named last."""
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    found = re.findall(rf"(?<![\w-])(?:{alternatives})(?!\w)", answer.lower())
    if not found:
        raise ValueError(f"name one of {', '.join(names)}")
    return names[found[-1]]
