"""Anthropic's messages, read and written."""

from collections.abc import Iterator
from typing import Any

import msgspec

from hone.envs.harness.dialect import Answer, Call, Json, Refusal, Trouble, check_continues, decoded
from hone.envs.harness.matching import arguments_of
from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.sampling import FinishReason

ERROR_KINDS = {
    Trouble.BAD_REQUEST: "invalid_request_error",
    Trouble.UNKNOWN_KEY: "authentication_error",
    Trouble.ENDED: "permission_error",
    Trouble.NOT_FOUND: "not_found_error",
    Trouble.FAILED: "api_error",
}
THINKING = "thinking"
BETWEEN_BLOCKS = "\n\n"  # texts of others stand in blocks of their own


class Block(msgspec.Struct):
    """A content block: text, thinking, tool_use or tool_result."""

    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: "str | list[Block] | None" = None


class MessageBody(msgspec.Struct):
    role: str
    content: str | list[Block]


class ToolBody(msgspec.Struct):
    name: str
    type: str | None = None
    description: str = ""
    input_schema: dict[str, Any] | None = None


class MessagesBody(msgspec.Struct):
    messages: list[MessageBody]
    model: str = ""
    system: str | list[Block] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None


class AnthropicMessages:
    """POST /v1/messages."""

    keep_alive = b'event: ping\ndata: {"type": "ping"}\n\n'

    def read(self, body: bytes) -> Call:
        request = decoded(body, MessagesBody)
        messages: list[Message] = []
        if request.system:
            messages.append(Message("system", _text(request.system)))
        for one in request.messages:
            messages += _messages(one)
        check_continues(tuple(messages))
        choice = (request.tool_choice or {}).get("type", "auto")
        is_thinking = (request.thinking or {}).get("type", "disabled") != "disabled"
        return Call(
            model=request.model,
            messages=tuple(messages),
            tools=tuple(_tool(one) for one in request.tools or ()) if choice != "none" else (),
            stop=tuple(request.stop_sequences or ()),
            stream=bool(request.stream),
            options=frozenset([THINKING]) if is_thinking else frozenset(),
            not_enforced=("tool_choice",) if choice not in ("auto", "none") else (),
        )

    def write(self, answer: Answer) -> Json:
        reason = _stop_reason(answer)
        return {**_head(answer), "content": _blocks(answer), "stop_reason": reason, "usage": _usage(answer)}

    def events(self, answer: Answer) -> Iterator[bytes]:
        yield _event(
            {"type": "message_start", "message": {**_head(answer), "usage": {**_usage(answer), "output_tokens": 0}}}
        )
        for index, block in enumerate(_blocks(answer)):
            opening, deltas = _in_pieces(block)
            yield _event({"type": "content_block_start", "index": index, "content_block": opening})
            for delta in deltas:
                yield _event({"type": "content_block_delta", "index": index, "delta": delta})
            yield _event({"type": "content_block_stop", "index": index})
        ending = {"stop_reason": _stop_reason(answer), "stop_sequence": None}
        yield _event({"type": "message_delta", "delta": ending, "usage": _usage(answer)})
        yield _event({"type": "message_stop"})

    def error(self, refusal: Refusal) -> Json:
        return {"type": "error", "error": {"type": ERROR_KINDS[refusal.trouble], "message": str(refusal)}}

    def error_event(self, refusal: Refusal) -> bytes:
        return _event(self.error(refusal))


def _messages(body: MessageBody) -> list[Message]:
    if body.role not in ("user", "assistant"):
        raise Refusal(Trouble.BAD_REQUEST, f"the role {body.role!r} is not supported; there are user and assistant")
    blocks = [Block("text", text=body.content)] if isinstance(body.content, str) else body.content
    return [_assistant(blocks)] if body.role == "assistant" else _results_and_text(blocks)


def _assistant(blocks: list[Block]) -> Message:
    _check_types(blocks, "text", "thinking", "redacted_thinking", "tool_use")
    return Message(
        role="assistant",
        content="".join(block.text for block in blocks if block.type == "text"),
        reasoning="".join(block.thinking for block in blocks if block.type == "thinking") or None,
        tool_calls=tuple(
            ToolCall(block.id, block.name, msgspec.json.encode(block.input).decode())
            for block in blocks
            if block.type == "tool_use"
        ),
    )


def _results_and_text(blocks: list[Block]) -> list[Message]:
    """A message for each tool result, then one for the text; an empty text is a message where nothing else is."""
    _check_types(blocks, "text", "tool_result")
    results = [
        Message("tool", _text(block.content or ""), tool_call_id=block.tool_use_id)
        for block in blocks
        if block.type == "tool_result"
    ]
    text = _text([block for block in blocks if block.type == "text"])
    return [*results, Message("user", text)] if text or not results else results


def _text(content: str | list[Block]) -> str:
    if isinstance(content, str):
        return content
    _check_types(content, "text")
    return BETWEEN_BLOCKS.join(block.text for block in content)


def _check_types(blocks: list[Block], *known: str) -> None:
    for block in blocks:
        if block.type not in known:
            raise Refusal(
                Trouble.BAD_REQUEST, f"a content block of type {block.type!r} is not supported here; send {known[0]}"
            )


def _tool(body: ToolBody) -> ToolSpec:
    if body.input_schema is None:
        raise Refusal(Trouble.BAD_REQUEST, f"the tool {body.name!r} of type {body.type!r} is not one of the program's")
    return ToolSpec(body.name, body.description, body.input_schema)


def _head(answer: Answer) -> Json:
    return {
        "id": f"msg_{answer.identity}",
        "type": "message",
        "role": "assistant",
        "model": answer.call.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _blocks(answer: Answer) -> list[Json]:
    """Never none: programs read the first block's text."""
    said = answer.message
    blocks: list[Json] = []
    if said.reasoning and THINKING in answer.call.options:
        blocks.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
    if said.content or not said.tool_calls:
        blocks.append({"type": "text", "text": said.content})
    for call in said.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments_of(call)})
    return blocks


def _in_pieces(block: Json) -> tuple[Json, list[Json]]:
    """A block as it opens, and what is added to it."""
    if block["type"] == "thinking":
        return {**block, "thinking": ""}, [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": ""},
        ]
    if block["type"] == "text":
        return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]
    arguments = msgspec.json.encode(block["input"]).decode()
    return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": arguments}]


def _stop_reason(answer: Answer) -> str:
    if answer.turn.finish_reason is FinishReason.LENGTH:
        return "max_tokens"
    return "tool_use" if answer.message.tool_calls else "end_turn"


def _usage(answer: Answer) -> Json:
    num_cached = answer.turn.num_cached_tokens
    return {
        "input_tokens": answer.turn.num_prompt_tokens - num_cached,
        "output_tokens": answer.turn.num_completion_tokens,
        "cache_read_input_tokens": num_cached,
        "cache_creation_input_tokens": 0,
    }


def _event(content: Json) -> bytes:
    return f"event: {content['type']}\ndata: ".encode() + msgspec.json.encode(content) + b"\n\n"
