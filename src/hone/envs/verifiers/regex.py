"""Answers matched by a regular expression, in a process of its own: a pattern may take for ever on some answer."""

import re
from typing import Literal

from hone.envs.isolation import Place
from hone.envs.verifiers.budget import is_confirmed

CPU_SECONDS = 2.0

HAS_MATCH = Place("hone.envs.verifiers.regex", "has_match")


async def matches(
    answer: str, pattern: str, *, where: Literal["all", "somewhere"] = "all", cpu_seconds: float = CPU_SECONDS
) -> bool:
    """Whether the pattern (Python's `re`) matches all of the answer, white space around it aside, or some part of it.

    An answer on which it works for longer than `cpu_seconds` does not match. A pattern that cannot be compiled is a
    failure of class environment.
    """
    arguments = {"text": answer.strip(), "pattern": pattern, "is_whole": where == "all"}
    return await is_confirmed(HAS_MATCH, arguments, arguments | {"text": ""}, cpu_seconds)


def has_match(text: str, pattern: str, is_whole: bool) -> bool:
    """The same in this process, for as long as it takes."""
    compiled = re.compile(pattern)
    return (compiled.fullmatch(text) if is_whole else compiled.search(text)) is not None
