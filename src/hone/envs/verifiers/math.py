"""Mathematical equivalence: `1/2`, `0.5` and `\\frac{2}{4}` are one answer. Needs the extra `math`."""

import re

from hone.envs.isolation import Place
from hone.envs.parsers import boxed, number
from hone.envs.verifiers.budget import is_confirmed
from hone.envs.verifiers.match import normalised

MAX_CHARACTERS = 10_000
"""A longer expression is wrong without a look."""
CPU_SECONDS = 5.0

_SIDE_BY_SIDE = re.compile(r"\d\s+\d")
"""A list of numbers, which math-verify would add up; a mixed number (2 1/2) is read before."""

ARE_EQUIVALENT = Place("hone.envs.verifiers.expressions", "are_equivalent")


async def is_equivalent(answer: str, reference: str, *, cpu_seconds: float = CPU_SECONDS) -> bool:
    """Whether the answer's result equals the reference: exactly as numbers, as words, or by the package math-verify.

    The result is what is boxed, or else what the whole answer is found to say: take the reasoning out first. It is
    compared in a process of its own, where an answer that takes longer than `cpu_seconds` of work is wrong. Trouble
    that is not the answer's, a reference that cannot be read above all, is a failure.
    """
    result, expected = _result(answer), _result(reference)
    if not expected:
        raise ValueError(f"reference {reference!r} is empty")
    if not result or len(result) > MAX_CHARACTERS:
        return False
    if expected.replace(" ", "").isalpha() and len(expected) > 1:
        return normalised(result) == normalised(expected)
    if result == expected:
        return True
    as_numbers = number(result), number(expected)
    if None not in as_numbers and "%" not in result + expected:
        return as_numbers[0] == as_numbers[1]
    if _SIDE_BY_SIDE.search(result) and as_numbers[0] is None:
        return False
    return await is_confirmed(
        ARE_EQUIVALENT,
        {"answer": result, "reference": expected},
        {"answer": expected, "reference": expected},
        cpu_seconds,
    )


def _result(text: str) -> str:
    box = boxed(text)
    return (text if box is None else box).strip()
