"""Mathematical expressions compared by the math-verify package; imported only where it may hang, see `budget`."""

import functools
import logging
import re
from typing import Any

try:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError as error:
    raise ImportError("the verifier of mathematics needs the package math-verify: pip install 'hone[math]'") from error

# It warns whenever its own timeouts are off. They are, because they stop no hang in C; the caller's do.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_COMMANDS = re.compile(r"\\text\s?\{[^{}]*\}|\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{4}")


def are_equivalent(answer: str, reference: str) -> bool:
    """Whether the two are the same mathematically; `ValueError` when the reference is no mathematics.

    An answer that cannot be read, or whose comparison raises, is wrong.
    """
    expected = _read_reference(reference)
    try:
        return bool(verify(expected, _read(answer), timeout_seconds=None))
    except (Exception, MemoryError):  # what an answer makes sympy raise is the answer's fault
        return False


@functools.lru_cache(maxsize=1024)
def _read_reference(reference: str) -> list[Any]:
    expressions = _read(reference)
    if all(isinstance(expression, str) for expression in expressions):
        raise ValueError(f"reference {reference!r} cannot be read as mathematics; compare it as text")
    return expressions


def _read(text: str) -> list[Any]:
    written = text.strip()
    if written and not _has_anchor(written) and not _WORD.search(_COMMANDS.sub("", written)):
        written = f"${written}$"  # otherwise 10^{-3} would be found to be 10
    read: list[Any] = parse(written, (LatexExtractionConfig(), ExprExtractionConfig()), parsing_timeout=None)
    return read


def _has_anchor(text: str) -> bool:
    return any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
