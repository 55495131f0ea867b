"""What an environment is: tasks, a rubric, and how a rollout goes on after each turn of the policy."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Required, TypedDict

from hone.envs.failures import failures_as
from hone.envs.rollout import Elsewhere, Rollout
from hone.envs.rubric import Rubric
from hone.envs.sources import Tasks, tasks_from
from hone.schema.messages import Message, ToolSpec
from hone.schema.remote import Loaded
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, Trace

WrongAnswer = str | Sequence[Message] | None
"""A text, said at every turn; messages, one a turn; None: leave the generic attack of this name out."""


class EnvironmentArguments(TypedDict, total=False):
    """What every kind of environment takes, with the meaning that `Environment` gives it, beside what is its own.

    A kind of your own passes it on::

        class Quiz(SingleTurn):
            def __init__(self, *, rounds: int, **common: Unpack[EnvironmentArguments]) -> None:
                super().__init__(**common)
                self.rounds = rounds
    """

    name: Required[str]
    rubric: Required[Rubric]
    train: Required[Sequence[Task] | Tasks]
    held_out: Sequence[Task] | Tasks
    version: str
    max_turns: int | None
    max_tool_calls: int | None
    gold: Callable[[Task], Sequence[Message]] | None
    difficulty: Callable[[Task], float] | None
    wrong: Callable[[Task], Mapping[str, WrongAnswer]] | None


class Environment(ABC):
    """Tasks, a rubric and the course of a rollout. One instance serves many rollouts at once.

    What belongs to one rollout is kept in `rollout.state`, never on the environment.

    name: as in recipes; version: filled from the installed package by `load_environment` when empty.
    train, held_out: lists of tasks, or `Tasks` made on demand. max_turns, max_tool_calls: None means no limit of the
    environment's own. tools: what the policy is told that it can call; `ToolUse` carries the calls out.
    gold: what a perfect policy says to a task, for SFT data and for testing the environment itself.
    difficulty: how hard a train task is, on any scale, for a curriculum; depends on the task alone.
    wrong: answers to a task, by name, that must not score full marks; `hone env validate` tries them beside its own.
    """

    def __init__(
        self,
        *,
        name: str,
        rubric: Rubric,
        train: Sequence[Task] | Tasks,
        held_out: Sequence[Task] | Tasks = (),
        version: str = "",
        max_turns: int | None = None,
        max_tool_calls: int | None = None,
        tools: Sequence[ToolSpec] = (),
        gold: Callable[[Task], Sequence[Message]] | None = None,
        difficulty: Callable[[Task], float] | None = None,
        wrong: Callable[[Task], Mapping[str, WrongAnswer]] | None = None,
    ) -> None:
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"environment {name!r}: max_turns {max_turns} leaves no turn; use 1 or more, or None")
        if max_tool_calls is not None and max_tool_calls < 0:
            raise ValueError(
                f"environment {name!r}: max_tool_calls {max_tool_calls} is negative; use None for no limit"
            )
        self.name = name
        self.version = version
        self.rubric = rubric
        self.max_turns = max_turns
        self.max_tool_calls = max_tool_calls
        self.tools = tuple(tools)
        self.elsewhere: Elsewhere | None = None
        self._train = tasks_from(train)
        self._held_out = tasks_from(held_out)
        self._gold = gold
        self._difficulty = difficulty
        self._wrong = wrong

    @property
    def num_train_tasks(self) -> int | None:
        """How many train tasks there are; None: endless."""
        return self._train.count

    @property
    def num_held_out_tasks(self) -> int | None:
        """How many held-out tasks there are; None: endless."""
        return self._held_out.count

    def train_task(self, index: int) -> Task:
        """The train task at `index`, the same in every process; `IndexError` outside the count."""
        return self._train[index]

    def held_out_task(self, index: int) -> Task:
        """The held-out task at `index`; no task is both held-out and a train task."""
        return self._held_out[index]

    def gold(self, task: Task) -> list[Message] | None:
        """A correct conversation after the prompt: what the assistant says and what the environment replies.

        None where nobody knows a correct answer.
        """
        return None if self._gold is None else list(self._gold(task))

    def wrong(self, task: Task) -> dict[str, WrongAnswer]:
        """Answers that must not score full marks, by name: a text is said at every turn, messages one a turn.

        None under the name of one of the generic attacks leaves that attack out, where it would be right.
        """
        return {} if self._wrong is None else dict(self._wrong(task))

    @property
    def has_gold(self) -> bool:
        """Whether the environment knows correct conversations."""
        return self._gold is not None or type(self).gold is not Environment.gold

    @property
    def has_difficulty(self) -> bool:
        """Whether the environment tells how hard its tasks are."""
        return self._difficulty is not None

    def difficulty(self, task: Task) -> float | None:
        """How hard a task is, on the environment's own scale; None where nobody knows."""
        return None if self._difficulty is None else self._difficulty(task)

    @property
    def has_teardown(self) -> bool:
        """Whether there is anything to tear down."""
        return type(self).teardown is not Environment.teardown

    @property
    def scores_groups(self) -> bool:
        """Whether the rollouts of a group are scored together, so that all of them must run in one process."""
        return self.rubric.scores_groups

    @property
    def tools_are_known(self) -> bool:
        """Whether `tools` are all that the policy can ever call, so that it is known before a rollout."""
        return True

    def is_solved(self, trace: Trace) -> bool:
        """Whether a scored trace counts as a success for pass@k; by default a reward of 1 or more."""
        return trace.reward >= 1 - 1e-9

    async def setup(self, rollout: Rollout) -> None:  # noqa: B027 - most environments need none
        """Prepare `rollout.state` before the first turn. The default does nothing."""

    @abstractmethod
    async def run(self, rollout: Rollout) -> None:
        """Drive one rollout: `await rollout.turn()` for what the policy says, `rollout.append(...)` for replies.

        Returning means that the rollout is complete. When a budget is used up, `turn()` ends the rollout by itself.
        """

    async def teardown(self, rollout: Rollout) -> None:  # noqa: B027 - most environments need none
        """Release what `setup` took; called once for every rollout, also after failures. The default does nothing."""


class SingleTurn(Environment):
    """One answer to each prompt."""

    async def run(self, rollout: Rollout) -> None:
        """Ask for the answer."""
        await rollout.turn()


class MultiTurn(Environment):
    """A conversation: after each turn of the policy the environment replies, or says that it is over."""

    async def run(self, rollout: Rollout) -> None:
        """Alternate turns and replies until `reply` returns None."""
        while True:
            await rollout.turn()
            with failures_as(FailureClass.ENVIRONMENT, "reply"):
                messages = await self.reply(rollout)
            if messages is None:
                return
            rollout.append(*messages)

    @abstractmethod
    async def reply(self, rollout: Rollout) -> Sequence[Message] | None:
        """What the environment says to the policy's latest turn (`rollout.answer`); None ends the rollout."""


def description(environment: Environment) -> Loaded:
    """What another Python is told of an environment."""
    return Loaded(
        name=environment.name,
        version=environment.version,
        num_train_tasks=environment.num_train_tasks,
        num_held_out_tasks=environment.num_held_out_tasks,
        has_gold=environment.has_gold,
        has_difficulty=environment.has_difficulty,
        scores_groups=environment.scores_groups,
        group_seconds=environment.rubric.group_seconds,
        tools=list(environment.tools),
        tools_are_known=environment.tools_are_known,
    )
