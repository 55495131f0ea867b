"""Texts as words and runs of words, the common ground of near-duplicates and contamination."""

import re

WORD = re.compile(r"\w+")

Run = tuple[str, ...]


def words_of(text: str) -> list[str]:
    """The words of a text, letter case and punctuation aside."""
    return WORD.findall(text.casefold())


def runs_of(words: list[str], length: int) -> set[Run]:
    """All runs of `length` words; of a shorter text the one run that it is; none of an empty text."""
    if len(words) <= length:
        return {tuple(words)} if words else set()
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
