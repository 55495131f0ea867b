"""Evaluation texts that training data must not contain, found by common runs of words."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from hone.synth.words import Run, runs_of, words_of

WORDING_WORDS = 5
"""Runs of so many words that more than half of the texts of an evaluation set have are its wording."""
COMMON_TEXTS = 10
"""A run in more texts of one evaluation set than this, or in more than a quarter, is no task's own either."""


class EvaluationTexts:
    """Runs of `words` words that evaluation texts have, and others do not unless they were copied from there.

    What the texts of a set have in common, such as the instructions that every task of an environment begins with, is
    left out. A text of which nothing longer is left counts as a whole. num_texts: how many were added.
    """

    def __init__(self, words: int) -> None:
        self.words = words
        self.num_texts = 0
        self._sources: dict[Run, str] = {}
        self._short: dict[str, str] = {}

    def add(self, source: str, texts: Iterable[str]) -> None:
        """Add one evaluation set; `source` names it in messages."""
        added = list(texts)
        split = [words_of(text) for text in added]
        long = [words for words in split if len(words) >= self.words]  # references are often a word or two
        wording = _in_more_than(len(long) // 2, (runs_of(words, WORDING_WORDS) for words in long))
        own = [self._own_runs(words, wording) for words in split]
        common = _in_more_than(min(COMMON_TEXTS, len(long) // 4), own)
        for text, runs in zip(added, own, strict=True):
            self._sources.update(dict.fromkeys(runs - common, source))
            if not runs:
                self._short.setdefault(_plain(text), source)
        self.num_texts += len(added)

    def found_in(self, texts: Sequence[str], prompts: Sequence[str]) -> str | None:
        """Which evaluation set is given away, and by which words; None where none is.

        texts: all that is trained on, each searched for runs. prompts: those of them that ask, compared as a whole with
        short evaluation texts.
        """
        for text in texts:
            words = words_of(text)
            for start in range(len(words) - self.words + 1):
                run = tuple(words[start : start + self.words])
                if run in self._sources:
                    return f"{self._sources[run]}: {' '.join(run)}"
        for prompt in prompts:
            plain = _plain(prompt)
            if plain and plain in self._short:
                return f"{self._short[plain]}: {plain}"
        return None

    def _own_runs(self, words: list[str], wording: set[Run]) -> set[Run]:
        """The runs of a text that touch no wording."""
        return {
            run for piece in _between(words, wording) if len(piece) >= self.words for run in runs_of(piece, self.words)
        }


def _between(words: list[str], wording: set[Run]) -> Iterator[list[str]]:
    """The pieces of a text between its runs of wording."""
    covered = [False] * len(words)
    for start in range(len(words) - WORDING_WORDS + 1):
        if tuple(words[start : start + WORDING_WORDS]) in wording:
            covered[start : start + WORDING_WORDS] = [True] * WORDING_WORDS
    piece: list[str] = []
    for word, is_wording in zip(words, covered, strict=True):
        if is_wording:
            yield piece
            piece = []
        else:
            piece.append(word)
    yield piece


def _in_more_than(count: int, sets: Iterable[set[Run]]) -> set[Run]:
    """The runs that are in more than `count` of the sets, and in two at least."""
    counts = Counter(run for runs in sets for run in runs)
    return {run for run, found in counts.items() if found > max(1, count)}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
