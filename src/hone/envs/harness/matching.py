"""Where a message history continues a rollout: found in the node graph, so that sampled tokens stay as they are.

An agent program sends its whole history with every call. What of it the graph already holds, from a root on, is the
branch to continue; what follows is new. A history that was rewritten leaves the graph where it differs, and becomes a
branch from there on.

Programs send an assistant message back as their client library keeps it: content stripped or null, reasoning left out,
arguments of tool calls parsed and written again, ids renamed. Such a message is the turn it was made from. Messages of
others are compared as they are, because the model saw them so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.traces import Node


@dataclass(frozen=True, slots=True)
class Place:
    """parent: the node that the new messages follow, or None. root: of that node, or the next node as a new root."""

    parent: int | None
    root: int
    new: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A node that a beginning of the history ends at.

    exact: how many of its messages are equal to the letter. ids: the sampled id of a tool call by the one in the
    history, where they differ.
    """

    root: int | None
    node: int | None
    exact: int
    ids: Mapping[str, str]


class NodeGraph:
    """The nodes of one rollout, which others may add to, by their parents; and the tools that each root was shown.

    Tools are part of what the model saw at the beginning of a conversation, so a call with other tools continues
    nothing.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._num_indexed = 0
        self._children: dict[int | None, list[int]] = {}
        self._tools: dict[int, tuple[ToolSpec, ...]] = {}

    @property
    def tools_of_roots(self) -> Mapping[int, tuple[ToolSpec, ...]]:
        """The tools of each root that was shown some, or none."""
        return self._tools

    @property
    def num_branches(self) -> int:
        """How many branches have turns of the policy that no other has: so many sequences the rollout trains."""
        count, inner = 0, set[int | None]()
        for index in range(len(self._nodes) - 1, -1, -1):
            node = self._nodes[index]
            if node.turn is not None and index not in inner:
                count += 1
            if node.turn is not None or index in inner:
                inner.add(node.parent)
        return count

    def show(self, root: int, tools: tuple[ToolSpec, ...]) -> None:
        """From now on the conversations of `root` are continued by calls with these tools only."""
        self._tools.setdefault(root, tools)

    def place(self, messages: Sequence[Message], tools: tuple[ToolSpec, ...]) -> Place:
        """Where `messages` continues. Of several places that fit, the one equal to the letter, then the latest.

        The new messages name tool calls by their sampled ids.
        """
        self._index()
        found = [_Candidate(None, None, 0, {})]
        known = 0
        for message in messages:
            further = [next_one for one in found for next_one in self._continued(one, message, tools)]
            if not further:
                break
            found, known = further, known + 1
        best = max(found, key=lambda one: (one.exact, -1 if one.node is None else one.node))
        root = len(self._nodes) if best.root is None else best.root
        return Place(best.node, root, tuple(_renamed(messages[known:], best.ids)))

    def _index(self) -> None:
        for index in range(self._num_indexed, len(self._nodes)):
            self._children.setdefault(self._nodes[index].parent, []).append(index)
        self._num_indexed = len(self._nodes)

    def _continued(self, one: _Candidate, message: Message, tools: tuple[ToolSpec, ...]) -> list[_Candidate]:
        if message.role == "tool":
            message = _with_sampled_id(message, one.ids)
        return [
            _Candidate(
                index if one.root is None else one.root,
                index,
                one.exact + (message == known),
                _with_ids(one.ids, message.tool_calls, known.tool_calls),
            )
            for index in self._children.get(one.node, ())
            if is_same(known := self._nodes[index].message, message)
            and (one.root is not None or self._tools.get(index, tools) == tools)
        ]


def is_same(known: Message, sent: Message) -> bool:
    """Whether `sent` is what a client library makes of `known`."""
    if known == sent:
        return True
    if known.role != "assistant" or sent.role != "assistant" or len(known.tool_calls) != len(sent.tool_calls):
        return False
    if known.content.strip() != sent.content.strip():
        return False
    calls = zip(known.tool_calls, sent.tool_calls, strict=True)
    return all(ours.name == theirs.name and arguments_of(ours) == arguments_of(theirs) for ours, theirs in calls)


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """The arguments as an object; a text that is none, as the only argument `arguments`."""
    try:
        arguments = msgspec.json.decode(call.arguments)
    except msgspec.DecodeError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {"arguments": call.arguments}


def _with_ids(ids: Mapping[str, str], sent: Sequence[ToolCall], known: Sequence[ToolCall]) -> Mapping[str, str]:
    return {**ids, **{theirs.id: ours.id for theirs, ours in zip(sent, known, strict=True)}} if sent else ids


def _with_sampled_id(message: Message, ids: Mapping[str, str]) -> Message:
    sampled = ids.get(message.tool_call_id or "")
    return message if sampled is None else msgspec.structs.replace(message, tool_call_id=sampled)


def _renamed(messages: Sequence[Message], ids: Mapping[str, str]) -> list[Message]:
    ids = dict(ids)
    renamed = []
    for message in messages:
        for call in message.tool_calls:
            ids.pop(call.id, None)  # from here on the id means this call
        renamed.append(_with_sampled_id(message, ids) if message.role == "tool" else message)
    return renamed
