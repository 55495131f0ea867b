import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.envs import EnvironmentLoadError, check_gold, is_held_out, load_environment, play
from hone_reverse_text.grammar import PATTERNS, SLOTS, sentence
from hone_reverse_text.rewards import longest_common_subsequence, similarity
from hone_reverse_text.tasks import words

MODES = ["words", "sentences", "letters"]


@pytest.mark.parametrize("mode", MODES)
async def test_gold_answers_score_one(mode):
    environment = load_environment("reverse_text", mode=mode)
    for index in range(100):
        assert (await check_gold(environment, environment.train_task(index))).reward == 1
        assert (await check_gold(environment, environment.held_out_task(index))).metrics == {"exact": 1}


@pytest.mark.parametrize("mode", MODES)
async def test_wrong_answers_score_less(mode):
    environment = load_environment("reverse_text", mode=mode)
    for index in range(30):
        task = environment.train_task(index)
        gold = task.reference
        wrong = {
            "empty": "",
            "blank": " \n ",
            "prompt repeated": task.prompt[0].content,
            "text copied": gold[::-1],
            "cut short": gold[:-1],
            "one more": gold + gold[-1],
            "explained": f"The answer is {gold}",
            "all letters": "abcdefghijklmnopqrstuvwxyz" * 5,
            "huge": gold[::-1] * 20_000,
            "other alphabet": "ж" * len(gold),
        }
        for kind, answer in wrong.items():
            trace = await play(environment, task, answer)
            assert trace.failure is None, kind
            assert trace.reward <= 0.5, kind
            assert trace.metrics["exact"] == 0, kind


async def test_a_truncated_answer_is_scored_as_it_stands():
    environment = load_environment("reverse_text")
    task = environment.train_task(0)
    trace = await play(environment, task, task.reference[:2], truncated=True)
    assert trace.is_truncated
    assert 0 < trace.reward < 0.5


async def test_white_space_around_an_answer_is_ignored():
    environment = load_environment("reverse_text")
    task = environment.train_task(0)
    assert (await play(environment, task, f"\n {task.reference}  ")).reward == 1


async def test_nearer_answers_earn_more_and_exact_stands_out():
    environment = load_environment("reverse_text", mode="letters", min_length=6, max_length=6)
    gold = environment.train_task(0).reference
    rewards = [(await play(environment, environment.train_task(0), gold[:n])).reward for n in range(7)]
    assert rewards == sorted(rewards)
    assert rewards[6] - rewards[5] > 2 * (rewards[5] - rewards[4])


@pytest.mark.parametrize("mode", MODES)
def test_no_text_is_on_both_sides_or_reads_the_same_backwards(mode):
    environment = load_environment("reverse_text", mode=mode)
    num_train, num_held_out = environment.num_train_tasks or 3000, environment.num_held_out_tasks or 1000
    train = {environment.train_task(index).reference for index in range(num_train)}
    held_out = {environment.held_out_task(index).reference for index in range(num_held_out)}
    assert not train & held_out
    assert not any(text == text[::-1] for text in train | held_out)


def test_the_split_does_not_depend_on_the_seed():
    one, other = (load_environment("reverse_text", mode="letters", seed=seed, max_length=4) for seed in (1, 2))
    assert one.train_task(0) != other.train_task(0)
    train = {one.train_task(index).reference for index in range(5000)}
    assert not train & {other.held_out_task(index).reference for index in range(1000)}


def test_tasks_are_the_same_in_every_process():
    first, second = (load_environment("reverse_text", mode="letters") for _ in range(2))
    assert [first.train_task(i).key for i in range(50)] == [second.train_task(i).key for i in range(50)]


def test_lengths_alphabet_count_and_prompt_are_kept():
    environment = load_environment(
        "reverse_text", mode="letters", alphabet="xyz", min_length=3, max_length=5, num_train_tasks=9, prompt="> {text}"
    )
    assert environment.num_train_tasks == 9
    tasks = [environment.train_task(index) for index in range(9)]
    assert all(set(task.reference) <= set("xyz") and 3 <= len(task.reference) <= 5 for task in tasks)
    assert all(task.prompt[0].content == "> " + task.reference[::-1] for task in tasks)
    with pytest.raises(IndexError):
        environment.train_task(9)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"mode": "verses"}, "there are words, sentences, letters"),
        ({"alphabet": "abc"}, "alphabet has no effect"),
        ({"mode": "letters", "alphabet": "aab"}, "different characters"),
        ({"min_length": 9}, "at most max_length"),
        ({"min_length": 30, "max_length": 40}, "no train words"),
        ({"mode": "letters", "alphabet": "ab", "min_length": 2, "max_length": 2, "held_out_share": 0.01}, "widen"),
        ({"num_train_tasks": 100_000}, "train texts"),
        ({"prompt": "Reverse!"}, "does not contain"),
        ({"partial_credit": 1.0}, "less than 1"),
        ({"held_out_share": 0.0}, "held_out_share"),
    ],
)
def test_arguments_without_meaning_are_refused(arguments, complaint):
    with pytest.raises(EnvironmentLoadError, match=complaint):
        load_environment("reverse_text", **arguments)


def test_shuffled_words_are_endless_keep_their_letters_and_are_never_held_out():
    environment = load_environment("reverse_text", shuffled_share=0.5)
    assert environment.num_train_tasks is None
    texts = [environment.train_task(index).reference[::-1] for index in range(400)]
    listed = set(words())
    known = {"".join(sorted(word)) for word in listed}
    assert all("".join(sorted(text)) in known and text != text[::-1] and not is_held_out(text, 0.2) for text in texts)
    assert 100 < sum(text in listed for text in texts) < 300


def test_the_word_list_is_clean():
    listed = words()
    assert len(listed) == len(set(listed)) > 1500
    assert all(word.isascii() and word.isalpha() and word.islower() for word in listed)


def test_sentences_have_no_slot_left_and_begin_with_a_capital():
    draw = random.Random(0)
    for text in (sentence(draw) for _ in range(500)):
        assert text[0].isupper()
        assert text[-1] in ".?"
        assert not set("{}\n") & set(text)
        assert "  " not in text
    assert all(slot in SLOTS for pattern in PATTERNS for slot in pattern.replace("}", "{").split("{")[1::2])


@given(st.text("abc", max_size=12), st.text("abcd", max_size=12))
def test_the_bit_parallel_longest_common_subsequence_equals_the_table(text, other):
    table = [[0] * (len(other) + 1) for _ in range(len(text) + 1)]
    for i, a in enumerate(text):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(text, other) == table[-1][-1]


@given(st.text(max_size=20), st.text(max_size=20))
def test_similarity_is_one_for_equal_texts_only(text, other):
    assert 0 <= similarity(text, other) <= 1
    assert (similarity(text, other) == 1) == (text == other)
