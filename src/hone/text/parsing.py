"""What a model wrote, taken apart: reasoning, content and tool calls, from a whole text or from a stream of it.

Nothing is ever lost and nothing raises: a tool call that does not follow its format stays in the content as written.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NoReturn

from hone.schema.messages import Message, ToolCall, ToolSpec


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as text: the name, and the arguments as the JSON text of an object."""

    name: str
    arguments: str


ReadCall = Callable[[str, Sequence[ToolSpec]], Call | None]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family writes a tool call: between two tags, or, without tags, as JSON objects that begin the answer."""

    name: str
    read: ReadCall
    start: str = ""
    end: str = ""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a family writes a turn: with reasoning between tags or none, with tool calls or none."""

    reasoning: tuple[str, str] | None = None
    calls: CallFormat | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a message as it arrives; one of the three is set."""

    reasoning: str = ""
    content: str = ""
    tool_call: ToolCall | None = None


def parse(
    text: str,
    output_format: OutputFormat,
    tools: Sequence[ToolSpec] = (),
    *,
    in_reasoning: bool = False,
    call_prefix: str = "call_",
) -> Message:
    """The message that `text` spells.

    tools: their schemas decide which arguments are text where the format itself does not say.
    in_reasoning: the prompt already opened the reasoning. call_prefix: tool calls are named prefix0, prefix1 and on.
    Line breaks next to a tag belong to the tag, not to the content.
    """
    parser = StreamingParser(output_format, tools, in_reasoning=in_reasoning, call_prefix=call_prefix)
    return assemble([*parser.feed(text), *parser.finish()])


def assemble(deltas: Sequence[Delta]) -> Message:
    """The message that these pieces of one turn add up to."""
    return Message(
        role="assistant",
        content="".join(delta.content for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas) or None,
        tool_calls=tuple(delta.tool_call for delta in deltas if delta.tool_call is not None),
    )


def detect_format(template: str) -> OutputFormat:
    """The output format of the family that a chat template belongs to, from the tags in it."""
    calls = next((found for sign, found in SIGNS if sign in template), None)
    return OutputFormat(reasoning=("<think>", "</think>") if "</think>" in template else None, calls=calls)


class Part(Enum):
    """Where in a turn the parser stands."""

    OPENING = auto()  # nothing but blank text so far: reasoning may begin
    REASONING = auto()
    CONTENT = auto()


@dataclass(slots=True)
class StreamingParser:
    """`parse` for text that arrives in pieces: however it is cut, the deltas add up to the same message.

    It holds back only what may still turn out to be a tag, the line breaks before one, and an unfinished tool call.
    """

    output_format: OutputFormat
    tools: Sequence[ToolSpec] = ()
    in_reasoning: bool = False
    call_prefix: str = "call_"
    _part: Part = field(init=False)
    _held: str = field(init=False, default="")
    _skip_breaks: bool = field(init=False, default=True)  # line breaks that come now belong to the tag before
    _num_calls: int = field(init=False, default=0)
    _has_content: bool = field(init=False, default=False)
    _owes_break: bool = field(init=False, default=False)  # content was interrupted by a call
    _searched: int = field(init=False, default=0)  # the held text is known to have no closing tag before this

    def __post_init__(self) -> None:
        self._part = Part.REASONING if self.in_reasoning else Part.OPENING

    def feed(self, text: str) -> list[Delta]:
        """The pieces that became certain with `text`."""
        self._held += text
        return self._advance(is_last=False)

    def finish(self) -> list[Delta]:
        """What was held back: the text ended, so it is not a tag any more."""
        return self._advance(is_last=True)

    def _advance(self, is_last: bool) -> list[Delta]:
        deltas: list[Delta] = []
        steps = {Part.OPENING: self._open, Part.REASONING: self._reason, Part.CONTENT: self._write}
        while steps[self._part](deltas, is_last):
            pass
        return [delta for delta in deltas if delta != Delta()]

    # Each step moves text from `_held` to `deltas` and says whether another step can follow at once.

    def _open(self, deltas: list[Delta], is_last: bool) -> bool:
        tag = self.output_format.reasoning[0] if self.output_format.reasoning else ""
        begun = self._held.lstrip()
        if tag and begun.startswith(tag):
            self._held = begun[len(tag) :]
            self._part = Part.REASONING
        elif tag and tag.startswith(begun) and not is_last:
            return False
        else:
            self._part = Part.CONTENT
        return True

    def _reason(self, deltas: list[Delta], is_last: bool) -> bool:
        tag = self.output_format.reasoning[1] if self.output_format.reasoning else "</think>"
        self._drop_breaks()
        reasoning, found, rest = self._held.partition(tag)
        if found:
            deltas.append(Delta(reasoning=reasoning.rstrip("\n")))
            self._held, self._part, self._skip_breaks = rest, Part.CONTENT, True
            return True
        cut = len(self._held) if is_last else safe_length(self._held, tag)
        deltas.append(Delta(reasoning=self._held[:cut]))
        self._held = self._held[cut:]
        return False

    def _write(self, deltas: list[Delta], is_last: bool) -> bool:
        calls = self.output_format.calls
        if self.output_format != OutputFormat():
            self._drop_breaks()
        if calls is None:
            self._emit(deltas, len(self._held))
            return False
        if not calls.start:
            return self._write_bare_call(deltas, calls, is_last)
        return self._write_tagged_call(deltas, calls, is_last)

    def _write_tagged_call(self, deltas: list[Delta], calls: CallFormat, is_last: bool) -> bool:
        start = self._held.find(calls.start)
        if start < 0:
            self._emit(deltas, len(self._held) if is_last else safe_length(self._held, calls.start))
            return False
        self._emit(deltas, len(self._held[:start].rstrip("\n")))
        body = self._held.find(calls.start) + len(calls.start)
        end = self._held.find(calls.end, max(body, self._searched))
        if end < 0:
            self._searched = max(body, len(self._held) - len(calls.end))
            self._emit(deltas, len(self._held) if is_last else 0)
            return False
        call = calls.read(self._held[body:end], self.tools)
        if call is None:  # the call may be one that begins further on: go on from there
            self._emit(deltas, max(body, self._held.rfind(calls.start, body, end)))
        else:
            self._call(deltas, call, end + len(calls.end))
        return True

    def _write_bare_call(self, deltas: list[Delta], calls: CallFormat, is_last: bool) -> bool:
        """JSON objects count as calls at the beginning of the answer and after one another."""
        begun = self._held[bare_call_start(self._held, is_first=self._num_calls == 0) :]
        if self._has_content or not may_begin_call(begun):
            self._emit(deltas, len(self._held))
            return False
        may_have_ended = "}" in self._held[self._searched :]
        self._searched = len(self._held)
        end = object_end(begun) if may_have_ended else None
        call = calls.read(begun[:end], self.tools) if end is not None else None
        if call is not None and end is not None:
            self._call(deltas, call, len(self._held) - len(begun) + end)
            return True
        self._emit(deltas, len(self._held) if is_last or end is not None else 0)
        return False

    def _call(self, deltas: list[Delta], call: Call, length: int) -> None:
        identity = f"{self.call_prefix}{self._num_calls}"
        deltas.append(Delta(tool_call=ToolCall(id=identity, name=call.name, arguments=call.arguments)))
        self._held = self._held[length:]
        self._searched = 0
        self._num_calls += 1
        self._skip_breaks = True
        self._owes_break = self._has_content

    def _emit(self, deltas: list[Delta], length: int) -> None:
        if length == 0:
            return
        deltas.append(Delta(content="\n" * self._owes_break + self._held[:length]))
        self._held = self._held[length:]
        self._searched = max(0, self._searched - length)
        self._has_content, self._owes_break = True, False

    def _drop_breaks(self) -> None:
        if self._skip_breaks and self._held:
            self._held = self._held.lstrip("\n")
            self._skip_breaks = not self._held


def safe_length(text: str, tag: str) -> int:
    """How much of `text` cannot belong to a `tag` that may be on its way, nor to the line breaks before it."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return len(text[:-length].rstrip("\n"))
    return len(text.rstrip("\n"))


# --- calls as JSON -------------------------------------------------------------------------------------------------

BEFORE_BARE_CALL = re.compile(r"\s*(?:<\|python_tag\|>)?\s*")
BETWEEN_BARE_CALLS = re.compile(r"\s*;?\s*(?:<\|python_tag\|>)?\s*")
BARE_CALL_BEGINNINGS = ('{"name":', '{"type":', "<|python_tag|>")


def bare_call_start(text: str, is_first: bool) -> int:
    """Where a JSON call may begin: after blank text, what separates calls, and Llama's tag for tools."""
    found = (BEFORE_BARE_CALL if is_first else BETWEEN_BARE_CALLS).match(text)
    return found.end() if found else 0


def may_begin_call(text: str) -> bool:
    compact = "".join(text[:64].split())
    return any(compact.startswith(sign) or sign.startswith(compact) for sign in BARE_CALL_BEGINNINGS)


def object_end(text: str) -> int | None:
    """Where the JSON object at the beginning of `text` ends; None if there is none or it is not finished."""
    if not text.startswith("{"):
        return None
    try:
        return decode_json(text)[1]
    except (ValueError, RecursionError):
        return None


def read_json_call(body: str, tools: Sequence[ToolSpec]) -> Call | None:
    """{"name": ..., "arguments" or "parameters": {...}}; the arguments are kept as they are spelled."""
    try:
        members = spelled_members(body.strip())
        name = json.loads(members["name"])
        arguments = members["arguments" if "arguments" in members else "parameters"]
        value = json.loads(arguments)
        if isinstance(value, str):  # some models quote the object once more
            arguments, value = value, json.loads(value, parse_constant=refuse)
    except (KeyError, ValueError, RecursionError):
        return None
    return call_if_valid(name, value, arguments)


def call_if_valid(name: object, arguments: object, spelled: str) -> Call | None:
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    return Call(name, spelled) if is_text(name) and is_text(spelled) else None


def is_text(text: str) -> bool:
    """Whether every character can be sent: JSON escapes can spell lone surrogates, which no encoding takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def spelled_members(text: str) -> dict[str, str]:
    """The members of a JSON object, each value as the text that spells it."""
    members: dict[str, str] = {}
    end = skip_blank(text, expect(text, 0, "{"))
    while not text.startswith("}", end):
        if members:
            end = skip_blank(text, expect(text, end, ","))
        key, end = decode_json(text, end)
        if not isinstance(key, str):
            raise ValueError("a key must be text")
        start = skip_blank(text, expect(text, skip_blank(text, end), ":"))
        _, end = decode_json(text, start)
        members[key] = text[start:end]
        end = skip_blank(text, end)
    if end + 1 != len(text):
        raise ValueError("text after the object")
    return members


def decode_json(text: str, start: int = 0) -> tuple[Any, int]:
    return DECODER.raw_decode(text, start)


def refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def expect(text: str, position: int, character: str) -> int:
    if not text.startswith(character, position):
        raise ValueError(f"{character} expected")
    return position + 1


def skip_blank(text: str, position: int) -> int:
    blank = BLANK.match(text, position)
    return blank.end() if blank else position


NAME = re.compile(r"""[^\s<>{}"']+""")
DECODER = json.JSONDecoder(parse_constant=refuse)
BLANK = re.compile(r"[ \t\r\n]*")

# --- calls as tags -------------------------------------------------------------------------------------------------

ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def read_glm_call(body: str, tools: Sequence[ToolSpec]) -> Call | None:
    """name, then pairs of <arg_key>k</arg_key> and <arg_value>v</arg_value>."""
    name, tag, pairs = body.partition("<arg_key>")
    return read_pairs(name.strip(), tag + pairs, ARGUMENT, tools)


def read_function_call(body: str, tools: Sequence[ToolSpec]) -> Call | None:
    """<function=name>, then <parameter=key>value</parameter> for each argument, then </function>."""
    found = FUNCTION.fullmatch(body)
    return read_pairs(found[1].strip(), found[2], PARAMETER, tools) if found else None


def read_pairs(name: str, text: str, pair: re.Pattern[str], tools: Sequence[ToolSpec]) -> Call | None:
    arguments: dict[str, Any] = {}
    position = 0
    types = parameter_types(name, tools)
    while found := pair.match(text, position):
        key = found[1].strip()
        arguments[key] = argument_value(found[2], types.get(key))
        position = found.end()
    if text[position:].strip():
        return None
    return call_if_valid(name, arguments, json.dumps(arguments, ensure_ascii=False))


def parameter_types(name: str, tools: Sequence[ToolSpec]) -> Mapping[str, set[str]]:
    """The JSON types that each parameter of the tool may have, as its schema declares them."""
    schema = next((tool.parameters for tool in tools if tool.name == name), {})
    properties = schema.get("properties")
    return {key: declared_types(one, schema) for key, one in properties.items()} if isinstance(properties, dict) else {}


def declared_types(schema: object, root: Mapping[str, Any], depth: int = 8) -> set[str]:
    """The JSON types that a schema allows, where it says so in words: by type, values, a union or a reference."""
    if not isinstance(schema, dict) or not depth:
        return set()
    types = schema.get("type", ())
    found = {types} if isinstance(types, str) else set(types)
    for value in [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]:
        found |= json_types(value)
    for one in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        found |= declared_types(one, root, depth - 1)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/$defs/"):
        found |= declared_types(root.get("$defs", {}).get(reference.removeprefix("#/$defs/")), root, depth - 1)
    return found


def json_types(value: object) -> set[str]:
    """What JSON schema calls a value; whole numbers go by two names."""
    if value is None or isinstance(value, bool):
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}


def argument_value(text: str, declared: set[str] | None) -> Any:
    """The value that untyped text spells: JSON if it is of a declared type, or none is declared; else text."""
    others = (declared or set()) - {"string"}
    if declared and not others:
        return text
    try:
        value = json.loads(text, parse_constant=refuse)
        spelled = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    is_wrong = declared is not None and "string" in declared and not json_types(value) & others
    return text if is_wrong or not is_text(spelled) else value


HERMES = CallFormat("hermes", read_json_call, "<tool_call>", "</tool_call>")
GLM = CallFormat("glm", read_glm_call, "<tool_call>", "</tool_call>")
QWEN3_CODER = CallFormat("qwen3_coder", read_function_call, "<tool_call>", "</tool_call>")
LLAMA_JSON = CallFormat("llama_json", read_json_call)
CALL_FORMATS = {found.name: found for found in (HERMES, GLM, QWEN3_CODER, LLAMA_JSON)}
# What in a template gives its family away, the most particular first.
SIGNS = (
    ("<arg_key>", GLM),
    ("<function=", QWEN3_CODER),
    ("<tool_call>", HERMES),
    ('"parameters": ', LLAMA_JSON),
)
