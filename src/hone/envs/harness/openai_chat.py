"""OpenAI's chat completions, read and written."""

from collections.abc import Iterator
from typing import Any

import msgspec

from hone.envs.harness.dialect import Answer, Call, Json, Refusal, Trouble, check_continues, decoded
from hone.schema.messages import Message, Role, ToolCall, ToolSpec
from hone.schema.sampling import FinishReason

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
ERROR_KINDS = {
    Trouble.BAD_REQUEST: ("invalid_request_error", None),
    Trouble.UNKNOWN_KEY: ("invalid_request_error", "invalid_api_key"),
    Trouble.ENDED: ("rollout_ended", "rollout_ended"),
    Trouble.NOT_FOUND: ("invalid_request_error", "not_found"),
    Trouble.FAILED: ("server_error", "rollout_failed"),
}
INCLUDE_USAGE = "include_usage"
ANY_OBJECT: Json = {"type": "object", "properties": {}}


class Part(msgspec.Struct):
    type: str
    text: str = ""
    refusal: str = ""


class Function(msgspec.Struct):
    name: str
    arguments: str = "{}"


class CallBody(msgspec.Struct):
    function: Function
    id: str = ""


class MessageBody(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallBody] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class FunctionSpec(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolBody(msgspec.Struct):
    type: str = "function"
    function: FunctionSpec | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatBody(msgspec.Struct):
    messages: list[MessageBody]
    model: str = ""
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None


class OpenAIChat:
    """POST /v1/chat/completions."""

    keep_alive = b": keep-alive\n\n"

    def read(self, body: bytes) -> Call:
        request = decoded(body, ChatBody)
        if request.n not in (None, 1):
            raise Refusal(Trouble.BAD_REQUEST, f"n = {request.n} is not supported: ask for one answer at a time")
        messages = tuple(_message(one) for one in request.messages)
        check_continues(messages)
        offers_tools = request.tool_choice != "none"
        return Call(
            model=request.model,
            messages=messages,
            tools=tuple(_tool(one) for one in request.tools or ()) if offers_tools else (),
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
            stream=bool(request.stream),
            options=frozenset([INCLUDE_USAGE])
            if request.stream_options and request.stream_options.include_usage
            else frozenset(),
            not_enforced=_not_enforced(request),
        )

    def write(self, answer: Answer) -> Json:
        said = answer.message
        message: Json = {"role": "assistant", "content": said.content or (None if said.tool_calls else "")}
        message["refusal"] = None
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.tool_calls:
            message["tool_calls"] = [_call_json(call) for call in said.tool_calls]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(answer)}
        return {**_head(answer, "chat.completion"), "choices": [choice], "usage": _usage(answer)}

    def events(self, answer: Answer) -> Iterator[bytes]:
        head = _head(answer, "chat.completion.chunk")
        for delta in _deltas(answer.message):
            yield _event({**head, "choices": [_piece(delta, None)]})
        yield _event({**head, "choices": [_piece({}, _finish_reason(answer))]})
        if INCLUDE_USAGE in answer.call.options:
            yield _event({**head, "choices": [], "usage": _usage(answer)})
        yield b"data: [DONE]\n\n"

    def error(self, refusal: Refusal) -> Json:
        kind, code = ERROR_KINDS[refusal.trouble]
        return {"error": {"message": str(refusal), "type": kind, "param": None, "code": code}}

    def error_event(self, refusal: Refusal) -> bytes:
        return _event(self.error(refusal))


def _message(body: MessageBody) -> Message:
    role = ROLES.get(body.role)
    if role is None:
        raise Refusal(Trouble.BAD_REQUEST, f"the role {body.role!r} is not supported; there are {', '.join(ROLES)}")
    return Message(
        role=role,
        content=_text(body.content),
        reasoning=body.reasoning_content or None,
        tool_calls=tuple(ToolCall(one.id, one.function.name, one.function.arguments) for one in body.tool_calls or ()),
        tool_call_id=body.tool_call_id,
        name=body.name,
    )


def _text(content: str | list[Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "refusal"):
            raise Refusal(Trouble.BAD_REQUEST, f"a content part of type {part.type!r} is not supported; send text")
    return "".join(part.text or part.refusal for part in content)


def _tool(body: ToolBody) -> ToolSpec:
    if body.function is None:
        raise Refusal(Trouble.BAD_REQUEST, f"a tool of type {body.type!r} is not supported; send functions")
    return ToolSpec(body.function.name, body.function.description or "", body.function.parameters or ANY_OBJECT)


def _not_enforced(request: ChatBody) -> tuple[str, ...]:
    asked = {
        "tool_choice": request.tool_choice not in (None, "auto", "none"),
        "parallel_tool_calls": request.parallel_tool_calls is False,
        "response_format": (request.response_format or {}).get("type", "text") != "text",
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)


def _head(answer: Answer, kind: str) -> Json:
    return {
        "id": f"chatcmpl-{answer.identity}",
        "object": kind,
        "created": answer.created,
        "model": answer.call.model,
    }


def _deltas(said: Message) -> Iterator[Json]:
    yield {"role": "assistant", "content": ""}
    if said.reasoning:
        yield {"reasoning_content": said.reasoning}
    if said.content:
        yield {"content": said.content}
    for index, call in enumerate(said.tool_calls):
        yield {"tool_calls": [{"index": index, **_call_json(call)}]}


def _piece(delta: Json, finish_reason: str | None) -> Json:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _call_json(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finish_reason(answer: Answer) -> str:
    if answer.turn.finish_reason is FinishReason.LENGTH:
        return "length"
    return "tool_calls" if answer.message.tool_calls else "stop"


def _usage(answer: Answer) -> Json:
    num_prompt, num_completion = answer.turn.num_prompt_tokens, answer.turn.num_completion_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": answer.turn.num_cached_tokens},
    }


def _event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
