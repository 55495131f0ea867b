"""Verifiers in processes of their own: what an answer causes is a wrong answer, other trouble is a failure."""

import asyncio
import os
import signal
import time

import pytest

from hone.envs import FailureClass, RolloutFailure, Rubric, SingleTurn, Task, play, reward, user
from hone.envs.isolation import place_of
from hone.envs.verifiers import budget
from hone.envs.verifiers.budget import is_confirmed
from hone.envs.verifiers.json_schema import fits_schema
from hone.envs.verifiers.math import MAX_CHARACTERS, is_equivalent
from hone.envs.verifiers.regex import matches


def check(way):
    if way == "works":
        while True:
            pass
    if way == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "raises":
        raise ValueError("the reference is broken")
    if way == "stands still":
        time.sleep(1_000)
    return way == "right"


CHECK = place_of(check)


@pytest.mark.parametrize(("way", "expected"), [("right", True), ("wrong", False), ("works", False), ("crashes", False)])
async def test_what_an_answer_causes_is_a_wrong_answer(way, expected):
    assert await is_confirmed(CHECK, {"way": way}, {"way": "right"}, 0.1) is expected


@pytest.mark.parametrize(
    ("way", "harmless", "kind"),
    [
        ("raises", "right", FailureClass.ENVIRONMENT),
        ("is killed", "right", FailureClass.WORKER),
        ("stands still", "right", FailureClass.TIMEOUT),
        ("works", "works", FailureClass.ENVIRONMENT),
        ("crashes", "raises", FailureClass.ENVIRONMENT),
        ("crashes", "stands still", FailureClass.TIMEOUT),
    ],
)
async def test_other_trouble_is_a_failure(way, harmless, kind, monkeypatch):
    monkeypatch.setattr(budget, "DEADLINE_SECONDS", 0.5)
    with pytest.raises(RolloutFailure) as caught:
        await is_confirmed(CHECK, {"way": way}, {"way": harmless}, 0.1)
    assert caught.value.failure.kind is kind


EQUAL = [
    ("0.5", r"\frac{1}{2}"),
    (r"\boxed{\frac{2}{4}}", "1/2"),
    (r"so the result is $x = 5$", "5"),
    ("1,000", "1000"),
    ("2 1/2", "5/2"),
    ("50%", "0.5"),
    (r"\{2, 1\}", r"\{1, 2\}"),
    ("(x-1)(x+1)", "x^2-1"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("10^{-3}", "0.001"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    ("Monday", "monday"),
    (r"5\text{ cm}", "5"),
]
UNEQUAL = [
    ("", "5"),
    ("6", "5"),
    ("5 or 6", "5"),
    ("either $5$ or $6$", "6"),
    ("1 2 3 4", "10"),
    ("4, 5, 6", "5"),
    ("1", "2 1/2"),
    ("(2,1)", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("-x", "x"),
    ("Tuesday", "Monday"),
    (r"\boxed{}", "5"),
    (r"$\frac{", "5"),
    ("I do not know", "5"),
    ("9" * (MAX_CHARACTERS + 1), "5"),
]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"), [(*p, True) for p in EQUAL] + [(*p, False) for p in UNEQUAL]
)
async def test_mathematical_equivalence(answer, reference, expected):
    pytest.importorskip("math_verify")
    assert await is_equivalent(answer, reference) is expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "$9^{9^{9^{9}}}$",
        "9^{9^{9}}!",
        r"$\sum_{n=1}^{10^{12}} \frac{1}{n^2+n+1}$",
        r"\frac{" * 2_000 + "1" + "}{2}" * 2_000,
        "(" * 3_000 + "1" + ")" * 3_000,
        r"$\int_0^1 e^{x^2} \sin(x^3) dx$",
        "x^" * 3_000 + "x",
        "{" * 2_000,
    ],
)
async def test_an_answer_that_hangs_the_comparison_is_wrong_and_the_next_is_judged(answer):
    pytest.importorskip("math_verify")
    assert await is_equivalent(answer, "7", cpu_seconds=2) is False
    assert await is_equivalent("x+1", "1+x") is True


@pytest.mark.parametrize("reference", ["", "see above: it depends", r"\frac{"])
async def test_a_reference_that_is_no_mathematics_is_a_failure(reference):
    pytest.importorskip("math_verify")
    task = Task(prompt=(user("?"),), reference=reference)
    environment = SingleTurn(name="math", rubric=Rubric([reward(is_equivalent)]), train=[task])
    trace = await play(environment, task, "7")
    assert trace.failure.kind is FailureClass.ENVIRONMENT
    assert "reference" in trace.failure.message


@pytest.mark.parametrize(
    ("answer", "pattern", "where", "expected"),
    [
        ("abc", "[a-c]+", "all", True),
        (" abc\n", "[a-c]+", "all", True),
        ("abcd", "[a-c]+", "all", False),
        ("xyz abc", "[a-c]+", "somewhere", True),
        ("", "a+", "all", False),
        ("a" * 40 + "b", "(a|a)*", "all", False),
    ],
)
async def test_regular_expressions(answer, pattern, where, expected):
    assert await matches(answer, pattern, where=where, cpu_seconds=0.2) is expected


async def test_a_pattern_that_is_none_is_a_failure():
    with pytest.raises(RolloutFailure, match="unterminated"):
        await matches("a", "(")


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"age": 3}', True),
        ('Here it is:\n```json\n{"age": 3}\n```', True),
        ('{"age": -3}', False),
        ('{"age": "3"}', False),
        ('{"age": 3, "name": "x"}', False),
        ("{}", False),
        ("[]", False),
        ("", False),
        ('{"age": 3', False),
    ],
)
async def test_json_schemas(answer, expected):
    pytest.importorskip("jsonschema")
    assert await fits_schema(answer, SCHEMA) is expected


async def test_strict_json_is_nothing_else():
    pytest.importorskip("jsonschema")
    assert await fits_schema(' {"age": 3} ', SCHEMA, is_strict=True)
    assert not await fits_schema('So: {"age": 3}', SCHEMA, is_strict=True)
    assert not await fits_schema("NaN", {"type": "number"}, is_strict=True)


@pytest.mark.slow
async def test_an_answer_that_hangs_the_validation_does_not_fit():
    pytest.importorskip("jsonschema")
    schema = {"type": "array", "items": {"pattern": "^(a|a)*$"}}
    assert not await fits_schema('["' + "a" * 40 + 'b"]', schema, cpu_seconds=1.0)


async def test_a_schema_that_is_none_is_a_failure():
    pytest.importorskip("jsonschema")
    with pytest.raises(RolloutFailure, match="'nonsense' is not valid"):
        await fits_schema("{}", {"type": "nonsense"})


async def test_many_verifications_at_once_are_all_judged():
    answers = await asyncio.gather(*(matches("a" * n, "(aa)*") for n in range(20)))
    assert answers == [n % 2 == 0 for n in range(20)]
