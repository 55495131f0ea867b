import pytest

from hone.envs import EnvironmentLoadError, StopReason, check_gold, load_environment, play
from hone_arithmetic.environment import read_number


@pytest.fixture(scope="module")
def environment():
    return load_environment("arithmetic")


async def test_gold_answers_score_one(environment):
    for index in range(100):
        assert (await check_gold(environment, environment.train_task(index))).reward == 1
        assert (await check_gold(environment, environment.held_out_task(index))).metrics["first_try"] == 1


def test_a_result_of_more_digits_is_more_difficult(environment):
    tasks = [environment.train_task(index) for index in range(50)]
    assert {environment.difficulty(task) for task in tasks if int(task.reference) in range(-9, 10)} == {1}
    assert {environment.difficulty(task) for task in tasks if int(task.reference) > 999} == {4}


async def test_a_second_answer_that_is_right_earns_part(environment):
    task = environment.train_task(0)
    wrong = str(int(task.reference) + 1)
    trace = await play(environment, task, wrong, task.reference)
    assert trace.reward == 0.5
    assert trace.metrics == {"first_try": 0, "solved": 1}
    assert environment.is_solved(trace)
    assert "too high" in trace.messages[2].content
    assert trace.stop_reason is StopReason.COMPLETED


async def test_wrong_answers_earn_nothing(environment):
    for index in range(20):
        task = environment.train_task(index)
        result = int(task.reference)
        for wrong in [
            "",
            " ",
            "I do not know",
            task.prompt[0].content,
            str(result + 1),
            f"{result} or {result + 1}",
            f"The answer is {result}",
            " ".join(map(str, range(result - 50, result + 50))),
            f"{result}.0",
            f"{result}" * 5000,
            "٤٢",
            "1" * 100_000,
        ]:
            trace = await play(environment, task, wrong, wrong)
            assert trace.failure is None, wrong[:50]
            assert (trace.reward, trace.metrics["solved"]) == (0, 0), wrong[:50]
            assert not environment.is_solved(trace)


async def test_a_truncated_answer_is_judged_as_it_stands(environment):
    task = environment.train_task(0)
    trace = await play(environment, task, "12", truncated=True)
    assert trace.is_truncated
    assert trace.reward == 0
    assert len(trace.turns) == 1


async def test_feedback_tells_the_direction_only_with_hints():
    plain = load_environment("arithmetic", hints=False, tries=3)
    task = plain.train_task(0)
    trace = await play(plain, task, str(int(task.reference) - 1), "what?", task.reference)
    assert trace.messages[2].content == "That is wrong. Try again."
    assert trace.messages[4].content == "That is not a number. Try again."
    assert trace.reward == 0.5


async def test_one_try_gives_no_feedback():
    environment = load_environment("arithmetic", tries=1)
    trace = await play(environment, environment.train_task(0), "no")
    assert len(trace.messages) == 2
    assert trace.stop_reason is StopReason.COMPLETED


def test_no_problem_and_no_mirror_image_is_on_both_sides():
    environment = load_environment("arithmetic", max_operand=20)
    sides = []
    for task_at in (environment.train_task, environment.held_out_task):
        problems = [task_at(index).prompt[0].content.split()[2:5] for index in range(3000)]
        sides.append({(min(a, b), symbol, max(a, b)) for a, symbol, b in ((p[0], p[1], p[2][:-1]) for p in problems)})
    assert not sides[0] & sides[1]
    assert {symbol for _, symbol, _ in sides[0]} == set("+-*")


def test_references_are_the_results(environment):
    for index in range(200):
        task = environment.train_task(index)
        first, symbol, second = task.prompt[0].content.removesuffix("? Answer with the number only.").split()[2:]
        left, right = int(first), int(second)
        assert int(task.reference) == {"+": left + right, "-": left - right, "*": left * right}[symbol]


@pytest.mark.parametrize(
    ("text", "number"),
    [("42", 42), (" -7\n", -7), ("+3", 3), ("007", 7), ("4 2", None), ("42.", None), ("", None), ("--1", None)],
)
def test_only_an_integer_alone_is_an_answer(text, number):
    assert read_number(text) == number


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"operations": "/"}, "among"),
        ({"operations": ""}, "among"),
        ({"max_operand": 0}, "max_operand"),
        ({"tries": 0}, "leaves no answer"),
        ({"later_credit": 1}, "less than the first"),
        ({"held_out_share": 1}, "held_out_share"),
        ({"prompt": "compute"}, "does not contain"),
        ({"num_train_tasks": 0}, "not positive"),
    ],
)
def test_arguments_without_meaning_are_refused(arguments, complaint):
    with pytest.raises(EnvironmentLoadError, match=complaint):
        load_environment("arithmetic", **arguments)
