"""IFEval: every instruction of the public data is known, and each is told followed from not followed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.envs import Rubric, SingleTurn, Task, metric, play, reward, user
from hone.envs.verifiers.ifeval import (
    CHECKS,
    Instruction,
    count_sentences,
    followed,
    follows_all,
    instructions_of,
    share_followed,
)
from public_data import ABSENT, DATA

ENGLISH = "the quick brown fox jumps over the lazy dog and then it goes to sleep in the garden"
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund und schläft danach im Garten."
PROMPT = "Write a haiku about moms."

CASES = {
    "keywords:existence": (
        {"keywords": ["mom", "mother"]},
        ["My Mom is a MOTHER.", "mothers and moms"],
        ["My mom is here.", "a moth"],
    ),
    "keywords:frequency": (
        {"keyword": "story", "frequency": 2, "relation": "at least"},
        ["A story of a Story.", "stories? story, story"],
        ["A story.", "history"],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["rock", "C++"]},
        ["A rocket is rocky.", "We write C."],
        ["Rock on.", "a rock-solid case", "We write C++."],
    ),
    "keywords:letter_frequency": (
        {"letter": "q", "let_frequency": 2, "let_relation": "less than"},
        ["A Queen.", "none"],
        ["A Queen is quick."],
    ),
    "language:response_language": ({"language": "de"}, [GERMAN], [ENGLISH, "1 2 3 4"]),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "Dr. Who came. He saw 3.5 boxes. He left"],
        ["One. Two.", "Mr. A. B. Smith of the U.S. met Dr. Who.", "e.g. this, etc. and that"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["One.\n***\nTwo.", "***\nOne.\n\n***\nTwo.\n***"],
        ["One.\n\nTwo.", "One.\n***\n\n***\nTwo.", "a *** b *** c"],
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "less than"},
        ["one two three", "one-two three"],
        ["one two three four"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ["One.\n\nWeekend, at last.", 'One.\n \n\n"weekend" is here.'],
        ["Weekend.\n\nOne.", "One.\n\nWeekends.", "One.\n\nWeekend.\n\nThree.", "weekend"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[name] at [address]", "[[name] [address]]"],
        ["[name]", "[] []", "[name\naddress] [x]"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"},
        ["Bye.\nP.P.S. I forgot.", "bye p. p. s more", "PPS: more"],
        ["Bye.\nP.S. I forgot.", "Bye.", "apps"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* one\n* two", "Look:\n - one\n - two\nDone.", "- one\n\n* two"],
        ["* one", "* one\n* two\n* three", "**one**\n**two**", "---\n- one"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["My answer is yes.", "Well. My answer is maybe."],
        ["Yes.", "my answer is no", "My answer is perhaps."],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*one* and *two*", "**one** and *two*", "* a *point* with **weight**"],
        ["*one*", "* one\n* two\n* three", "** **", "2 * 3 * 4 * 5"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 a SECTION2 b"],
        ["SECTION 1\na", "Section 1\nSection 2", "SECTION one SECTION two"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": 1}', '```json\n{"a": [1]}\n```', "```\n[]\n```"],
        ["{a: 1}", 'Here: {"a": 1}', "```json\n{\n```", "[" * 100_000],
    ),
    "detectable_format:title": ({}, ["<<Joy>>\ntext", "text << Joy >>"], ["<Joy>", "<< >>", "<<Joy\n>>", "<<>>"]),
    "combination:two_responses": (
        {},
        ["one\n******\ntwo", "******\none\n******\ntwo\n******"],
        ["one", "one\n******\none", "one ****** two ****** three", "one\n******\n"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": PROMPT},
        [f"{PROMPT} Here: ...", f" {PROMPT.upper()}\n..."],
        [f"Sure. {PROMPT}", "Write a haiku about dads."],
    ),
    "startend:end_checker": (
        {"end_phrase": "Is there anything else I can help with?"},
        ["Done. Is there anything else I can help with?", '"Is there anything else I can help with?"\n'],
        ["Is there anything else I can help with? Yes.", "Done."],
    ),
    "startend:quotation": ({}, ['"All of it."', ' "a" and "b" '], ['All "of" it.', '"', '""', '"open']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["I AM here", "NASA and ESA", "VERY-LOUD noise, I say"],
        ["I am here", "Nasa", "123 456"],
    ),
    "change_case:english_capital": ({}, [ENGLISH.upper()], [ENGLISH, ENGLISH.title(), GERMAN.upper(), "123"]),
    "change_case:english_lowercase": ({}, [ENGLISH], [ENGLISH.upper(), ENGLISH.title(), GERMAN.lower(), "123"]),
    "punctuation:no_comma": ({}, ["No comma; none."], ["One, two"]),
}
NEEDS_LANGDETECT = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}


def rows():
    path = DATA / "ifeval" / "input_data.jsonl"
    if not path.exists():
        pytest.skip(ABSENT)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_there_are_cases_for_all_25_instructions():
    assert len(CHECKS) == 25
    assert CASES.keys() == CHECKS.keys()


@pytest.mark.parametrize(
    ("name", "response", "expected"),
    [(name, response, True) for name, (_, good, _) in CASES.items() for response in good]
    + [(name, response, False) for name, (_, _, bad) in CASES.items() for response in [*bad, "", " \n"]],
)
def test_what_follows_is_told_from_what_does_not(name, response, expected):
    if name in NEEDS_LANGDETECT:
        pytest.importorskip("langdetect")
    assert Instruction(name, CASES[name][0]).is_followed(response) is expected


def test_the_other_relations():
    def holds(name, response, **arguments):
        return Instruction(name, arguments).is_followed(response)

    assert holds("keywords:frequency", "a story", keyword="story", frequency=2, relation="less than")
    assert not holds("length_constraints:number_sentences", "One. Two.", num_sentences=2, relation="less than")
    assert holds("length_constraints:number_words", "one two", num_words=2, relation="at least")
    assert not holds("keywords:letter_frequency", "abc", letter="#", let_frequency=1, let_relation="at least")
    assert not holds("change_case:capital_word_frequency", "A B", capital_frequency=2, capital_relation="less than")
    assert holds("detectable_content:postscript", "Bye.\nP. S. more", postscript_marker="P.S.")


def test_every_instruction_of_the_public_data_is_known_with_its_arguments():
    names = [instruction.id for row in rows() for instruction in instructions_of(row)]
    assert len(names) == 834
    assert set(names) == CHECKS.keys()


def test_no_prompt_of_the_public_data_is_followed_by_nothing():
    assert [row["key"] for row in rows() if any(followed("", instructions_of(row), is_loose=True))] == []


def test_every_check_of_the_public_data_can_be_made():
    pytest.importorskip("langdetect")
    responses = [ENGLISH, GERMAN.upper(), "* *a*\n" * 3, '"<<[x]>>"']
    verdicts = [followed(responses[row["key"] % 4], instructions_of(row), is_loose=True) for row in rows()]
    assert {verdict for row in verdicts for verdict in row} == {True, False}


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("keywords:nothing", {}, "unknown instruction 'keywords:nothing'"),
        ("keywords:existence", {}, "missing required field `keywords`"),
        ("keywords:existence", {"keywords": "mom"}, "Expected `array`"),
        ("punctuation:no_comma", {"num_words": 3}, "unknown field `num_words`"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "Invalid enum value 'about'"),
        ("length_constraints:number_words", {"num_words": -3, "relation": "at least"}, ">= 0"),
    ],
)
def test_what_is_no_instruction_is_refused(name, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Instruction(name, arguments)


def test_arguments_that_are_none_are_left_out():
    assert Instruction("punctuation:no_comma", {"num_words": None, "relation": None}).is_followed("yes")


def test_an_unknown_language_is_an_error():
    pytest.importorskip("langdetect")
    with pytest.raises(ValueError, match="language 'xx' is unknown"):
        Instruction("language:response_language", {"language": "xx"}).is_followed(ENGLISH)


def test_loosely_a_line_before_or_after_and_asterisks_do_not_count():
    quotation = [Instruction("startend:quotation")]
    wrapped = 'Sure, here it is:\n"All of it."\nI hope that helps!'
    assert followed(wrapped, quotation) == [False]
    assert followed(wrapped, quotation, is_loose=True) == [True]
    assert followed('**"All of it."**', quotation) == [False]
    assert followed('**"All of it."**', quotation, is_loose=True) == [True]
    assert followed("All of it.", quotation, is_loose=True) == [False]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("no end", 1),
        ("One. Two. Three.", 3),
        ("It cost 3.50. Fine!", 2),
        ('"Stop!" he said. "Why?" She left.', 3),
        ("1. First thing.\n2. Second thing.", 2),
        ("He lives at St. Mary's, in the U.S., i.e. abroad.", 1),
        ("What?! No... Yes.", 3),
        ("My answer is no. Thanks.", 2),
        ("一。二！三？", 3),
        ("यह एक वाक्य है। यह दूसरा है।", 2),
    ],
)
def test_sentences_are_counted(text, count):
    assert count_sentences(text) == count


@given(st.text(), st.sampled_from(sorted(CASES.keys() - NEEDS_LANGDETECT)))
def test_no_response_raises(response, name):
    strict, loose = (
        followed(response, [Instruction(name, CASES[name][0])], is_loose=loose)[0] for loose in (False, True)
    )
    assert loose or not strict


@pytest.mark.parametrize("name", sorted(CASES.keys() - NEEDS_LANGDETECT))
@pytest.mark.parametrize("unit", ["*", "[", "<<", "* ", "(", "\n", " ", "a.", "******\n", "```", "P.", "-\n", "A "])
def test_long_responses_are_judged(name, unit):
    assert followed(unit * (50_000 // len(unit)), [Instruction(name, CASES[name][0])])[0] in (True, False)


async def test_accuracies_are_rewards_as_they_are():
    info = {
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
    }
    task = Task(prompt=(user("Write."),), info=info)
    rubric = Rubric([reward(isolated=True)(follows_all), metric(share_followed)])
    environment = SingleTurn(name="ifeval", rubric=rubric, train=[task])
    trace = await play(environment, task, "One, two <<Title>>")
    assert (trace.reward, trace.metrics["share_followed"]) == (0, 0.5)
    assert (await play(environment, task, "One two <<Title>>")).reward == 1
