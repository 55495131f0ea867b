"""Each check finds the fault that it is for, and a sound environment passes all of them."""

import asyncio
import itertools
import random
import subprocess
import sys
import tempfile

import pytest

from hone.envs import (
    MultiTurn,
    Rubric,
    SingleTurn,
    Task,
    Tasks,
    ToolSpec,
    ToolUse,
    assistant,
    leftovers,
    load_environment,
    metric,
    reward,
    tool,
    tool_call,
    tool_result,
    user,
)
from hone.envs.checks import compare_fingerprints, validate
from hone.envs.fingerprint import fingerprint, fingerprint_elsewhere


@reward
def exact(answer, reference):
    return answer.strip() == reference


def number(index):
    return Task(prompt=(user(f"What comes after {index}?"),), reference=str(index + 1))


def environment_of(*measures, train=None, held_out=None, gold=None, kind=SingleTurn, **more):
    return kind(
        name="e",
        rubric=Rubric(measures or [exact]),
        train=Tasks(number, 30) if train is None else train,
        held_out=Tasks(lambda index: number(100 + index), 30) if held_out is None else held_out,
        gold=gold or (lambda task: [assistant(task.reference)]),
        **more,
    )


async def problems(environment, num_tasks=4):
    return {check.name: check.problems for check in await validate(environment, num_tasks=num_tasks) if check.problems}


@pytest.mark.parametrize("name", ["reverse_text", "arithmetic"])
async def test_a_sound_environment_passes(name):
    assert await problems(load_environment(name)) == {}


async def test_a_gold_answer_that_does_not_score_is_told():
    found = await problems(environment_of(gold=lambda task: [assistant("wrong")]))
    assert list(found) == ["gold answers score full marks"]
    assert len(found["gold answers score full marks"]) == 8
    assert "has reward 0.0, not 1" in found["gold answers score full marks"][0]


def lenient(answer, reference):
    return reference in answer


def takes_anything(answer):
    return 1.0


def takes_silence(answer, reference):
    return not answer.strip() or answer == reference


def believes(answer, reference):
    return "CORRECT" in answer or answer == reference


def takes_a_prefix(answer, reference):
    return bool(answer.strip()) and reference.startswith(answer[:1])


@pytest.mark.parametrize(
    ("judge", "caught"),
    [
        (lenient, {"all options listed"}),
        (takes_silence, {"empty", "white space"}),
        (believes, {"instructions to the judge"}),
        (takes_a_prefix, {"the gold answer cut in half"}),
    ],
)
async def test_a_reward_that_can_be_fooled_is_caught(judge, caught):
    tasks = Tasks(lambda index: number(10 + index), 30)
    found = {
        name.removeprefix("no full marks: ") for name in await problems(environment_of(reward(judge), train=tasks))
    }
    assert caught <= found


async def test_a_reward_that_takes_anything_is_caught_by_every_attack():
    found = await problems(environment_of(reward(takes_anything)))
    assert sum(name.startswith("no full marks") for name in found) == 10


async def test_the_authors_own_wrong_answers_are_tried():
    @reward
    def also_words(answer, reference):
        return answer in (reference, "five")

    environment = environment_of(also_words, wrong=lambda task: {"in words": "five"})
    found = await problems(environment)
    assert list(found) == ["no full marks: in words"]
    assert "counts as solved, with reward 1" in found["no full marks: in words"][0]


async def test_a_reward_that_raises_on_a_strange_answer_is_told():
    @reward
    def fragile(answer, reference):
        return int(answer) == int(reference)

    found = await problems(environment_of(fragile))
    assert "environment, reward fragile: ValueError: invalid literal" in found["no full marks: empty"][0]


async def test_a_metric_that_raises_is_told():
    @metric
    def digits(answer):
        return len(answer) / (len(answer) - 1)

    assert "metric digits fails" in str(
        (await problems(environment_of(exact, digits)))["gold answers score full marks"]
    )


async def test_full_marks_are_those_of_the_gold_answer_where_nothing_reaches_one():
    class Halves(SingleTurn):
        def is_solved(self, trace):
            return trace.reward > 0.45 and trace.num_completion_tokens >= 0 and trace.messages[-1].content != ""

    @reward(weight=0.5)
    def generous(answer, reference):
        return answer.strip() in ("", reference)

    found = await problems(environment_of(generous, kind=Halves))
    assert "has the reward of the gold answer, 0.5" in found["no full marks: empty"][0]


async def test_a_gold_answer_that_is_drawn_anew_is_told():
    answers = map(str, itertools.count())
    found = await problems(environment_of(gold=lambda task: [assistant(next(answers))]))
    assert "the same index gives the same task and gold answer" in found


async def test_a_reward_that_is_drawn_anew_is_told():
    draws = itertools.count()

    @reward(weight=1.0)
    def drifts(answer, reference):
        return (answer == reference) * (1 + next(draws) / 1000)

    assert "gold answers score the same again" in await problems(environment_of(drifts))


async def test_tasks_that_are_drawn_anew_are_told():
    generator = random.Random(0)
    found = await problems(environment_of(train=Tasks(lambda index: number(generator.randrange(10**6)), 30)))
    assert "train task 0: is another task" in found["the same index gives the same task and gold answer"][0]


async def test_overlapping_splits_are_told_even_when_only_the_info_differs():
    def noted(index):
        task = number(index)
        return Task(prompt=task.prompt, reference=task.reference, info={"id": f"held out {index}"})

    found = await problems(environment_of(held_out=Tasks(noted, 30)))
    assert len(found["train and held-out tasks are disjoint"]) == 30


async def test_games_with_one_prompt_and_no_reference_are_no_overlap():
    def game(side):
        return lambda index: Task(prompt=(user("Play."),), info={"seed": f"{side} {index}"})

    environment = environment_of(
        train=Tasks(game("train"), 9), held_out=Tasks(game("held out"), 9), gold=lambda task: []
    )
    assert "train and held-out tasks are disjoint" not in await problems(environment)


async def test_a_task_that_comes_twice_is_told_unless_tasks_are_endless():
    repeating = Tasks(lambda index: number(index % 10), 30)
    assert len((await problems(environment_of(train=repeating)))["no task comes twice"]) == 20
    assert await problems(environment_of(train=Tasks(lambda index: number(index % 10)))) == {}


async def test_what_no_template_can_render_is_told():
    unspeakable = ToolSpec("add", "adds", {"default": object()})
    found = await problems(environment_of(tools=[unspeakable]), num_tasks=1)
    told = found["prompts and gold conversations render in every chat template"]
    assert {problem.split(": ")[1] for problem in told} == {"chatml", "qwen3", "glm4", "llama3"}


class LeavesTask(SingleTurn):
    async def setup(self, rollout):
        rollout.state = asyncio.create_task(asyncio.sleep(60))


class LeavesFile(SingleTurn):
    async def setup(self, rollout):
        tempfile.mkstemp()


class LeavesProcess(SingleTurn):
    async def setup(self, rollout):
        self.processes = [
            *getattr(self, "processes", []),
            subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1),
        ]


@pytest.mark.parametrize(
    ("kind", "left"),
    [(LeavesTask, "asyncio tasks"), (LeavesFile, "temporary files"), (LeavesProcess, "child processes")],
)
async def test_what_rollouts_leave_behind_is_told(kind, left, monkeypatch):
    monkeypatch.setattr(leftovers, "LINGER_SECONDS", 0.05)
    environment = environment_of(kind=kind)
    try:
        found = await problems(environment, num_tasks=1)
        assert any(left in problem for problem in found["rollouts leave nothing behind"])
    finally:
        for process in getattr(environment, "processes", []):
            process.communicate(b"\n")


async def test_a_teardown_that_fails_is_told():
    class Breaks(SingleTurn):
        async def teardown(self, rollout):
            raise OSError("cannot release")

    found = await problems(environment_of(kind=Breaks), num_tasks=1)
    assert "teardown fails" in found["gold answers score full marks"][0]


async def test_a_conversation_without_end_is_played_for_a_while_only():
    class Endless(MultiTurn):
        async def reply(self, rollout):
            return None if rollout.answer == rollout.task.reference else [user("again")]

    assert await problems(environment_of(kind=Endless), num_tasks=2) == {}


async def test_tools_are_attacked_and_tool_errors_may_end_a_rollout():
    @tool
    def successor(n: int) -> int:
        """The number after n."""
        return n + 1

    def gold(task):
        n = int(task.reference) - 1
        return [assistant("", tool_call("successor", {"n": n})), tool_result(str(n + 1)), assistant(str(n + 1))]

    for policy in ("show", "fail"):
        environment = environment_of(kind=ToolUse, tools=[successor], on_error=policy, gold=gold, max_turns=4)
        checks = {check.name: check for check in await validate(environment, num_tasks=2)}
        assert {name: check.problems for name, check in checks.items() if check.problems} == {}
        assert checks["no full marks: a tool that does not exist"].num_tried == 4


async def test_without_tasks_nothing_can_be_said():
    with pytest.raises(ValueError, match="has no tasks"):
        await validate(environment_of(train=[], held_out=[]))


def test_a_second_process_gives_the_same_fingerprint():
    here = fingerprint(load_environment("arithmetic", max_operand=9), 5)
    assert len(here) == 10
    assert fingerprint_elsewhere("arithmetic", {"max_operand": 9}, 5) == here
    other = fingerprint_elsewhere("arithmetic", {"max_operand": 8}, 5)
    assert "is another task" in compare_fingerprints("same", here, other).problems[0]


def test_a_second_process_that_cannot_load_is_told():
    with pytest.raises(ValueError, match="its arguments are"):
        fingerprint_elsewhere("arithmetic", {"no_such": 1}, 5)
