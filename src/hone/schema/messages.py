"""Conversations: messages, tool calls and tool descriptions, in the shape of the OpenAI API."""

from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]
"""Who speaks; environments reply as user or tool."""


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model's wish to call a tool. arguments: JSON text, exactly as the model wrote it."""

    id: str
    name: str
    arguments: str


class ToolSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool as the model sees it. parameters: a JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation.

    content: text. reasoning: what a policy thought before it, where the chat template tells it apart. tool_calls: of the
    assistant. tool_call_id: of a tool's message, the call that it answers. name: of the speaker, where a template has it.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
