"""inspect_ai's tasks as environments: its own solvers write the prompts and its own scorers judge."""

import pytest

from hone.envs import check_gold, play
from hone.envs.bridges import BridgeError

inspect_ai = pytest.importorskip("inspect_ai", reason="inspect_ai is an extra")

from inspect_ai import Task  # noqa: E402 - after the skip
from inspect_ai.dataset import FieldSpec, Sample, example_dataset  # noqa: E402
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ContentImage  # noqa: E402
from inspect_ai.scorer import Score, accuracy, choice, includes, match, model_graded_qa, scorer  # noqa: E402
from inspect_ai.solver import (  # noqa: E402
    chain_of_thought,
    generate,
    multiple_choice,
    self_critique,
    solver,
    system_message,
    use_tools,
)
from inspect_ai.tool import think  # noqa: E402

from hone.envs.bridges.inspect_ai import environment_from, load_environment  # noqa: E402

SUMS = [Sample(input=f"What is {n} + {n}?", target=str(2 * n)) for n in range(1, 9)]
CAPITALS = [
    Sample(input="What is the capital of France?", choices=["Lyon", "Paris", "Nice"], target="B"),
    Sample(input="Which are in Italy?", choices=["Rome", "Bern", "Milan"], target=["A", "C"]),
]


def held_out(environment):
    return [environment.held_out_task(n) for n in range(environment.num_held_out_tasks)]


async def test_match_scores_what_its_solver_asked_for():
    solvers = [system_message("Be brief."), chain_of_thought(), generate()]
    environment = environment_from(Task(dataset=SUMS, solver=solvers, scorer=match()))
    [task, *_] = tasks = held_out(environment)
    assert len(tasks) == 8
    assert [message.role for message in task.prompt] == ["system", "user"]
    assert "What is 1 + 1?" in task.prompt[1].content
    assert "ANSWER: $ANSWER" in task.prompt[1].content
    for answer, value in (("I think\nANSWER: 2", 1.0), ("ANSWER: 3", 0.0), ("", 0.0), ("2 or so, or 5", 0.0)):
        assert (await play(environment, task, answer)).reward == value


async def test_includes_finds_the_target_anywhere():
    environment = environment_from(Task(dataset=SUMS, solver=generate(), scorer=includes()))
    task = environment.held_out_task(3)
    assert (await play(environment, task, "It is 8, of course.")).reward == 1.0
    assert (await play(environment, task, "It is 9.")).reward == 0.0


async def test_choices_are_asked_and_judged_by_letter():
    environment = environment_from(Task(dataset=CAPITALS[:1], solver=multiple_choice(), scorer=choice()))
    task = environment.held_out_task(0)
    assert "A) Lyon\nB) Paris\nC) Nice" in task.prompt[0].content
    for answer, value in (("ANSWER: B", 1.0), ("ANSWER: A", 0.0), ("Paris", 0.0), ("", 0.0)):
        assert (await play(environment, task, answer)).reward == value
    several = environment_from(
        Task(dataset=CAPITALS[1:], solver=multiple_choice(multiple_correct=True), scorer=choice())
    )
    task = several.held_out_task(0)
    for answer, value in (("ANSWER: A,C", 1.0), ("ANSWER: A", 0.0), ("ANSWER: A,B,C", 0.0)):
        assert (await play(several, task, answer)).reward == value


@pytest.mark.parametrize(
    "task",
    [
        Task(dataset=SUMS, solver=generate(), scorer=match()),
        Task(dataset=CAPITALS[:1], solver=multiple_choice(), scorer=choice()),
        Task(dataset=CAPITALS[1:], solver=multiple_choice(multiple_correct=True), scorer=choice()),
    ],
)
async def test_gold_answers_earn_full_marks(task):
    environment = environment_from(task)
    for one in held_out(environment):
        assert (await check_gold(environment, one)).reward == 1.0


async def test_a_data_set_that_inspect_ships_is_an_evaluation():
    opinions = example_dataset("popularity", FieldSpec(input="question", target="answer_matching_behavior"))
    environment = environment_from(Task(dataset=opinions, solver=generate(), scorer=match()))
    assert (environment.num_train_tasks, environment.num_held_out_tasks) == (0, 100)
    rewards = [(await play(environment, task, "Yes")).reward for task in held_out(environment)]
    assert 0 < sum(rewards) < 100
    assert set(rewards) == {0.0, 1.0}


async def test_several_scorers_share_the_reward():
    environment = environment_from(Task(dataset=SUMS, solver=generate(), scorer=[includes(), match(), match()]))
    trace = await play(environment, environment.held_out_task(0), "2 it is")
    assert {name: part.value for name, part in trace.rewards.items()} == {
        "includes": 1.0,
        "match_2": 0.0,
        "match_3": 0.0,
    }
    assert trace.reward == pytest.approx(1 / 3)


async def test_a_conversation_may_be_the_input_and_samples_may_be_trained():
    chat = [
        Sample(input=[ChatMessageSystem(content="Count."), ChatMessageUser(content=f"{n}?")], target="x")
        for n in range(40)
    ]
    environment = environment_from(Task(dataset=chat, solver=generate(), scorer=match()), held_out_share=0.3)
    assert environment.num_train_tasks + environment.num_held_out_tasks == 40
    assert 15 < environment.num_train_tasks < 40
    assert environment.train_task(0).prompt[0].content == "Count."


async def test_a_score_that_is_no_single_value_is_a_failure():
    @scorer(metrics=[accuracy()])
    def split():
        async def score(state, target):
            return Score(value={"form": 1, "content": 0})

        return score

    environment = environment_from(Task(dataset=SUMS, solver=generate(), scorer=split()))
    trace = await play(environment, environment.held_out_task(0), "2")
    assert "the scorer's value is dict" in trace.failure.message


@solver
def says_nothing():
    async def solve(state, generate):
        return state

    return solve


@solver
def asks_twice():
    async def solve(state, generate):
        return await generate(await generate(state))

    return solve


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"scorer": model_graded_qa()}, "scorer model_graded_qa asks a model"),
        ({"scorer": None}, "has no scorer"),
        ({"sandbox": "docker"}, "runs in a sandbox"),
        ({"solver": asks_twice()}, "asks the model more than once"),
        ({"solver": says_nothing()}, "does not ask the model"),
        ({"solver": [use_tools(think()), generate()]}, "gives tools to the model"),
        ({"solver": [generate(), self_critique()]}, "cannot take an answer"),
        ({"dataset": [Sample(input="?", target="!", files={"a": "b"})]}, "runs in a sandbox"),
        (
            {"dataset": [Sample(input=[ChatMessageUser(content=[ContentImage(image="a.png")])], target="!")]},
            "not plain text",
        ),
    ],
)
def test_what_the_bridge_cannot_run_is_refused(fields, complaint, monkeypatch):
    monkeypatch.delenv("INSPECT_EVAL_MODEL", raising=False)
    task = Task(**{"dataset": SUMS, "solver": generate(), "scorer": match()} | fields)
    with pytest.raises(BridgeError, match=complaint):
        environment_from(task)


def test_a_task_is_found_by_the_name_of_its_function(tmp_path, monkeypatch):
    (tmp_path / "sums_of_mine.py").write_text(
        "from inspect_ai import Task, task\nfrom inspect_ai.dataset import Sample\nfrom inspect_ai.scorer import match\n"
        "@task\ndef sums(count=2):\n"
        "    return Task(dataset=[Sample(input=str(n), target='1') for n in range(count)], scorer=match())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_environment("sums_of_mine:sums", arguments={"count": 3}).num_held_out_tasks == 3
    for name in ("sums_of_mine:products", "nowhere:sums", "sums"):
        with pytest.raises(BridgeError, match=r"cannot be imported as package\.module:function"):
            load_environment(name)
    with pytest.raises(BridgeError, match=r"no inspect_ai\.Task"):
        load_environment("builtins:dict")
