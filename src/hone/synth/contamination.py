"""Evaluation texts that training data must not contain, found by common runs of words."""

from collections import Counter
from collections.abc import Iterable, Sequence

from hone.synth.words import Run, runs_of, words_of

COMMON_TEXTS = 10
"""A run in more texts of one evaluation set than this, or in more than a quarter, is its wording and no task's own."""


class EvaluationTexts:
    """Runs of `words` words of evaluation sets. Shorter texts are known as a whole.

    num_texts: how many were added. num_common: runs that were left out because they come in many texts of one set:
    instructions that every task of an environment begins with.
    """

    def __init__(self, words: int) -> None:
        self.words = words
        self.num_texts = 0
        self.num_common = 0
        self._sources: dict[Run, str] = {}
        self._short: dict[str, str] = {}

    def add(self, source: str, texts: Iterable[str]) -> None:
        """Add one evaluation set; `source` names it in messages."""
        counts: Counter[Run] = Counter()
        num_texts = 0
        for text in texts:
            num_texts += 1
            words = words_of(text)
            if len(words) < self.words:
                self._short.setdefault(_plain(text), source)
            else:
                counts.update(runs_of(words, self.words))
        limit = min(COMMON_TEXTS, max(1, num_texts // 4))
        for run, count in counts.items():
            if count <= limit:
                self._sources.setdefault(run, source)
            else:
                self.num_common += 1
        self.num_texts += num_texts

    def found_in(self, texts: Sequence[str], prompts: Sequence[str]) -> str | None:
        """Which evaluation set is given away, and by which words; None where none is.

        texts: all that is trained on, each searched for common runs. prompts: those of them that ask, compared as a
        whole with short evaluation texts.
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


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
