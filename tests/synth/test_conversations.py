import json

import msgspec
import pytest

from hone.envs import Task, assistant, system, tool_call, tool_result, user
from hone.schema.messages import Message, ToolSpec
from hone.schema.sampling import FinishReason, Turn
from hone.schema.traces import AgentRecord, Node, Reward, StopReason, Trace
from hone.synth.conversations import conversations_of, write_jsonl, write_parquet
from hone.trainer.data import read_conversations

ADD = ToolSpec(
    "add", "adds", {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"anyOf": [{"const": 1}]}}}
)
CALL = Message("assistant", "Let me see.", reasoning="2 + 2", tool_calls=(tool_call("add", {"a": 2}, id="call_x"),))
PROMPT = (system("Be brief."), user("2 + 2?"))


def said(message, num_tokens=0):
    return Turn(message, FinishReason.STOP, num_completion_tokens=num_tokens)


def trace_of(*messages, info=None, prompt=PROMPT):
    nodes = [Node(message, index - 1 if index else None) for index, message in enumerate(prompt)]
    for message in messages:
        turn = said(message, 5) if message.role == "assistant" else None
        nodes.append(Node(message, len(nodes) - 1, turn))
    return Trace(
        "sum",
        Task(prompt=prompt, reference="4"),
        attempt=1,
        nodes=nodes,
        rewards={"exact": Reward(1.0)},
        stop_reason=StopReason.COMPLETED,
        info=info or {},
    )


def conversation_of(*messages, tools=(ADD,), **more):
    (one,) = conversations_of(trace_of(*messages, **more), tools)
    return one


def test_a_conversation_ends_with_the_last_words_of_the_policy():
    one = conversation_of(CALL, tool_result("4", id="call_x"), assistant("4"), user("Thank you."))
    assert [message.role for message in one.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert (one.environment, one.attempt, one.reward, one.num_tokens) == ("sum", 1, 1.0, 10)
    assert one.prompts == ["2 + 2?"]
    assert one.written == '2 + 2\nLet me see.\nadd({"a":2})\n4'
    assert one.prose == "2 + 2\nLet me see.\n4"


def test_the_ids_of_tool_calls_do_not_make_conversations_different():
    other = msgspec.structs.replace(CALL, tool_calls=(tool_call("add", {"a": 2}, id="call_y"),))
    first = conversation_of(CALL, tool_result("4", id="call_x"), assistant("4"))
    second = conversation_of(other, tool_result("4", id="call_y"), assistant("4"))
    third = conversation_of(CALL, tool_result("5", id="call_x"), assistant("4"))
    assert first.identity == second.identity != third.identity


def test_each_branch_is_a_conversation_and_one_without_the_policy_is_none():
    nodes = [
        Node(user("2 + 2?")),
        Node(assistant("4"), 0, said(assistant("4"))),
        Node(assistant("5"), 0, said(assistant("5"))),
        Node(user("never answered")),
    ]
    trace = msgspec.structs.replace(trace_of(), nodes=nodes)
    assert [one.messages[-1].content for one in conversations_of(trace, ())] == ["4", "5"]


def test_the_tools_are_those_that_the_rollout_showed():
    other = ToolSpec("search", "searches", {"type": "object"})
    shown = msgspec.to_builtins([other])
    assert conversation_of(assistant("4")).tools == (ADD,)
    assert conversation_of(assistant("4"), info={"tools": shown}).tools == (other,)
    assert conversation_of(assistant("4"), info={"harness": {"num_calls": 1}}).tools == ()
    of_program = {"harness": {"num_calls": 1, "tools_of_roots": {"0": shown}}}
    assert conversation_of(assistant("4"), info=of_program).tools == (other,)


@pytest.mark.parametrize(("write", "name"), [(write_jsonl, "train.jsonl"), (write_parquet, "train.parquet")])
def test_sft_reads_back_what_is_written(tmp_path, write, name):
    whole = conversation_of(CALL, tool_result("4", id="call_x"), assistant("größer als 3\n"))
    plain = conversation_of(assistant(""), assistant("4"), tools=())
    write((one.row("teacher") for one in (whole, plain)), tmp_path / name)
    read = list(read_conversations(tmp_path / name))
    assert [one.messages for one in read] == [whole.messages, plain.messages]
    assert [one.tools for one in read] == [(ADD,), ()]
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_have_the_shape_of_the_openai_api(tmp_path):
    write_jsonl([conversation_of(CALL, tool_result("4", id="call_x"), assistant("4")).row("m")], tmp_path / "x.jsonl")
    row = json.loads((tmp_path / "x.jsonl").read_text())
    assert row["messages"][2] == {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "2 + 2",
        "tool_calls": [{"id": "call_x", "type": "function", "function": {"name": "add", "arguments": '{"a":2}'}}],
    }
    assert row["messages"][3] == {"role": "tool", "content": "4", "tool_call_id": "call_x"}
    assert row["tools"][0]["function"]["name"] == "add"
    assert (row["environment"], row["attempt"], row["reward"], row["teacher"]) == ("sum", 1, 1.0, "m")


def test_other_libraries_read_the_parquet_file(tmp_path):
    from pyarrow import parquet

    write_parquet([conversation_of(CALL, assistant("4")).row("m")], tmp_path / "x.parquet")
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["messages", "tools", "environment", "task", "attempt", "reward", "teacher"]
    assert table.to_pylist()[0]["messages"][2]["tool_calls"][0]["function"]["name"] == "add"


def test_of_several_agents_those_that_train_are_kept_with_what_they_earned_and_their_own_tools():
    nodes = [Node(message, index - 1 if index else None) for index, message in enumerate(PROMPT)]
    for agent, text in (("proposer", "2 + 2"), ("solver", "4"), ("user", "Thanks.")):
        nodes.append(Node(assistant(text), 1, said(assistant(text), 3), agent))
    agents = {
        "proposer": AgentRecord(rewards={"hard": Reward(0.5)}),
        "solver": AgentRecord(rewards={"solved": Reward(1.0)}),
        "user": AgentRecord(trains=False),
    }
    trace = msgspec.structs.replace(trace_of(), nodes=nodes, agents=agents, rewards={"polite": Reward(0.25)})
    kept = conversations_of(trace, (), {"solver": (ADD,)})
    assert [(one.agent, one.reward, one.written, one.tools) for one in kept] == [
        ("proposer", 0.75, "2 + 2", ()),
        ("solver", 1.25, "4", (ADD,)),
    ]


def test_a_branch_in_which_an_agent_speaks_that_does_not_train_is_left_out():
    trace = trace_of(assistant("2 + 2?"), assistant("4"))
    trace.nodes[2] = msgspec.structs.replace(trace.nodes[2], agent="user")
    trace.nodes[3] = msgspec.structs.replace(trace.nodes[3], agent="solver")
    agents = {"user": AgentRecord(trains=False), "solver": AgentRecord()}
    assert conversations_of(msgspec.structs.replace(trace, agents=agents), ()) == []
