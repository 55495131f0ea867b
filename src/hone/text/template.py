"""Chat templates: Jinja2 as models ship them, in a sandbox, with the conventions that transformers set."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hone.schema.messages import Message, ToolCall, ToolSpec

# Unicode noncharacters: they may mark places in a rendered text because no text may contain them.
SPAN_START, SPAN_END = "\ufdd0", "\ufdd1"
FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int


class ChatTemplate:
    """A compiled chat template. A template that is broken, or refuses a conversation, is a ValueError."""

    def __init__(self, source: str) -> None:
        self.source = source
        # Templates that print arguments given as text get them as the model wrote them; others want an object.
        self._takes_text_arguments = "arguments is string" in source
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja2, line {error.lineno}: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as the model reads it. `variables` are the template's own, `enable_thinking` and so on."""
        try:
            return self._template.render(
                variables,
                messages=[self._plain(message) for message in messages],
                tools=[plain_tool(tool) for tool in tools] or None,
                add_generation_prompt=add_generation_prompt,
            )
        except FAILURES as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def render_generations(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), **variables: Any
    ) -> tuple[str, list[Span]]:
        """The conversation, and which of it the template declares generated with `{% generation %}` tags."""
        marked = self.render(messages, tools, mark_generations=True, **variables)
        return split_marks(marked)

    def _plain(self, message: Message) -> dict[str, Any]:
        plain: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            plain["reasoning_content"] = message.reasoning
        if message.tool_calls:
            plain["tool_calls"] = [self._plain_call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            plain["name"] = message.name
        return plain

    def _plain_call(self, call: ToolCall) -> dict[str, Any]:
        arguments = call.arguments if self._takes_text_arguments else plain_arguments(call.arguments)
        return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}


@dataclass(frozen=True, slots=True)
class TemplateFamily:
    """A template that ships with hone and the tokens it needs.

    control_tokens are written by the template or end a turn, never shown to a user; markup_tokens are part of the
    text that a model writes; end_tokens end a turn, the usual one first.
    """

    name: str
    source: str
    control_tokens: tuple[str, ...]
    markup_tokens: tuple[str, ...]
    end_tokens: tuple[str, ...]
    pad_token: str
    bos_token: str | None = None


THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GLM4 = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM4_ARGUMENTS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TOKENS: dict[str, dict[str, Any]] = {
    "chatml": {
        "control_tokens": CHATML,
        "markup_tokens": THINK + CALL,
        "end_tokens": ("<|im_end|>", "<|endoftext|>"),
        "pad_token": "<|endoftext|>",
    },
    "qwen3": {
        "control_tokens": CHATML,
        "markup_tokens": THINK + CALL,
        "end_tokens": ("<|im_end|>", "<|endoftext|>"),
        "pad_token": "<|endoftext|>",
    },
    "glm4": {
        "control_tokens": GLM4,
        "markup_tokens": THINK + CALL + GLM4_ARGUMENTS,
        "end_tokens": ("<|endoftext|>", "<|user|>", "<|observation|>"),
        "pad_token": "<|endoftext|>",
    },
    "llama3": {
        "control_tokens": LLAMA3,
        "markup_tokens": THINK,
        "end_tokens": ("<|eot_id|>", "<|end_of_text|>"),
        "pad_token": "<|end_of_text|>",
        "bos_token": "<|begin_of_text|>",
    },
}
FAMILIES = tuple(TOKENS)


@cache
def built_in(name: str) -> TemplateFamily:
    """The template family of that name: chatml, qwen3, glm4 or llama3."""
    if name not in TOKENS:
        raise ValueError(f"no built-in chat template {name!r}; there are {', '.join(FAMILIES)}")
    path = resources.files("hone.text") / "templates" / f"{name}.jinja"
    return TemplateFamily(name=name, source=path.read_text(encoding="utf-8"), **TOKENS[name])


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: what stands between was generated; marked on request, else printed."""

    tags = {"generation"}  # noqa: RUF012  (declared so by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_print", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _print(self, context: jinja2.runtime.Context, caller: jinja2.runtime.Macro) -> str:
        text = str(caller())
        return f"{SPAN_START}{text}{SPAN_END}" if context.get("mark_generations") else text


@cache
def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def plain_tool(tool: ToolSpec) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def plain_arguments(text: str) -> Any:
    """The object that the arguments of a tool call spell, or the text itself where they spell none."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


def split_marks(marked: str) -> tuple[str, list[Span]]:
    text, spans = "", []
    for piece in marked.split(SPAN_START):
        generated, mark, rest = piece.partition(SPAN_END)
        if mark:
            spans.append(Span(len(text), len(text) + len(generated)))
        text += generated + rest
    return text, spans
