"""Environment: integer arithmetic that is too hard for the head, and a tool that does it."""

from hone.envs import ToolUse
from hone_calculator.environment import calculator
from hone_calculator.tasks import tasks_of


def load_environment(
    operators: str = "+-*",
    *,
    max_operand: int = 999,
    max_operators: int = 2,
    max_tool_calls: int = 3,
    num_train_tasks: int | None = None,
    held_out_share: float = 0.2,
    prompt: str = "What is {problem}? Use the tool, then answer with the number only.",
    seed: int = 0,
) -> ToolUse:
    """Problems such as 417*83-219; the reward is 1 for the right number as the answer, whatever was called before.

    operators: characters among + - *. max_operand: operands are drawn from 0 to this. max_operators: a problem has one
    to so many. max_tool_calls: a policy that wants more is cut off. num_train_tasks: only the first so many of the
    endless train tasks. held_out_share: share of all problems that is never trained. prompt: must contain {problem}.
    seed: of the problems that are drawn.
    """
    train, held_out = tasks_of(
        operators,
        max_operand=max_operand,
        max_operators=max_operators,
        num_train_tasks=num_train_tasks,
        held_out_share=held_out_share,
        prompt=prompt,
        seed=seed,
    )
    return calculator(train, held_out, max_tool_calls=max_tool_calls)
