"""Short constructors for the messages that environments write."""

from collections.abc import Mapping
from typing import Any

import msgspec

from hone.schema.messages import Message, ToolCall


def system(content: str) -> Message:
    """A system message."""
    return Message("system", content)


def user(content: str) -> Message:
    """A message of the user, or of the environment speaking as the user."""
    return Message("user", content)


def assistant(content: str = "", *tool_calls: ToolCall) -> Message:
    """A message of the policy, as in gold conversations and in examples inside a prompt."""
    return Message("assistant", content, tool_calls=tool_calls)


def tool_call(name: str, arguments: Mapping[str, Any], *, id: str = "call_0") -> ToolCall:
    """A call of a tool, for `assistant`; each call of a conversation needs an id of its own."""
    return ToolCall(id, name, msgspec.json.encode(arguments).decode())


def tool_result(content: str, *, id: str = "call_0") -> Message:
    """What a tool answered to the call with this id."""
    return Message("tool", content, tool_call_id=id)
