"""Conversations: messages, tool calls and tool descriptions, in the shape of the OpenAI API."""

from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model's wish to call a tool; `arguments` is JSON text exactly as the model wrote it."""

    id: str
    name: str
    arguments: str


class ToolSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool as the model sees it; `parameters` is a JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
