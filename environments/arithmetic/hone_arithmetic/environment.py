"""The course of a rollout and its reward: exact integers, nothing around them."""

import re
from collections.abc import Sequence

from hone.envs import Measure, Message, MultiTurn, Rollout, Rubric, Task, Tasks, Trace, assistant, metric, reward, user

# Fifteen digits are more than any result has; int() refuses text of thousands.
NUMBER = re.compile(r"[+-]?[0-9]{1,15}")


class Arithmetic(MultiTurn):
    """A first answer; while it is wrong and tries are left, feedback and another answer."""

    def __init__(self, train: Tasks, held_out: Tasks, *, tries: int, later_credit: float, hints: bool) -> None:
        super().__init__(
            name="arithmetic",
            rubric=Rubric([correct(later_credit), first_try, solved]),
            train=train,
            held_out=held_out,
            max_turns=tries,
            gold=_gold,
            difficulty=_difficulty,
        )
        self._tries = tries
        self._hints = hints

    async def reply(self, rollout: Rollout) -> Sequence[Message] | None:
        """Feedback on a wrong answer that is not the last."""
        answer, result = read_number(rollout.answer), int(rollout.task.reference or "")
        if answer == result or rollout.num_turns == self._tries:
            return None
        return [user(self._feedback(answer, result))]

    def is_solved(self, trace: Trace) -> bool:
        """Whether the answer was right in the end, at whichever try."""
        return trace.metrics["solved"] == 1

    def _feedback(self, answer: int | None, result: int) -> str:
        if answer is None:
            return "That is not a number. Try again."
        if not self._hints:
            return "That is wrong. Try again."
        return f"That is too {'high' if answer > result else 'low'}. Try again."


def correct(later_credit: float) -> Measure:
    """The reward: 1 for the first answer, `later_credit` for a later one."""

    @reward(name="correct")
    def judge(completion: list[Message], reference: str) -> float:
        right = [read_number(answer) == int(reference) for answer in answers_in(completion)]
        return 1.0 if right[:1] == [True] else later_credit if any(right) else 0.0

    return judge


@metric
def first_try(completion: list[Message], reference: str) -> bool:
    """Whether the first answer is right."""
    return [read_number(answer) for answer in answers_in(completion)[:1]] == [int(reference)]


@metric
def solved(answer: str, reference: str) -> bool:
    """Whether the last answer is right."""
    return read_number(answer) == int(reference)


def answers_in(completion: list[Message]) -> list[str]:
    """What the policy said, turn by turn."""
    return [message.content for message in completion if message.role == "assistant"]


def read_number(text: str) -> int | None:
    """The integer that the text is, white space aside; None when there is anything else in it."""
    found = NUMBER.fullmatch(text.strip())
    return int(found[0]) if found else None


def _gold(task: Task) -> list[Message]:
    assert task.reference is not None
    return [assistant(task.reference)]


def _difficulty(task: Task) -> int:
    """The digits of the result."""
    return len((task.reference or "").lstrip("-"))
