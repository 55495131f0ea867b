"""OpenAI's responses, read and written. Nothing is kept between them: a request brings its whole history."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec

from hone.envs.harness.dialect import Answer, Call, Json, Refusal, Trouble, check_continues, decoded
from hone.envs.harness.openai_chat import ANY_OBJECT, ROLES, OpenAIChat
from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.sampling import FinishReason

TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
OF_THE_ASSISTANT = ("reasoning", "function_call")


class Part(msgspec.Struct):
    type: str
    text: str = ""
    refusal: str = ""


class Item(msgspec.Struct):
    """A message, a reasoning, a function_call or a function_call_output."""

    type: str = "message"
    role: str = ""
    content: str | list[Part] | None = None
    summary: list[Part] = []
    call_id: str = ""
    name: str = ""
    arguments: str = "{}"
    output: str | list[Part] = ""

    @property
    def is_of_the_assistant(self) -> bool:
        return self.type in OF_THE_ASSISTANT or (self.type == "message" and self.role == "assistant")


class ToolBody(msgspec.Struct):
    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None


class TextFormat(msgspec.Struct):
    type: str = "text"


class TextOptions(msgspec.Struct):
    format: TextFormat | None = None


class ResponsesBody(msgspec.Struct):
    input: str | list[Item]
    model: str = ""
    instructions: str | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None


class OpenAIResponses:
    """POST /v1/responses."""

    keep_alive = b": keep-alive\n\n"

    def read(self, body: bytes) -> Call:
        request = decoded(body, ResponsesBody)
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(request, name):
                raise Refusal(Trouble.BAD_REQUEST, f"{name} is not supported: nothing is kept; send the whole input")
        items = [Item(role="user", content=request.input)] if isinstance(request.input, str) else request.input
        messages = [Message("system", request.instructions)] if request.instructions else []
        messages += _messages(items)
        check_continues(tuple(messages))
        return Call(
            model=request.model,
            messages=tuple(messages),
            tools=tuple(_tool(one) for one in request.tools or ()) if request.tool_choice != "none" else (),
            stream=bool(request.stream),
            not_enforced=_not_enforced(request),
        )

    def write(self, answer: Answer) -> Json:
        is_cut = answer.turn.finish_reason is FinishReason.LENGTH
        return {
            **_head(answer),
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": _items(answer),
            "usage": _usage(answer),
        }

    def events(self, answer: Answer) -> Iterator[bytes]:
        numbers = count()

        def event(kind: str, **content: Any) -> bytes:
            data = {"type": kind, "sequence_number": next(numbers), **content}
            return f"event: {kind}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"

        begun = {**_head(answer), "status": "in_progress", "output": [], "usage": None}
        yield event("response.created", response=begun)
        yield event("response.in_progress", response=begun)
        for index, item in enumerate(_items(answer)):
            place = {"item_id": item["id"], "output_index": index}
            yield event("response.output_item.added", output_index=index, item=_opening(item))
            for kind, content in _pieces(item):
                yield event(kind, **place, **content)
            yield event("response.output_item.done", output_index=index, item=item)
        whole = self.write(answer)
        yield event(f"response.{whole['status']}", response=whole)

    def error(self, refusal: Refusal) -> Json:
        return OpenAIChat().error(refusal)

    def error_event(self, refusal: Refusal) -> bytes:
        return b"event: error\n" + OpenAIChat().error_event(refusal)


def _messages(items: list[Item]) -> list[Message]:
    """The items that follow one another and are the assistant's are one turn of the policy."""
    messages: list[Message] = []
    turn: list[Item] = []
    for item in items:
        if item.is_of_the_assistant:
            turn.append(item)
            continue
        if turn:
            messages.append(_assistant(turn))
            turn = []
        messages.append(_message(item))
    return [*messages, _assistant(turn)] if turn else messages


def _assistant(items: list[Item]) -> Message:
    reasonings = [_text(item.summary) + _text(item.content) for item in items if item.type == "reasoning"]
    return Message(
        role="assistant",
        content="".join(_text(item.content) for item in items if item.type == "message"),
        reasoning="".join(reasonings) or None,
        tool_calls=tuple(
            ToolCall(item.call_id, item.name, item.arguments) for item in items if item.type == "function_call"
        ),
    )


def _message(item: Item) -> Message:
    if item.type == "function_call_output":
        return Message("tool", _text(item.output), tool_call_id=item.call_id)
    if item.type != "message":
        raise Refusal(Trouble.BAD_REQUEST, f"an input item of type {item.type!r} is not supported")
    if item.role not in ROLES:
        raise Refusal(Trouble.BAD_REQUEST, f"the role {item.role!r} is not supported; there are {', '.join(ROLES)}")
    return Message(ROLES[item.role], _text(item.content))


def _text(content: str | list[Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in TEXTS:
            raise Refusal(Trouble.BAD_REQUEST, f"a content part of type {part.type!r} is not supported; send text")
    return "".join(part.text or part.refusal for part in content)


def _tool(body: ToolBody) -> ToolSpec:
    if body.type != "function":
        raise Refusal(Trouble.BAD_REQUEST, f"a tool of type {body.type!r} is not supported; send functions")
    return ToolSpec(body.name, body.description or "", body.parameters or ANY_OBJECT)


def _not_enforced(request: ResponsesBody) -> tuple[str, ...]:
    text_format = request.text.format if request.text else None
    asked = {
        "tool_choice": request.tool_choice not in (None, "auto", "none"),
        "parallel_tool_calls": request.parallel_tool_calls is False,
        "text.format": text_format is not None and text_format.type != "text",
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)


def _head(answer: Answer) -> Json:
    tools = [{"type": "function", "strict": False, **msgspec.to_builtins(tool)} for tool in answer.call.tools]
    return {
        "id": f"resp_{answer.identity}",
        "object": "response",
        "created_at": answer.created,
        "model": answer.call.model,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": tools,
        "temperature": None,
        "top_p": None,
    }


def _items(answer: Answer) -> list[Json]:
    said, identity = answer.message, answer.identity
    items: list[Json] = []
    if said.reasoning:
        summary = [{"type": "summary_text", "text": said.reasoning}]
        items.append({"type": "reasoning", "id": f"rs_{identity}", "summary": summary})
    if said.content or not said.tool_calls:
        text = {"type": "output_text", "text": said.content, "annotations": [], "logprobs": []}
        items.append(
            {
                "type": "message",
                "id": f"msg_{identity}",
                "role": "assistant",
                "status": "completed",
                "content": [text],
            }
        )
    for index, call in enumerate(said.tool_calls):
        items.append(
            {
                "type": "function_call",
                "id": f"fc_{identity}_{index}",
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
                "status": "completed",
            }
        )
    return items


def _opening(item: Json) -> Json:
    """An item before anything was added to it."""
    match item["type"]:
        case "reasoning":
            return {**item, "summary": []}
        case "message":
            return {**item, "status": "in_progress", "content": []}
        case _:
            return {**item, "status": "in_progress", "arguments": ""}


def _pieces(item: Json) -> Iterator[tuple[str, Json]]:
    """What is added to an item, as events."""
    match item["type"]:
        case "reasoning":
            [part] = item["summary"]
            place = {"summary_index": 0}
            yield "response.reasoning_summary_part.added", {**place, "part": {**part, "text": ""}}
            yield "response.reasoning_summary_text.delta", {**place, "delta": part["text"]}
            yield "response.reasoning_summary_text.done", {**place, "text": part["text"]}
            yield "response.reasoning_summary_part.done", {**place, "part": part}
        case "message":
            [part] = item["content"]
            place = {"content_index": 0}
            yield "response.content_part.added", {**place, "part": {**part, "text": ""}}
            yield "response.output_text.delta", {**place, "delta": part["text"], "logprobs": []}
            yield "response.output_text.done", {**place, "text": part["text"], "logprobs": []}
            yield "response.content_part.done", {**place, "part": part}
        case _:
            yield "response.function_call_arguments.delta", {"delta": item["arguments"]}
            yield (
                "response.function_call_arguments.done",
                {"name": item["name"], "arguments": item["arguments"]},
            )


def _usage(answer: Answer) -> Json:
    num_prompt, num_completion = answer.turn.num_prompt_tokens, answer.turn.num_completion_tokens
    return {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": answer.turn.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": num_completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt + num_completion,
    }
