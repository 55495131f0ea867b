import pytest

from hone.envs import Rubric, SingleTurn, Task, ToolSpec, assistant, reward, user
from hone.envs.attacks import EMPTY, HALF, LISTED, NAMES, NUMBER, OTHER, PROMPT, UNKNOWN_TOOL, attacks_on


@reward
def exact(answer, reference):
    return answer == reference


def task_of(question, reference):
    return Task(prompt=(user(question),), reference=reference)


def environment_of(tasks, *, gold=None, wrong=None, tools=()):
    answer = gold or (lambda task: [assistant(task.reference)])
    return SingleTurn(name="e", rubric=Rubric([exact]), train=tasks, gold=answer, wrong=wrong, tools=tools)


def texts(environment, task, others=()):
    return {attack.name: attack.messages[-1].content for attack in attacks_on(environment, task, others)}


def test_attacks_are_made_of_the_task_and_of_others():
    task, other = task_of("17 + 25?", "42"), task_of("1 + 1?", "2")
    found = texts(environment_of([task]), task, [other])
    assert found[EMPTY] == ""
    assert found[PROMPT] == "17 + 25?"
    assert found[OTHER] == "2"
    assert found[NUMBER] == "43"
    assert found[HALF] == "4"
    assert found[LISTED] == "42, 2"
    assert UNKNOWN_TOOL not in found


def test_listed_options_stand_in_the_form_of_the_gold_answer_and_the_right_one_is_not_the_last():
    tasks = [task_of(f"{n}?", str(n)) for n in range(3)]
    environment = environment_of(tasks, gold=lambda task: [assistant(f"<answer>{task.reference}</answer>")])
    found = texts(environment, tasks[0], tasks[1:])
    assert found[LISTED] == "<answer>1, 0, 2</answer>"
    assert found[OTHER] == "<answer>1</answer>"


def test_whole_answers_are_listed_where_the_gold_answer_does_not_quote_the_reference():
    tasks = [task_of(f"{n}?", f"assert f() == {n}") for n in range(3)]
    programs = {task.key: f"def f(): return {n}" for n, task in enumerate(tasks)}
    environment = environment_of(tasks, gold=lambda task: [assistant(programs[task.key])])
    listed = texts(environment, tasks[0], tasks[1:])[LISTED]
    assert listed == "def f(): return 1, def f(): return 0, def f(): return 2"


@pytest.mark.parametrize("echo", ["level", " Level\n"])
def test_an_attack_that_says_the_right_answer_is_left_out(echo):
    task = task_of(echo, "level")
    assert PROMPT not in texts(environment_of([task]), task)
    same = task_of("other", "level")
    assert OTHER not in texts(environment_of([task]), task, [same])


def test_a_conversation_is_cut_after_half_of_its_turns():
    task = task_of("?", "3")
    environment = environment_of(
        [task], gold=lambda task: [assistant("1"), user("higher"), assistant("2"), user("higher"), assistant("3")]
    )
    (half,) = (attack for attack in attacks_on(environment, task, []) if attack.name == HALF)
    assert [message.content for message in half.messages] == ["1"]
    assert half.truncated
    assert not half.repeats


def test_tool_attacks_need_tools():
    task = task_of("?", "3")
    environment = environment_of([task], tools=[ToolSpec("add", "adds", {"type": "object"})])
    called = {
        attack.name: attack.messages[0].tool_calls[0]
        for attack in attacks_on(environment, task, [])
        if attack.messages[0].tool_calls
    }
    assert [call.name for call in called.values()] == ["no_such_tool", "add"]


def test_the_environments_own_wrong_answers_are_added_and_may_take_a_generic_one_out():
    task = task_of("17 + 25?", "42")
    environment = environment_of([task], wrong=lambda task: {"in words": "forty-two", NUMBER: None})
    found = texts(environment, task)
    assert found["in words"] == "forty-two"
    assert NUMBER not in found


def test_without_a_known_answer_the_attacks_that_need_none_are_left():
    task = Task(prompt=(user("Write a poem."),))
    environment = SingleTurn(name="e", rubric=Rubric([exact]), train=[task])
    found = texts(environment, task)
    assert set(found) == set(NAMES) - {OTHER, NUMBER, HALF, LISTED, UNKNOWN_TOOL, "tool arguments that are no JSON"}
