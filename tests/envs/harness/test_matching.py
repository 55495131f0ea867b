"""A history is found in the graph as far as it is there, whatever client libraries do to the policy's messages."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.envs import assistant, system, user
from hone.envs.harness.matching import NodeGraph, is_same
from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.sampling import FinishReason, Turn
from hone.schema.traces import Node

ADD = ToolSpec("add", "", {"type": "object"})
SAID = Message("assistant", " Sure. \n", reasoning="hm", tool_calls=(ToolCall("call_2_0", "add", '{"a": 1, "b": 2}'),))


def result(text, call_id):
    return Message("tool", text, tool_call_id=call_id)


def node(message, parent=None):
    turn = Turn(message, FinishReason.STOP) if message.role == "assistant" else None
    return Node(message, parent, turn)


def chain(*messages):
    return [node(message, index - 1 if index else None) for index, message in enumerate(messages)]


def said(content="Sure.", call_id="call_2_0", name="add", arguments='{"a": 1, "b": 2}', **fields):
    return Message("assistant", content, tool_calls=(ToolCall(call_id, name, arguments),), **fields)


def test_a_history_that_goes_on_is_continued_by_its_new_messages_alone():
    graph = NodeGraph(chain(user("add"), SAID))
    place = graph.place([user("add"), SAID, result("3", "call_2_0")], ())
    assert (place.parent, place.root, place.new) == (1, 0, (result("3", "call_2_0"),))


def test_a_history_of_which_nothing_is_known_is_a_new_root():
    place = NodeGraph(chain(user("add"), SAID)).place([system("be brief"), user("add")], ())
    assert (place.parent, place.root, place.new) == (None, 2, (system("be brief"), user("add")))


def test_a_history_that_was_asked_before_continues_without_new_messages():
    place = NodeGraph(chain(user("add"), SAID)).place([user("add")], ())
    assert (place.parent, place.new) == (0, ())


def test_a_rewritten_history_branches_where_it_differs():
    nodes = chain(user("add"), SAID, result("a long output", "call_2_0"), assistant("3"))
    rewritten = [user("add"), SAID, result("(left out)", "call_2_0"), assistant("3"), user("and now?")]
    place = NodeGraph(nodes).place(rewritten, ())
    assert (place.parent, place.new) == (1, tuple(rewritten[2:]))


@pytest.mark.parametrize(
    "sent",
    [
        said(),
        said(reasoning="hm"),
        said(arguments='{"b":2,"a":1}'),
        said(call_id="toolu_7"),
        said(content="\n Sure."),
    ],
)
def test_what_a_client_library_makes_of_a_turn_is_that_turn(sent):
    assert is_same(SAID, sent)
    place = NodeGraph(chain(user("add"), SAID)).place([user("add"), sent, user("thanks")], ())
    assert (place.parent, place.new) == (1, (user("thanks"),))


@pytest.mark.parametrize(
    "sent",
    [
        said(content="Sure!"),
        said(name="subtract"),
        said(arguments='{"a": 1, "b": 3}'),
        assistant("Sure."),
        user(" Sure. \n"),
        Message("assistant", " Sure. \n", tool_calls=SAID.tool_calls * 2),
    ],
)
def test_what_the_policy_did_not_say_is_not_its_turn(sent):
    assert not is_same(SAID, sent)


def test_arguments_that_are_no_object_are_compared_as_text():
    odd = said(arguments="[1, 2")
    assert is_same(odd, said(arguments=json.dumps({"arguments": "[1, 2"})))
    assert not is_same(odd, said(arguments="[1, 3"))


def test_messages_of_others_are_compared_to_the_letter():
    assert not is_same(user("add "), user("add"))
    place = NodeGraph(chain(user("add "), SAID)).place([user("add"), SAID, user("thanks")], ())
    assert place.parent is None


def test_results_of_renamed_calls_carry_the_sampled_ids():
    nodes = chain(user("add"), SAID, result("3", "call_2_0"), assistant("3"))
    history = [user("add"), said(call_id="x"), result("3", "x"), assistant("3")]
    graph = NodeGraph(nodes)
    assert graph.place([*history, user("more")], ()).parent == 3
    assert graph.place([*history[:2], result("4", "x")], ()).new == (result("4", "call_2_0"),)


def test_an_id_that_a_new_message_uses_again_means_its_own_call():
    history = [user("add"), said(call_id="x"), result("3", "x"), said("Again.", call_id="x"), result("5", "x")]
    place = NodeGraph(chain(user("add"), SAID)).place(history, ())
    assert [message.tool_call_id for message in place.new] == ["call_2_0", None, "x"]


def test_of_two_equal_turns_the_one_that_leads_on_is_continued_and_else_the_latest():
    nodes = [*chain(user("q"), assistant("a"), user("first")), node(assistant("a"), 0), node(user("second"), 3)]
    graph = NodeGraph(nodes)
    assert graph.place([user("q"), assistant("a"), user("first"), user("!")], ()).parent == 2
    assert graph.place([user("q"), assistant("a"), user("second"), user("!")], ()).parent == 4
    assert graph.place([user("q"), assistant("a"), user("third")], ()).parent == 3


def test_of_two_turns_that_look_equal_the_one_equal_to_the_letter_is_continued():
    exact = msgspec.structs.replace(SAID, content="Sure.")
    graph = NodeGraph([*chain(user("q"), exact), node(SAID, 0)])
    assert graph.place([user("q"), exact, user("!")], ()).parent == 1


def test_a_conversation_is_not_continued_with_other_tools():
    graph = NodeGraph(nodes := chain(user("q"), assistant("a")))
    graph.show(graph.place([user("q")], (ADD,)).root, (ADD,))
    assert graph.place([user("q"), assistant("a"), user("!")], (ADD,)).parent == 1
    place = graph.place([user("q"), assistant("a"), user("!")], ())
    assert (place.parent, place.root, len(place.new)) == (None, 2, 3)
    nodes += [node(user("q")), node(assistant("a"), 2)]
    graph.show(2, ())
    assert graph.place([user("q"), assistant("a"), user("!")], ()).parent == 3


def test_branches_are_counted_by_the_turns_that_only_they_have():
    assert NodeGraph(chain(user("q"))).num_branches == 0
    nodes = [
        *chain(user("q"), assistant("a"), user("left unanswered")),
        node(user("again"), 1),
        node(assistant("b"), 3),
    ]
    assert NodeGraph(nodes).num_branches == 1
    assert NodeGraph([*nodes, node(assistant("c"), 0), node(user("other"))]).num_branches == 2


words = st.sampled_from(["a", "b", " a", ""])
messages = st.one_of(
    words.map(user),
    st.builds(
        lambda text, call: said(text, arguments=call) if call else assistant(text),
        words,
        st.sampled_from(["", '{"a": 1}']),
    ),
)


@given(st.lists(st.tuples(messages, st.integers(0, 9)), min_size=1, max_size=12), st.data())
def test_every_path_of_a_graph_is_found_whole_however_a_client_wrote_it(grown, data):
    nodes = []
    for message, choice in grown:
        parent = choice % (len(nodes) + 1)
        nodes.append(node(message, None if parent == len(nodes) else parent))
    graph = NodeGraph(nodes)
    index = data.draw(st.integers(0, len(nodes) - 1))
    path = []
    while index is not None:
        path.append(nodes[index].message)
        index = nodes[index].parent
    history = [
        msgspec.structs.replace(message, content=message.content.strip()) if message.role == "assistant" else message
        for message in path[::-1]
    ]
    place = graph.place([*history, user("a message that is new")], ())
    assert place.new == (user("a message that is new"),)
    found, index = [], place.parent
    while index is not None:
        found.append(nodes[index].message)
        index = nodes[index].parent
    assert all(is_same(known, sent) for known, sent in zip(found[::-1], history, strict=True))
