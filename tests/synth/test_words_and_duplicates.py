import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.synth.duplicates import RUN_WORDS, jaccard, near_duplicates
from hone.synth.words import runs_of, words_of

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=14).map(" ".join)


def by_comparing_all(texts, threshold):
    """The definition, word for word."""
    sets = [runs_of(words_of(text), RUN_WORDS) for text in texts]
    kept, repeats = [], set()
    for index, runs in enumerate(sets):
        if any(jaccard(runs, sets[other]) >= threshold for other in kept):
            repeats.add(index)
        else:
            kept.append(index)
    return repeats


@given(st.lists(WORDS, max_size=12), st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0]))
def test_no_pair_above_the_threshold_is_missed_and_none_below_is_taken(texts, threshold):
    found = near_duplicates(texts, threshold)
    assert set(found) == by_comparing_all(texts, threshold)
    for index, twin in found.items():
        assert twin < index
        assert twin not in found


def test_many_texts_are_compared_without_comparing_all_pairs(monkeypatch):
    compared = 0

    def counting(first, second):
        nonlocal compared
        compared += 1
        return jaccard(first, second)

    monkeypatch.setattr("hone.synth.duplicates.jaccard", counting)
    texts = [" ".join(f"{name}{number}" for name in "abcdefghij") for number in range(2000)]
    assert near_duplicates([*texts, texts[7] + " more"], 0.8) == {2000: 7}
    assert compared < 100


def test_letter_case_and_punctuation_make_no_difference():
    assert near_duplicates(["What is the answer, please?", "what IS the answer -- please"], 0.9) == {1: 0}
    assert near_duplicates(["", " ", "..."], 0.5) == {}


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_a_threshold_without_meaning_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        near_duplicates(["a"], threshold)


@given(st.lists(st.sampled_from("abc"), max_size=9), st.integers(1, 5))
def test_runs_are_all_windows_of_a_text(words, length):
    runs = runs_of(words, length)
    if len(words) <= length:
        assert runs == ({tuple(words)} if words else set())
    else:
        assert runs == {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    assert all(run in set(itertools.product("abc", repeat=len(run))) for run in runs)
