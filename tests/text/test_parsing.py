"""Reasoning, content and tool calls out of a text: whole, or in any pieces."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.text.parsing import (
    CALL_FORMATS,
    GLM,
    HERMES,
    LLAMA_JSON,
    QWEN3_CODER,
    Delta,
    OutputFormat,
    StreamingParser,
    assemble,
    detect_format,
    parse,
)
from hone.text.template import built_in

THINK = ("<think>", "</think>")
FORMATS = {name: OutputFormat(THINK, calls) for name, calls in CALL_FORMATS.items()} | {
    "reasoning": OutputFormat(THINK),
    "plain": OutputFormat(),
    "calls": OutputFormat(None, HERMES),
}
QWEN = FORMATS["hermes"]
WEATHER = ToolSpec(
    name="weather",
    description="",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "odd": True},
    },
)
WEATHER_CALL = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "12", "days": 3}}\n</tool_call>',
    "glm": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    "llama_json": '{"name": "weather", "parameters": {"city": "12", "days": 3}}',
}


def message(content="", **fields):
    return Message(role="assistant", content=content, **fields)


def call(name, arguments, index=0):
    return ToolCall(id=f"call_{index}", name=name, arguments=arguments)


# --- reasoning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nb", message("b", reasoning="why")),
        ("\n<think>why</think>\nb", message("b", reasoning="why")),
        ("<think></think>\nb", message("b")),
        ("b", message("b")),
        ("b\n", message("b\n")),
        ("  b", message("  b")),
        ("<think>cut o", message(reasoning="cut o")),
        ("<think>a\n\nb</think>", message(reasoning="a\n\nb")),
        ("b <think>late</think>", message("b <think>late</think>")),
        ("no start</think>b", message("no start</think>b")),
        ("<thin", message("<thin")),
        ("", message()),
        ("<think>a</think>b</think>c", message("b</think>c", reasoning="a")),
    ],
)
def test_reasoning_stands_at_the_beginning_between_tags(text, expected):
    assert parse(text, QWEN) == expected


def test_reasoning_that_the_prompt_opened_needs_no_tag():
    assert parse("why\n</think>\n\nb", QWEN, in_reasoning=True) == message("b", reasoning="why")
    assert parse("why", QWEN, in_reasoning=True) == message(reasoning="why")


def test_without_a_format_the_text_is_the_content():
    text = "\n<think>x</think>\n<tool_call>"
    assert parse(text, OutputFormat()) == message(text)


# --- tool calls


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_each_family_spells_the_same_call(name):
    parsed = parse(WEATHER_CALL[name], FORMATS[name], [WEATHER])
    assert parsed == message(tool_calls=(call("weather", '{"city": "12", "days": 3}'),))


@pytest.mark.parametrize("name", ["hermes", "glm", "qwen3_coder"])
def test_reasoning_content_and_several_calls_come_apart(name):
    one = WEATHER_CALL[name]
    text = f"<think>hm</think>\n\nLet me look.\n{one}\n{one}"
    expected = '{"city": "12", "days": 3}'
    assert parse(text, FORMATS[name], [WEATHER]) == message(
        "Let me look.",
        reasoning="hm",
        tool_calls=(call("weather", expected), call("weather", expected, 1)),
    )


def test_content_around_a_call_stays_apart():
    text = f"before\n\n{WEATHER_CALL['hermes']}\nafter"
    assert parse(text, QWEN).content == "before\nafter"


def test_several_bare_calls_are_separated_by_semicolons():
    text = '<|python_tag|>{"name": "a", "parameters": {}}; {"type": "function", "name": "b", "parameters": {"x": "}"}}'
    parsed = parse(text, FORMATS["llama_json"])
    assert parsed == message(tool_calls=(call("a", "{}"), call("b", '{"x": "}"}', 1)))


def test_arguments_stay_as_the_model_wrote_them():
    text = '<tool_call>{"arguments":{"b" :1.0,  "a":"\\u00e9"}, "name":"f"}</tool_call>'
    assert parse(text, QWEN).tool_calls == (call("f", '{"b" :1.0,  "a":"\\u00e9"}'),)


def test_arguments_quoted_once_more_are_understood():
    text = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert parse(text, QWEN).tool_calls == (call("f", '{"a": 1}'),)


def test_calls_are_named_as_asked():
    parsed = parse(WEATHER_CALL["hermes"] * 2, QWEN, call_prefix="call_7_")
    assert [found.id for found in parsed.tool_calls] == ["call_7_0", "call_7_1"]


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "42", "42"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, '"42"', '"42"'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"type": ["string", "integer"]}, "42", 42),
        ({"type": ["string", "number"]}, "4.5", 4.5),
        ({"type": ["string", "integer"]}, "true", "true"),
        ({"type": "integer"}, "no number", "no number"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, "2"]}, "1", 1),
        ({"const": "1"}, "1", "1"),
        ({"$ref": "#/$defs/Level"}, "1", "1"),
        ({"$ref": "#/$defs/Nowhere"}, "1", 1),
        ({"$ref": "#/$defs/Self"}, "1", 1),
        ({}, "1", 1),
        (True, "1", 1),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1]", [1]),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, "[1]", "[1]"),
    ],
)
def test_untyped_values_are_of_a_type_that_the_schema_declares(schema, written, value):
    definitions = {"Level": {"enum": ["1", "2"]}, "Self": {"$ref": "#/$defs/Self"}}
    tool = ToolSpec("f", "", {"type": "object", "properties": {"x": schema}, "$defs": definitions})
    pair = f"<arg_key>x</arg_key><arg_value>{written}</arg_value>"
    [found] = parse(f"<tool_call>f{pair}</tool_call>", FORMATS["glm"], [tool]).tool_calls
    assert json.loads(found.arguments) == {"x": value}


def test_untyped_values_are_json_where_they_can_be():
    values = {"a": "3", "b": "three", "c": '{"x": [1]}', "d": "NaN", "e": "1e999", "f": '"\\ud800"', "g": " 4 "}
    pairs = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in values.items())
    [found] = parse(f"<tool_call>f{pairs}</tool_call>", FORMATS["glm"]).tool_calls
    assert json.loads(found.arguments) == {
        "a": 3,
        "b": "three",
        "c": {"x": [1]},
        "d": "NaN",
        "e": "1e999",
        "f": '"\\ud800"',
        "g": 4,
    }


def test_values_of_many_lines_are_kept_whole():
    code = "def f():\n    return '<b>'\n"
    glm = f"<tool_call>run\n<arg_key>code</arg_key>\n<arg_value>{code}</arg_value>\n</tool_call>"
    assert json.loads(parse(glm, FORMATS["glm"]).tool_calls[0].arguments) == {"code": code}
    coder = f"<tool_call>\n<function=run>\n<parameter=code>\n{code}\n</parameter>\n</function>\n</tool_call>"
    assert json.loads(parse(coder, FORMATS["qwen3_coder"]).tool_calls[0].arguments) == {"code": code}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "not json",
        '{"name": "f"',
        '{"name": "f"}',
        '{"name": 3, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {}} and more',
        '{"name": "f", "arguments": "no"}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "arguments": ' + "[" * 5000,
        '{"name": "f" "arguments": {}}',
        "{3: 4}",
        "<arg_key>k</arg_key><arg_value>v</arg_value>",
        "f<arg_key>k</arg_key>",
        "f<arg_key>k</arg_key><arg_value>v</arg_value>tail",
        "<function=f>tail</function>",
    ],
)
@pytest.mark.parametrize("name", ["hermes", "glm", "qwen3_coder"])
def test_a_malformed_call_stays_in_the_content(name, body):
    text = f"before\n<tool_call>{body}</tool_call>\nafter\n"
    assert parse(text, FORMATS[name]) == message(text)


def test_a_call_cut_short_stays_in_the_content():
    for name in ("hermes", "glm", "qwen3_coder"):
        whole = WEATHER_CALL[name]
        for length in range(1, len(whole)):
            assert parse("x\n" + whole[:length], FORMATS[name]) == message("x\n" + whole[:length])
    whole = WEATHER_CALL["llama_json"]
    for length in range(1, len(whole)):
        assert parse(whole[:length], FORMATS["llama_json"]) == message(whole[:length])


def test_a_good_call_after_a_broken_one_is_found():
    text = "<tool_call>oops <tool_call>" + WEATHER_CALL["hermes"]
    parsed = parse(text, QWEN)
    assert parsed == message("<tool_call>oops <tool_call>", tool_calls=(call("weather", '{"city": "12", "days": 3}'),))


def test_json_answers_are_not_calls():
    for text in ['{"name": "Ada", "born": 1815}', '{"a": 1}', '{"name": "f", "parameters": 3}', "{", "[1, 2]"]:
        assert parse(text, FORMATS["llama_json"]) == message(text)


def test_a_bare_call_after_other_content_is_content():
    text = "Here: " + WEATHER_CALL["llama_json"]
    assert parse(text, FORMATS["llama_json"]) == message(text)


# --- streams

PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "<thi", "</", "\n", "\n\n", " ", "a", "é", "{", "}",
    '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "parameters": {}}', '{"name":', "; ", "<|python_tag|>",
    "f\n<arg_key>k</arg_key>\n<arg_value>1</arg_value>\n", "<arg_key>", "<function=f>", "<parameter=k>\nv\n</parameter>",
    "</function>", *WEATHER_CALL.values(),
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


def streamed(text, output_format, cuts, in_reasoning=False):
    parser = StreamingParser(output_format, [WEATHER], in_reasoning=in_reasoning)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    deltas = [delta for start, end in pairwise(edges) for delta in parser.feed(text[start:end])]
    return deltas + parser.finish()


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), texts, st.lists(st.integers(0, 400), max_size=30), st.booleans())
@example("hermes", "\n\n<tool_call>x</tool_call>", list(range(40)), False)
@example("llama_json", '{"parameters": {}, "name": "f"}', list(range(40)), False)
def test_a_stream_cut_anywhere_gives_the_message_of_the_whole(name, text, cuts, in_reasoning):
    whole = parse(text, FORMATS[name], [WEATHER], in_reasoning=in_reasoning)
    assert assemble(streamed(text, FORMATS[name], cuts, in_reasoning)) == whole
    each = list(range(len(text)))
    assert assemble(streamed(text, FORMATS[name], each, in_reasoning)) == whole


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), texts)
def test_nothing_but_blanks_is_lost_where_no_call_is_found(name, text):
    parsed = parse(text, FORMATS[name])
    content, reasoning = compact(parsed.content), compact(parsed.reasoning or "")
    if not parsed.tool_calls:
        assert compact(text) in (content, f"<think>{reasoning}", f"<think>{reasoning}</think>{content}")


def compact(text):
    return "".join(text.split())


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["hermes", "glm", "reasoning"]), st.text(alphabet="abc <\n{é").filter(lambda t: "\n" not in t))
def test_plain_text_is_held_back_only_while_it_may_be_a_tag(name, text):
    parser = StreamingParser(FORMATS[name])
    given_out = "".join(delta.content for delta in parser.feed("x" + text))
    assert ("x" + text).startswith(given_out)
    assert "x" + text in (given_out, given_out + "<")


def test_deltas_come_as_soon_as_they_are_certain():
    parser = StreamingParser(QWEN)
    assert parser.feed("<thi") == []
    assert parser.feed("nk>\nwhy") == [Delta(reasoning="why")]
    assert parser.feed(" not\n</") == [Delta(reasoning=" not")]
    assert parser.feed("think>\n\nHi") == [Delta(content="Hi")]
    assert parser.feed(" <tool") == [Delta(content=" ")]
    assert parser.feed("s>\n") == [Delta(content="<tools>")]
    assert parser.feed('<tool_call>{"name": "f", "arguments": {}}') == []
    assert parser.feed("</tool_call>") == [Delta(tool_call=call("f", "{}"))]
    assert parser.finish() == []


def test_a_degenerate_stream_of_tags_is_parsed_in_reasonable_work():
    text = "<tool_call>" * 20_000 + "</tool_call>"
    assert parse(text, QWEN).content == text


# --- formats


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", OutputFormat(THINK, HERMES)),
        ("qwen3", OutputFormat(THINK, HERMES)),
        ("glm4", OutputFormat(THINK, GLM)),
        ("llama3", OutputFormat(THINK, LLAMA_JSON)),
    ],
)
def test_a_template_tells_the_format_of_its_family(name, expected):
    assert detect_format(built_in(name).source) == expected


def test_other_templates_tell_theirs():
    assert detect_format("<tool_call>\n<function=x>") == OutputFormat(None, QWEN3_CODER)
    assert detect_format("{{ messages[0].content }}") == OutputFormat()
