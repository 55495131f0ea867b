import json

import pytest

from hone.envs import Rubric, SingleTurn, Task, Tasks, ToolSpec, ToolUse, assistant, reward, user
from hone.envs.mcp import McpServer
from hone.synth.gold import shares_of, write_gold_conversations


@reward
def exact(answer, reference):
    return answer == reference


def environment_of(name, count, *, knows=True, tools=()):
    return SingleTurn(
        name=name,
        rubric=Rubric([exact]),
        train=Tasks(lambda index: Task(prompt=(user(f"{name} {index}"),), reference=str(index)), count),
        held_out=[Task(prompt=(user("held out"),), reference="x")],
        tools=tools,
        gold=(lambda task: [assistant(task.reference)]) if knows else None,
    )


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, environments, weights, count, seed=0):
    write_gold_conversations(environments, weights, count, seed, path)
    return written(path)


def test_conversations_are_prompt_and_gold_answer_of_train_tasks(tmp_path):
    lines = write(tmp_path / "sft" / "gold.jsonl", {"a": environment_of("a", 5)}, {"a": 1}, 5)
    assert sorted(line["messages"][0]["content"] for line in lines) == [f"a {index}" for index in range(5)]
    for line in lines:
        prompt, answer = line["messages"]
        assert line.keys() == {"messages"}
        assert (prompt["role"], answer["role"]) == ("user", "assistant")
        assert answer["content"] == prompt["content"].removeprefix("a ")


def test_each_environment_has_its_weights_share_in_a_mixed_order(tmp_path):
    environments = {"a": environment_of("a", None), "b": environment_of("b", 200)}
    lines = write(tmp_path / "gold.jsonl", environments, {"a": 3, "b": 1}, 400)
    names = [line["messages"][0]["content"].split()[0] for line in lines]
    assert names.count("a") == 300
    assert 10 < names[:100].count("b") < 45


def test_the_file_depends_on_the_seed_and_on_nothing_else(tmp_path):
    environments = {"a": environment_of("a", 100)}
    one, same, other = (write(tmp_path / "gold.jsonl", environments, {"a": 1}, 50, seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_tools_and_empty_contents_are_written(tmp_path):
    tool = ToolSpec("add", "adds", {"type": "object"})
    environment = environment_of("a", 2, tools=[tool])
    environment.gold = lambda task: [assistant("")]
    (line, _) = write(tmp_path / "gold.jsonl", {"a": environment}, {"a": 1}, 2)
    assert line["tools"] == [{"name": "add", "description": "adds", "parameters": {"type": "object"}}]
    assert line["messages"][1] == {"role": "assistant", "content": ""}


def test_more_conversations_than_tasks_are_refused_and_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="has 5 train tasks, 6 gold"):
        write(tmp_path / "gold.jsonl", {"a": environment_of("a", 5)}, {"a": 1}, 6)
    assert not (tmp_path / "gold.jsonl").exists()


def test_an_environment_without_gold_answers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="knows no gold answer"):
        write(tmp_path / "gold.jsonl", {"a": environment_of("a", 5, knows=False)}, {"a": 1}, 2)


@pytest.mark.parametrize(
    ("weights", "count", "shares"),
    [
        ({"a": 1, "b": 1, "c": 1}, 10, [4, 3, 3]),
        ({"a": 2.5, "b": 1.5}, 8, [5, 3]),
        ({"a": 0.001, "b": 1}, 3, [0, 3]),
    ],
)
def test_shares_add_up(weights, count, shares):
    assert list(shares_of(weights, count).values()) == shares


@pytest.mark.parametrize(("weights", "count"), [({}, 3), ({"a": 0}, 3), ({"a": 1}, 0)])
def test_impossible_shares_are_refused(weights, count):
    with pytest.raises(ValueError, match="must be positive"):
        shares_of(weights, count)


def test_tools_that_are_opened_for_each_rollout_are_not_left_out_silently(tmp_path):
    task = Task(prompt=(user("2 + 2?"),), reference="4")
    server = McpServer("server", lambda: pytest.fail("no server is needed to refuse"))
    environment = ToolUse(
        name="served", rubric=Rubric([exact]), train=[task], tools=[server], gold=lambda task: [assistant("4")]
    )
    with pytest.raises(ValueError, match=r"'served' opens tools for each rollout .* run `hone synth`"):
        write(tmp_path / "gold.jsonl", {"served": environment}, {"served": 1}, 1)
    assert not (tmp_path / "gold.jsonl").exists()
