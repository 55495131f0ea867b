"""The public GSM8K problems: every gold answer scores 1, and broken ones score 0."""

import asyncio
import functools
import json
import re

import pytest

from hone.envs.verifiers.match import is_close
from hone.envs.verifiers.math import is_equivalent
from public_data import ABSENT, DATA

GSM8K = DATA / "gsm8k"
STUBS = ["", "I do not know.", "####", "The answer is the number of apples.", r"\boxed{}"]

pytestmark = pytest.mark.skipif(not GSM8K.exists(), reason=ABSENT)


@functools.cache
def golds():
    """The worked answers, which end with #### and the result, and the results."""
    lines = [line for path in sorted(GSM8K.glob("*.jsonl")) for line in path.read_text().splitlines()]
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 1319 + 1500
    return [(answer, answer.rpartition("####")[2].strip()) for answer in answers]


def changed(answer, by):
    """The answer with another number at its end."""
    head, mark, result = answer.rpartition("####")
    number = re.sub(r"[^\d.-]", "", result)
    return f"{head}{mark} {int(number) + by:,}"


@pytest.mark.parametrize("by", [1, -1000])
def test_final_numbers_of_changed_answers_are_wrong(by):
    assert [answer for answer, result in golds() if is_close(changed(answer, by), result)] == []


def test_final_numbers_of_gold_answers_are_right():
    assert [answer for answer, result in golds() if not is_close(answer, result)] == []


@pytest.mark.parametrize("stub", STUBS)
def test_stubs_have_no_right_final_number(stub):
    assert [answer for answer, result in golds() if is_close(stub, result)] == []


def forms(result):
    """How a model might write a right result."""
    plain = result.replace(",", "")
    return [
        rf"So it is \boxed{{{result}}}.",
        rf"\boxed{{\frac{{{2 * int(plain)}}}{{2}}}}",
        f"${plain}$",
        f"{plain} + 0",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("by", [0, 1])
async def test_mathematical_results_are_right_and_changed_ones_wrong(by):
    pytest.importorskip("math_verify")

    async def judge(result):
        target = f"{int(result.replace(',', '')) + by}"
        verdicts = [await is_equivalent(form, result) for form in forms(target)]
        return [form for form, verdict in zip(forms(target), verdicts, strict=True) if verdict is (by != 0)]

    results = sorted({result for _, result in golds()})
    assert len(results) > 500
    assert [form for wrong in await asyncio.gather(*map(judge, results)) for form in wrong] == []


@pytest.mark.slow
@pytest.mark.parametrize("stub", STUBS)
async def test_stubs_are_no_mathematical_results(stub):
    pytest.importorskip("math_verify")
    results = sorted({result for _, result in golds()})
    assert not any(await asyncio.gather(*(is_equivalent(stub, result) for result in results)))
