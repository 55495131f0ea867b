"""The problems: drawn operands and operators; problems of the same parts are on the same side of the split."""

import random

from hone.envs import Task, Tasks, is_held_out, user
from hone.schema.seeds import derive_seed
from hone_calculator.expressions import evaluate

KNOWN = "+-*"
MAX_OPERAND = 10**6
MAX_OPERATORS = 8
MAX_DRAWS = 2000


def tasks_of(
    operators: str,
    *,
    max_operand: int,
    max_operators: int,
    num_train_tasks: int | None,
    held_out_share: float,
    prompt: str,
    seed: int,
) -> tuple[Tasks, Tasks]:
    """Train and held-out tasks; a problem may come more than once."""
    if not operators or len(set(operators)) != len(operators) or not set(operators) <= set(KNOWN):
        raise ValueError(f"operators {operators!r} must be different characters among {KNOWN}")
    if not 1 <= max_operand <= MAX_OPERAND:
        raise ValueError(f"max_operand {max_operand} is not in 1..{MAX_OPERAND}")
    if not 1 <= max_operators <= MAX_OPERATORS:
        raise ValueError(f"max_operators {max_operators} is not in 1..{MAX_OPERATORS}")
    if "{problem}" not in prompt:
        raise ValueError(f"prompt {prompt!r} does not contain {{problem}}")
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share {held_out_share} is not between 0 and 1")
    if num_train_tasks is not None and num_train_tasks < 1:
        raise ValueError(f"num_train_tasks {num_train_tasks} is not positive")

    def task(side: bool, index: int) -> Task:
        draw = random.Random(derive_seed(seed, "problem", side, index))
        for _ in range(MAX_DRAWS):
            symbols = draw.choices(operators, k=draw.randint(1, max_operators))
            numbers = [str(draw.randint(0, max_operand)) for _ in range(len(symbols) + 1)]
            if is_held_out(" ".join(sorted(numbers) + sorted(symbols)), held_out_share) is side:
                problem = numbers[0] + "".join(map("".join, zip(symbols, numbers[1:], strict=True)))
                question = user(prompt.replace("{problem}", problem))
                return Task(prompt=(question,), reference=str(evaluate(problem)), info={"problem": problem})
        raise ValueError(f"found no problem for both sides of the split in {MAX_DRAWS} draws; raise max_operand")

    task(False, 0), task(True, 0)  # what cannot be drawn shall be refused now
    return Tasks(lambda index: task(False, index), num_train_tasks), Tasks(lambda index: task(True, index))
