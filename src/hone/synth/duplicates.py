"""Near-duplicates among texts, by the Jaccard similarity of their runs of words: exact, without comparing all pairs."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from hone.synth.words import Run, runs_of, words_of

RUN_WORDS = 5


def near_duplicates(texts: Sequence[str], threshold: float) -> dict[int, int]:
    """Which texts repeat an earlier one that is kept: index of the text → index of that one.

    Two texts repeat one another when |A ∩ B| / |A ∪ B| >= threshold for their sets of runs of 5 words. Going through the
    texts in order, one that repeats a kept text is left out, and no longer compared with.

    Prefix filtering (Chaudhuri et al. 2006) finds every such pair: with the runs of each text in one order, rarest
    first, two similar texts share a run within their first |A| - ceil(threshold · |A|) + 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} is not in (0, 1]")
    sets = [runs_of(words_of(text), RUN_WORDS) for text in texts]
    frequency = Counter(run for runs in sets for run in runs)
    kept_with: defaultdict[Run, list[int]] = defaultdict(list)
    repeats: dict[int, int] = {}
    for index, runs in enumerate(sets):
        prefix = _prefix(runs, frequency, threshold)
        candidates = sorted({other for run in prefix for other in kept_with[run]})
        twin = next((other for other in candidates if jaccard(runs, sets[other]) >= threshold), None)
        if twin is not None:
            repeats[index] = twin
            continue
        for run in prefix:
            kept_with[run].append(index)
    return repeats


def jaccard(first: set[Run], second: set[Run]) -> float:
    """Share of common runs among all; 0 where there are none."""
    common = len(first & second)
    return common / (len(first) + len(second) - common) if common else 0.0


def _prefix(runs: set[Run], frequency: Counter[Run], threshold: float) -> list[Run]:
    # Rounding must not shorten the prefix: 0.7 * 10 is slightly more than 7 in floating point.
    length = len(runs) - math.ceil(threshold * len(runs) - 1e-9) + 1
    return sorted(runs, key=lambda run: (frequency[run], run))[:length]
