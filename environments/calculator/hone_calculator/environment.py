"""The tool, the course of a rollout and its reward: the right integer as the last word."""

import re
from collections.abc import Sequence

from hone.envs import Message, Rubric, Task, Tasks, ToolUse, assistant, metric, reward, tool, tool_call, tool_result
from hone_calculator.expressions import evaluate

NUMBER = re.compile(r"[+-]?[0-9]{1,100}")


@tool
def calculate(expression: str) -> int:
    """The value of an expression.

    expression: integers, + - * and parentheses.
    """
    return evaluate(expression)


@reward
def correct(completion: Sequence[Message], reference: str) -> bool:
    """Whether the policy's last turn is the right number and calls no tool."""
    return _final_number(completion) == int(reference)


@metric
def asked_right(completion: Sequence[Message], reference: str) -> bool:
    """Whether a tool result was the right number."""
    return any(message.role == "tool" and message.content == reference for message in completion)


@metric
def asked(completion: Sequence[Message]) -> bool:
    """Whether the policy called a tool at all."""
    return any(message.tool_calls for message in completion)


def calculator(train: Tasks, held_out: Tasks, *, max_tool_calls: int) -> ToolUse:
    """The environment over these tasks."""
    return ToolUse(
        name="calculator",
        rubric=Rubric([correct, asked, asked_right]),
        train=train,
        held_out=held_out,
        tools=[calculate],
        max_tool_calls=max_tool_calls,
        gold=_gold,
    )


def read_number(text: str) -> int | None:
    """The integer that the text is, white space aside; None when there is anything else in it."""
    found = NUMBER.fullmatch(text.strip())
    return int(found[0]) if found else None


def _final_number(completion: Sequence[Message]) -> int | None:
    last = completion[-1] if completion else None
    if last is None or last.role != "assistant" or last.tool_calls:
        return None
    return read_number(last.content)


def _gold(task: Task) -> list[Message]:
    assert task.reference is not None
    call = tool_call("calculate", {"expression": task.info["problem"]})
    return [assistant("", call), tool_result(task.reference), assistant(task.reference)]
