from dataclasses import replace

import pytest

from hone.config.synthesis import KeepSection
from hone.envs import assistant, user
from hone.synth.contamination import EvaluationTexts
from hone.synth.conversations import Conversation
from hone.synth.filters import best_first, language_of, select

ENGLISH = "The weather was fine this morning, so we decided to walk along the river."
GERMAN = "Das Wetter war heute Morgen schön, also gingen wir am Fluss entlang spazieren."


def one_of(task="a", answer="an answer", reward=1.0, attempt=0, asked=None, **more):
    return Conversation(
        environment="e",
        task=task,
        attempt=attempt,
        reward=reward,
        is_truncated=False,
        num_tokens=len(answer),
        messages=(user(asked or f"question {task}"), assistant(answer)),
        tools=(),
        num_prompt_messages=1,
        **more,
    )


def chosen(conversations, *, evaluation_texts=None, **keep):
    kept, stages = select(conversations, KeepSection(**keep), evaluation_texts or EvaluationTexts(13))
    return kept, {stage.name: stage for stage in stages}


def test_each_filter_counts_what_it_drops_with_examples():
    conversations = [
        one_of("a"),
        one_of("b", reward=0.5),
        replace(one_of("c"), is_truncated=True),
        one_of("d", answer=" "),
        one_of("e", answer="x" * 100),
    ]
    kept, stages = chosen(conversations, max_characters=50)
    assert [one.task for one in kept] == ["a"]
    assert {name: stage.num_dropped for name, stage in stages.items() if stage.num_dropped} == {
        "truncated": 1,
        "reward": 1,
        "length": 2,
    }
    assert [dropped.reason for dropped in stages["length"].examples] == ["nothing is said", "100 characters"]
    assert stages["reward"].examples[0].reason == "reward 0.5"


def test_lengths_are_limited_on_both_sides_and_in_tokens():
    conversations = [one_of(str(size), answer="x" * size) for size in (3, 10, 30)]
    assert [one.task for one in chosen(conversations, min_characters=10, max_characters=20)[0]] == ["10"]
    assert [one.task for one in chosen(conversations, max_tokens=10)[0]] == ["3", "10"]


def test_the_best_of_a_task_is_kept_and_among_equals_the_shortest():
    conversations = [
        one_of("a", "a wrong but short", reward=0.2, attempt=0),
        one_of("a", "right, and long-winded", attempt=1),
        one_of("a", "right", attempt=2),
        one_of("b", "only one", reward=0.3),
    ]
    kept, stages = chosen(conversations, min_reward=None)
    assert [(one.task, one.attempt) for one in kept] == [("a", 2), ("b", 0)]
    assert stages["not among the best of its task"].num_dropped == 2
    assert len(chosen(conversations, min_reward=None, max_per_task=None)[0]) == 4
    assert [(one.task, one.attempt) for one in best_first(conversations)] == [("a", 2), ("a", 1), ("a", 0), ("b", 0)]


def test_equal_conversations_are_kept_once_and_take_no_place_of_a_task():
    twins = [one_of("a", asked="same"), one_of("b", asked="same"), one_of("b", "other", asked="same", attempt=1)]
    kept, stages = chosen(twins)
    assert [(one.task, one.written) for one in kept] == [("a", "an answer"), ("b", "other")]
    assert stages["equal to another"].examples[0].reason == "like task a, attempt 0"


def test_near_duplicates_are_dropped_when_asked():
    words = [f"word{number}" for number in range(40)]
    near = [one_of("a", " ".join(words), asked="q"), one_of("b", " ".join([*words, "more"]), asked="q")]
    assert len(chosen(near)[0]) == 2
    kept, stages = chosen(near, near_duplicates=0.8)
    assert [one.task for one in kept] == ["a"]
    assert stages["nearly equal to another"].examples[0].reason == "like task a, attempt 0"


def test_contaminated_conversations_are_dropped():
    texts = EvaluationTexts(13)
    texts.add("a test set", ["question a", "other"])
    kept, stages = chosen([one_of("a"), one_of("b")], evaluation_texts=texts)
    assert [one.task for one in kept] == ["b"]
    assert stages["contaminated"].examples[0].reason == "a test set: question a"


@pytest.mark.parametrize(
    ("text", "language"), [(ENGLISH, "en"), (GERMAN, "de"), ("42", None), ("1 + 1 = 2 " * 20, None)]
)
def test_languages_are_told_where_there_is_enough_text(text, language):
    assert language_of(text) == language


def test_other_languages_are_dropped_and_short_answers_kept():
    conversations = [one_of("a", ENGLISH), one_of("b", GERMAN), one_of("c", "42")]
    kept, stages = chosen(conversations, languages=("en",))
    assert [one.task for one in kept] == ["a", "c"]
    assert stages["language"].examples[0].reason == "language de"
    assert "language" not in chosen(conversations)[1]
