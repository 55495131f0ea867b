"""Environment: integer arithmetic, with feedback on a wrong answer and further tries."""

from hone_arithmetic.environment import Arithmetic
from hone_arithmetic.tasks import tasks_of


def load_environment(
    operations: str = "+-*",
    *,
    max_operand: int = 99,
    tries: int = 2,
    later_credit: float = 0.5,
    hints: bool = True,
    num_train_tasks: int | None = None,
    held_out_share: float = 0.2,
    prompt: str = "What is {problem}? Answer with the number only.",
    seed: int = 0,
) -> Arithmetic:
    """Problems such as 37 + 58; the reward is 1 when the first answer is right and `later_credit` for a later one.

    operations: characters among + - *. max_operand: operands are drawn from 0 to this. tries: answers that the policy
    may give. hints: whether the feedback says if a wrong answer is too high or too low. num_train_tasks: only the first
    so many of the endless train tasks. held_out_share: share of all problems that is never trained. prompt: must
    contain {problem}. seed: of the problems that are drawn.
    """
    if tries < 1:
        raise ValueError(f"tries {tries} leaves no answer; use 1 or more")
    if not 0 <= later_credit < 1:
        raise ValueError(f"later_credit {later_credit} is not in [0, 1); a later answer must earn less than the first")
    train, held_out = tasks_of(
        operations,
        max_operand=max_operand,
        num_train_tasks=num_train_tasks,
        held_out_share=held_out_share,
        prompt=prompt,
        seed=seed,
    )
    return Arithmetic(train, held_out, tries=tries, later_credit=later_credit, hints=hints)
