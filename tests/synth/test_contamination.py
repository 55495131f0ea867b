import json

import pytest

from hone.synth.contamination import EvaluationTexts
from public_data import ABSENT, DATA

GSM8K = DATA / "gsm8k"
LONG = "the quick brown fox jumps over the lazy dog while seven wizards quietly drink their tea"


def known(*texts, words=13):
    found = EvaluationTexts(words)
    found.add("test set", texts)
    return found


def test_a_run_of_words_gives_an_evaluation_text_away_whatever_stands_around_it():
    texts = known(LONG, "another text of an evaluation", "and one more", "and a last one")
    told = texts.found_in([f"He said: {LONG.upper()}! And left."], [])
    assert told == f"test set: {' '.join(LONG.split()[:13])}"
    assert texts.found_in([" ".join(LONG.split()[:12])], []) is None
    assert texts.found_in([" ".join(LONG.split()[2:15])], []) is not None


def test_a_short_evaluation_text_is_given_away_by_asking_it():
    texts = known("What is 3 + 4?", LONG)
    assert texts.found_in(["what is  3 + 4?"], ["what is  3 + 4?"]) == "test set: what is 3 + 4?"
    assert texts.found_in(["What is 3 - 4?"], ["What is 3 - 4?"]) is None
    assert texts.found_in(["What is 3 + 4?"], []) is None


def test_instructions_that_every_text_of_a_set_has_are_no_contamination():
    instructions = "answer the following question and put the final answer between two angle brackets as shown above"
    texts = known(*(f"{instructions} number {n} {LONG} {n}" for n in range(40)))
    assert texts.found_in([f"{instructions} number 99 something else"], []) is None
    assert known(LONG).found_in([LONG], []) is not None


def test_tasks_that_differ_by_a_few_words_between_long_instructions_are_compared_as_a_whole():
    def task(first, second):
        return (
            f"What do these cost in all, in cents? {first} pen, {second} book. Look the prices up with the tool that you"
            " have, then answer with the number only."
        )

    texts = known(*(task(n, n + 1) for n in range(30)))
    assert texts.found_in([task(7, 8)], [task(7, 8)]) is not None
    # Every run of 13 words of this one is in some evaluation text, or nearly: the wording is all that they share.
    assert texts.found_in([task(7, 9)], [task(7, 9)]) is None


def test_a_text_in_a_few_of_many_still_counts():
    others = [f"text number {n} which says {n} things of its own about the number {n} and no more" for n in range(100)]
    texts = known(LONG, LONG, LONG, *others)
    assert texts.found_in([LONG], []) is not None


@pytest.mark.skipif(not GSM8K.exists(), reason=ABSENT)
def test_questions_of_a_public_test_set_are_found_and_those_of_its_train_set_are_not():
    asked, trained = (
        [json.loads(line)["question"] for line in (GSM8K / name).read_text().splitlines()[:300]]
        for name in ("test.jsonl", "train_first1500.jsonl")
    )
    texts = known(*asked)
    missed = [question for question in asked if texts.found_in([f"Solve: {question} Think."], [question]) is None]
    assert missed == []
    assert sum(texts.found_in([question], [question]) is not None for question in trained) <= 3
