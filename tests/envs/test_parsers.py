import json
import random
import string
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.envs import parsers
from hone.envs.parsers import (
    boxed,
    choice_letter,
    code_block,
    code_blocks,
    final_answer,
    final_number,
    grid,
    json_value,
    number,
    reasoning,
    tool_calls,
    without_reasoning,
    xml_field,
    xml_fields,
)

PLAIN = st.text(st.characters(blacklist_characters="<>\\{}`~", blacklist_categories=["Cs"]))


@pytest.mark.parametrize(
    ("text", "answer", "thought"),
    [
        ("yes", "yes", None),
        ("<think>hm</think> yes", "yes", "hm"),
        ("hm</think>yes", "yes", "hm"),
        ("<think>a</think>b<think>c</think>d", "d", "a</think>b<think>c"),
        ("<think>never ends: 42", "", "never ends: 42"),
        ("<think>a</think>yes<think>but", "yes", "a"),
        ("</think>", "", ""),
        ("", "", None),
    ],
)
def test_reasoning_is_told_from_the_answer(text, answer, thought):
    assert without_reasoning(text) == answer
    assert reasoning(text) == thought


@given(PLAIN, PLAIN)
def test_any_reasoning_is_removed_and_found(thought, answer):
    assert without_reasoning(f"<think>{thought}</think>{answer}") == answer.strip()
    assert reasoning(f"<think>{thought}</think>{answer}") == thought.strip()


@pytest.mark.parametrize(
    ("text", "last", "first"),
    [
        ("<a>1</a>", "1", "1"),
        ("<a> 1 </a><a>2</a>", "2", "1"),
        ("<a>open <a>2</a>", "2", "2"),
        ("<a>1</a> and <a>open", "1", "1"),
        ("</a><a>", None, None),
        ("<a></a>", "", ""),
        ("<b>1</b>", None, None),
        ("</a> <a>1</a>", "1", "1"),
    ],
)
def test_xml_fields_are_read(text, last, first):
    assert xml_field(text, "a") == last
    assert xml_field(text, "a", "first") == first


@given(st.dictionaries(st.sampled_from(["answer", "reason", "plan"]), PLAIN), PLAIN)
def test_any_fields_are_read_back(fields, prose):
    text = prose.join(f"<{name}>{content}</{name}>" for name, content in fields.items())
    expected = {name: content.strip() for name, content in fields.items()}
    assert xml_fields(text, "answer", "reason", "plan") == expected


@pytest.mark.parametrize(
    ("text", "last", "first"),
    [
        (r"so \boxed{42}.", "42", "42"),
        (r"\boxed{\frac{1}{2}} then \boxed {3}", "3", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", r"\{1, 2\}"),
        (r"\boxed{a \boxed{b} c}", r"a \boxed{b} c", "b"),
        (r"\boxed{1} but \boxed{2", "1", "1"),
        (r"\fbox{x}", "x", "x"),
        (r"} \boxed{5}", "5", "5"),
        (r"{ \boxed{5}", "5", "5"),
        (r"\boxed", None, None),
        (r"\boxed{}", "", ""),
        ("42", None, None),
    ],
)
def test_boxed_results_are_read(text, last, first):
    assert boxed(text) == last
    assert boxed(text, "first") == first


@st.composite
def braced(draw):
    pieces = draw(st.lists(st.sampled_from(["x", "{", "}", r"\{", r"\frac", " ", "1"]), max_size=30))
    depth, kept = 0, []
    for piece in pieces:
        if piece == "}" and not depth:
            continue
        depth += {"{": 1, "}": -1}.get(piece, 0)
        kept.append(piece)
    return "".join(kept) + "}" * depth


@given(braced(), PLAIN)
def test_any_balanced_content_is_read_out_of_its_box(content, prose):
    assert boxed(rf"{prose}\boxed{{{content}}}{prose}") == content.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 5 apples.", 5),
        ("#### 1,234,567", 1_234_567),
        ("$1,200.50 in total", Fraction("1200.5")),
        ("-$5", -5),
        ("$-5", -5),
        ("between 3-5", 5),
        ("x = -5", -5),
        ("(\u22127)", -7),
        ("10 - 3", 3),
        ("3/4 cup", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("2 1/2 cups", Fraction(5, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\dfrac{-3}{4}$.", Fraction(-3, 4)),
        ("5/0 is not 7/0", None),
        ("50%", 50),
        ("1.5e3 m", 1500),
        ("2e-2", Fraction(1, 50)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("1{,}234", 1234),
        (r"10,\!000", 10_000),
        ("1,2345", 2345),
        ("3, 4", 4),
        ("12,5", 5),
        ("step 1: 4\nstep 2: 9 boxes", 9),
        ("none", None),
        ("", None),
        ("9" * 400, None),
        ("7 and " + "9" * 400, 7),
        ("1e999999999", 999_999_999),
    ],
)
def test_the_final_number_is_read(text, expected):
    assert final_number(text) == expected


@given(st.fractions(max_denominator=10_000), st.sampled_from(["", " dollars", "%", ".", "\n", " km/h"]))
def test_any_number_is_read_back(value, unit):
    assert final_number(f"so 17 and then {value}{unit}") == value
    decimal = round(float(value), 3)
    assert final_number(f"it is {decimal:,.3f}{unit}") == Fraction(f"{decimal:.3f}")
    assert number(f" {decimal:,.3f}{unit}") == Fraction(f"{decimal:.3f}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", 18),
        ("$18", 18),
        ("$18$", 18),
        ("-1,000.5", Fraction("-1000.5")),
        ("18 dollars", 18),
        ("18 square metres", 18),
        ("18.", 18),
        ("50%", 50),
        (r"50\%", 50),
        ("18 or 19", None),
        ("about 18", None),
        ("18 - see above, 18", None),
        ("eighteen", None),
        ("", None),
    ],
)
def test_a_text_that_is_one_number_is_read(text, expected):
    assert number(text) == expected


FENCED = """Look:
```Python
first = 1
```
or
~~~py3
~~~
~~~~
```
inner
```
~~~~
  ```python title="a"
  if 1:
      last = 2
  ```
```python
cut off"""


def test_code_blocks_are_read():
    assert [(block.language, block.code) for block in code_blocks(FENCED)] == [
        ("python", "first = 1"),
        ("py3", ""),
        ("", "```\ninner\n```"),
        ("python", "if 1:\n    last = 2"),
    ]
    assert code_block(FENCED, "py") == "if 1:\n    last = 2"
    assert code_block(FENCED, "py", "first") == "first = 1"
    assert code_block(FENCED, "rust") == "```\ninner\n```"
    assert code_block("no code") is None
    assert code_block("inline ```x``` is no block\n```\n1\n```") == "1"


@given(
    st.text(st.characters(blacklist_characters="`\r", blacklist_categories=["Cs"])), st.sampled_from(["```", "~~~~"])
)
def test_any_code_is_read_back(code, fence):
    if "~" in code:
        fence = "```"
    assert code_block(f"text\n{fence}python\n{code}\n{fence}\nmore", "python") == code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ('first {"a": 1} then {"a": {"b": [2]}} end', {"a": {"b": [2]}}),
        ("```json\n[1, 2]\n```", [1, 2]),
        ('say "so" and {"a": "}"}', {"a": "}"}),
        ('{ {"a": 1}', {"a": 1}),
        ('{"a": 1} and {broken}', {"a": 1}),
        (r'{"a": "\"}"}', {"a": '"}'}),
        ("7", None),
        ("[" * 5_000 + "]" * 5_000, None),
        ("", None),
    ],
)
def test_json_is_read(text, expected):
    assert json_value(text) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=30)
@given(
    st.lists(JSON, max_size=3) | st.dictionaries(st.text(), JSON, max_size=3), st.text(st.sampled_from("abc ,:\n.'"))
)
def test_any_json_is_read_out_of_prose(value, prose):
    assert json_value(f"{prose}{json.dumps(value)}{prose}") == value


def test_tool_calls_are_read_out_of_the_text():
    text = (
        'I look. <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><tool_call>{"name": 3}</tool_call>'
        '<tool_call>junk</tool_call><tool_call>{"name": "now"}</tool_call><tool_call>{"name": "cut", "argu'
    )
    assert [(call.id, call.name, json.loads(call.arguments)) for call in tool_calls(text)] == [
        ("call_0", "add", {"a": 1}),
        ("call_1", "now", {}),
    ]
    assert tool_calls('<tool_call>{"name": "a", "arguments": "{\\"b\\": 1}"}</tool_call>')[0].arguments == '{"b": 1}'
    assert tool_calls("nothing") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(c)", "C"),
        ("**D**", "D"),
        ("B) Paris", "B"),
        ("**B.** Paris", "B"),
        ("The answer is (C).", "C"),
        ("The answer is A because B is wrong.", "A"),
        ("The answer is A. No wait, the answer is D.", "D"),
        ("Answer: **B**", "B"),
        ("the correct option is $\\boxed{C}$", "C"),
        (r"\boxed{\text{B}}", "B"),
        ("I would pick this.\nOption C", "C"),
        ("Paris is the capital.\n\nB", "B"),
        ("D. Because of the weather,\nit rains", "D"),
        ("the answer is a cat", None),
        ("the answer is (a)", "A"),
        ("A cat sat on the mat", None),
        ("The answer is E", None),
        ("All of the above", None),
        ("Answers vary", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice_is_read(text, expected):
    assert choice_letter(text) == expected


def test_letters_may_be_others():
    assert choice_letter("The answer is J", "ABCDEFGHIJ") == "J"
    with pytest.raises(ValueError, match="upper-case"):
        choice_letter("a", "abcd")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So the answer is True.", "True"),
        ("The answer is no. Wait.\nThe answer is **yes**.", "yes"),
        ("Answer: ] ] )", "] ] )"),
        (r"answer is x, so \boxed{y}", "y"),
        ("Let me think.\n\n  42. \n", "42"),
        ('The answer is "-3".', "-3"),
        ("The answer is", "The answer is"),
        ("", None),
        ("**", None),
    ],
)
def test_the_final_answer_is_read(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("Input\n1 1\n\nOutput:\n1 2\n3 4\n", [[1, 2], [3, 4]]),
        ("12\n34", [[1, 2], [3, 4]]),
        ("| 1 | 2 |\n| 3 | 4 |", [[1, 2], [3, 4]]),
        ("[[1, 2], [3]]", None),
        ("[[1, 12]]", None),
        ("[[1, true]]", None),
        ("no grid", None),
        ("", None),
    ],
)
def test_grids_are_read(text, expected):
    assert grid(text) == expected


READERS = {
    "final_answer": final_answer,
    "grid": grid,
    "without_reasoning": without_reasoning,
    "reasoning": reasoning,
    "xml_field": lambda text: xml_field(text, "a"),
    "xml_field first": lambda text: xml_field(text, "a", "first"),
    "boxed": boxed,
    "number": number,
    "final_number": final_number,
    "code_blocks": code_blocks,
    "json_value": json_value,
    "tool_calls": tool_calls,
    "choice_letter": choice_letter,
}
PIECES = [
    "<a>", "</a>", "<think>", "</think>", "\\boxed", "\\boxed{", "{", "}", " ", "\n", "1", ",111", "-", "/", "1 ", ".1",
    "\\frac{", "```", "~~~\n", "[", '{"a":', '"', "\\", "answer", "answer ", " is", "(", "A", "*", "$", "e9", "<tool_call>",
]  # fmt: skip


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_text_raises(read, text):
    read(text)


@pytest.mark.slow
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_adversarial_texts_take_linear_time(read):
    """Sixteen times the text may take at most a hundred times as long; quadratic code takes 256 times."""
    dice = random.Random(0)
    texts = [[piece] for piece in PIECES] + [dice.choices(PIECES, k=3) for _ in range(20)]
    for pieces in texts:
        unit = "".join(pieces)
        small, large = (unit * (size // len(unit)) for size in (4_000, 64_000))
        assert seconds(read, large) < 100 * seconds(read, small) + 0.1, unit


def seconds(read, text):
    """Processor time; the better of two, because one may have met the garbage collector."""
    taken = []
    for _ in range(2):
        started = time.process_time()
        read(text)
        taken.append(time.process_time() - started)
    return min(taken)


def test_the_module_offers_what_is_tested_here():
    public = {name for name, value in vars(parsers).items() if name[0] in string.ascii_lowercase and callable(value)}
    public = {name for name in public if getattr(parsers, name).__module__ == parsers.__name__}
    assert public == {*(name.split()[0] for name in READERS), "xml_fields", "code_block"}
