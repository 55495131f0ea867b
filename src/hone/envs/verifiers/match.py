"""Verifiers that compare text, letters and numbers: quick, so that they run on the event loop."""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from hone.envs.parsers import choice_letter, final_answer, final_number, grid, number

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[^\w\s]|_")


def is_exact(answer: str, reference: str) -> bool:
    """Whether the answer is the reference, the white space around them aside."""
    return answer.strip() == _existing(reference, str.strip)


def is_same_text(answer: str, reference: str) -> bool:
    """Whether the two are equal once case, punctuation, articles and the forms of characters and spaces are levelled."""
    return normalised(answer) == _existing(reference, normalised)


def normalised(text: str) -> str:
    """The text in lower case without punctuation, English articles and repeated white space."""
    plain = _NEITHER_LETTER_NOR_DIGIT.sub("", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_ARTICLES.sub(" ", plain).split())


def is_final_answer(answer: str, reference: str) -> bool:
    """Whether what the answer comes to is the reference, but for case and spaces: for the tasks of BIG-Bench Hard.

    Spaces between signs, as in "] ] )", do not count.
    """
    found = final_answer(answer)
    return found is not None and _spaced(found) == _existing(reference, _spaced)


def _spaced(text: str) -> str:
    words = text.casefold().split()
    return ("" if not any(map(str.isalnum, text)) else " ").join(words)


def is_same_grid(answer: str, reference: str) -> bool:
    """Whether the answer ends with the grid of digits that the reference is: for the puzzles of ARC."""
    expected = grid(reference)
    if expected is None:
        raise ValueError(f"reference {reference!r} is no grid of digits")
    return grid(answer) == expected


def is_choice(answer: str, reference: str, *, letters: str = "ABCD") -> bool:
    """Whether the answer settles on the letter of the reference, which may be written as "B" or "(B)"."""
    expected = choice_letter(reference, letters)
    if expected is None:
        raise ValueError(f"reference {reference!r} is none of the letters {letters}")
    return choice_letter(answer, letters) == expected


def is_close(answer: str, reference: str, *, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether the answer's final number is the reference's, exactly or within the larger of two tolerances."""
    expected = number(reference)
    if expected is None:
        expected = final_number(reference)
    if expected is None:
        raise ValueError(f"reference {reference!r} has no number")
    found = final_number(answer)
    return found is not None and abs(found - expected) <= max(abs(expected) * _exact(relative), _exact(absolute))


def _exact(tolerance: float) -> Fraction:
    return Fraction(str(tolerance))


def _existing(reference: str, level: Callable[[str], str]) -> str:
    levelled = level(reference)
    if not levelled:
        raise ValueError(f"reference {reference!r} is empty, which an empty answer would match")
    return levelled
