"""The problems: two drawn operands and an operation; a problem and its mirror image are on the same side of the split."""

import operator
import random
from collections.abc import Callable

from hone.envs import Task, Tasks, is_held_out, user
from hone.schema.seeds import derive_seed

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MAX_OPERAND = 10**6
MAX_DRAWS = 2000


def tasks_of(
    operations: str,
    *,
    max_operand: int,
    num_train_tasks: int | None,
    held_out_share: float,
    prompt: str,
    seed: int,
) -> tuple[Tasks, Tasks]:
    """Train and held-out tasks; a problem may come more than once."""
    if not operations or len(set(operations)) != len(operations) or not set(operations) <= OPERATIONS.keys():
        raise ValueError(f"operations {operations!r} must be different characters among {''.join(OPERATIONS)}")
    if not 1 <= max_operand <= MAX_OPERAND:
        raise ValueError(f"max_operand {max_operand} is not in 1..{MAX_OPERAND}")
    if "{problem}" not in prompt:
        raise ValueError(f"prompt {prompt!r} does not contain {{problem}}")
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share {held_out_share} is not between 0 and 1")
    if num_train_tasks is not None and num_train_tasks < 1:
        raise ValueError(f"num_train_tasks {num_train_tasks} is not positive")

    def task(side: bool, index: int) -> Task:
        draw = random.Random(derive_seed(seed, "problem", side, index))
        for _ in range(MAX_DRAWS):
            symbol = draw.choice(operations)
            first, second = draw.randint(0, max_operand), draw.randint(0, max_operand)
            if is_held_out(_identity(symbol, first, second), held_out_share) is side:
                question = prompt.replace("{problem}", f"{first} {symbol} {second}")
                return Task(prompt=(user(question),), reference=str(OPERATIONS[symbol](first, second)))
        raise ValueError(f"found no problem for both sides of the split in {MAX_DRAWS} draws; raise max_operand")

    task(False, 0), task(True, 0)  # what cannot be drawn shall be refused now
    return Tasks(lambda index: task(False, index), num_train_tasks), Tasks(lambda index: task(True, index))


def _identity(symbol: str, first: int, second: int) -> str:
    """3 + 5 and 5 + 3 are one problem; 3 - 5 and 5 - 3, which have one answer but for the sign, as well."""
    low, high = sorted((first, second))
    return f"{low} {symbol} {high}"
