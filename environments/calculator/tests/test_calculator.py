import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.envs import EnvironmentLoadError, StopReason, assistant, check_gold, load_environment, play, tool_call
from hone_calculator.environment import read_number
from hone_calculator.expressions import evaluate


@pytest.fixture(scope="module")
def environment():
    return load_environment("calculator")


def ask(expression, number=0):
    return assistant("", tool_call("calculate", {"expression": expression}, id=f"call_{number}"))


async def test_gold_conversations_score_one_and_call_the_tool(environment):
    for index in range(100):
        assert (await check_gold(environment, environment.train_task(index))).reward == 1
        trace = await check_gold(environment, environment.held_out_task(index))
        assert (trace.metrics["asked"], trace.metrics["asked_right"], trace.metrics["num_tool_calls"]) == (1, 1, 1)


async def test_the_reward_is_for_the_answer_and_not_for_the_call(environment):
    task = environment.train_task(0)
    wrong = str(int(task.reference) + 1)
    asked = await play(environment, task, ask(task.info["problem"]), wrong)
    assert (asked.reward, asked.metrics["asked_right"]) == (0, 1)
    guessed = await play(environment, task, task.reference)
    assert (guessed.reward, guessed.metrics["asked"]) == (1, 0)
    recovered = await play(environment, task, ask("1+"), ask(task.info["problem"], 1), task.reference)
    assert (recovered.reward, recovered.metrics["num_tool_errors"]) == (1, 1)
    assert recovered.messages[2].content.startswith("Error: ")


async def test_wrong_answers_earn_nothing(environment):
    for index in range(20):
        task = environment.train_task(index)
        result = int(task.reference)
        for wrong in [
            "",
            " ",
            "I do not know",
            task.prompt[0].content,
            task.info["problem"],
            f'calculate("{task.info["problem"]}")',
            str(result + 1),
            str(-result or 1),
            f"{result} or {result + 1}",
            f"The answer is {result}",
            " ".join(map(str, range(result - 50, result + 50))),
            f"{result}.0",
            "٤٢",
            "1" * 100_000,
            ask(str(result)),  # a call in place of an answer, again and again
        ]:
            trace = await play(
                environment, task, *[ask(task.info["problem"]), wrong] if isinstance(wrong, str) else [wrong] * 4
            )
            assert trace.failure is None, str(wrong)[:50]
            assert trace.reward == 0, str(wrong)[:50]
            assert not environment.is_solved(trace)


async def test_a_number_beside_a_call_is_no_answer(environment):
    task = environment.train_task(0)
    call = tool_call("calculate", {"expression": "1"})
    trace = await play(environment, task, *[assistant(task.reference, call)] * 4)
    assert trace.stop_reason is StopReason.MAX_TOOL_CALLS
    assert trace.reward == 0


async def test_a_truncated_answer_is_judged_as_it_stands(environment):
    task = environment.train_task(0)
    trace = await play(environment, task, ask(task.info["problem"]), task.reference[:-1], truncated=True)
    assert trace.is_truncated
    assert trace.reward == 0


def test_problems_of_the_same_parts_are_on_one_side():
    environment = load_environment("calculator", max_operand=9, max_operators=1)
    sides = [
        {tuple(sorted(task_at(index).info["problem"])) for index in range(2000)}
        for task_at in (environment.train_task, environment.held_out_task)
    ]
    assert not sides[0] & sides[1]


def test_references_are_the_results(environment):
    for index in range(300):
        task = environment.train_task(index)
        problem = task.prompt[0].content.removeprefix("What is ").partition("?")[0]
        assert task.info["problem"] == problem
        assert int(task.reference) == eval(problem)


@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from("+-*"), inner).map("".join),
            inner.map(lambda text: f"({text})"),
            inner.map(lambda text: f"-{text}"),
        ),
        max_leaves=8,
    )
)
def test_expressions_have_the_value_that_python_gives_them(expression):
    if len(expression) <= 100:
        assert evaluate(expression) == evaluate(f" {expression} ".strip()) == eval(expression)


@given(st.text(alphabet="0123456789+-*() /.eExj_a[]='\"٤", max_size=120))
def test_no_text_does_anything_but_give_an_integer_or_a_complaint(text):
    with contextlib.suppress(ValueError):
        assert type(evaluate(text)) is int


@pytest.mark.parametrize(
    "text", ["2**3", "9**9**9", "1/2", "1//2", "0x10", "1_000", "1e3", "~1", "a", "()", "", "1,2", "(" * 99]
)
def test_what_is_no_expression_of_integers_is_refused(text):
    with pytest.raises(ValueError, match=r"expression|made of"):
        evaluate(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [("42", 42), (" -7\n", -7), ("+3", 3), ("007", 7), ("4 2", None), ("42.", None), ("", None), ("--1", None)],
)
def test_only_an_integer_alone_is_an_answer(text, number):
    assert read_number(text) == number


def test_the_tool_tells_what_it_takes(environment):
    [spec] = environment.tools
    assert spec.name == "calculate"
    assert json.dumps(spec.parameters["required"]) == '["expression"]'


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"operators": "/"}, "among"),
        ({"operators": ""}, "among"),
        ({"max_operand": 0}, "max_operand"),
        ({"max_operators": 0}, "max_operators"),
        ({"max_tool_calls": -1}, "max_tool_calls"),
        ({"held_out_share": 1}, "held_out_share"),
        ({"prompt": "compute"}, "does not contain"),
        ({"num_train_tasks": 0}, "not positive"),
    ],
)
def test_arguments_without_meaning_are_refused(arguments, complaint):
    with pytest.raises(EnvironmentLoadError, match=complaint):
        load_environment("calculator", **arguments)
