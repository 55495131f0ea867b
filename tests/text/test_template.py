"""Chat templates as models ship them: conventions, errors, sandbox, generation tags."""

from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.text.template import ChatTemplate, Span, built_in

HELLO = Message(role="user", content="hello")
TAGGED = """{% for message in messages %}
<{{ message.role }}>
{% if message.role == 'assistant' %}
{% generation %}{{ message.content }}</>{% endgeneration %}

{%- else %}
{{ message.content }}
{% endif %}
{% endfor %}"""


def test_blocks_are_trimmed_as_transformers_trims_them():
    source = "  {% for m in messages %}\n    {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    [theirs], _ = render_jinja_template([[{"role": "user", "content": "hello"}]], chat_template=source)
    assert ChatTemplate(source).render([HELLO]) == theirs


def test_json_in_a_template_keeps_unicode_and_markup():
    template = ChatTemplate("{{ tools[0].function.parameters | tojson }}|{{ 'é<' | tojson(indent=2) }}")
    tool = ToolSpec(name="t", description="", parameters={"é": "<&'>"})
    assert template.render([HELLO], [tool]) == '{"é": "<&\'>"}|"é<"'


def test_templates_may_use_the_time_loop_controls_and_their_own_variables():
    source = (
        "{{ strftime_now('%Y') }}{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ x }}"
    )
    assert ChatTemplate(source).render([HELLO], x="!") == f"{datetime.now().year}012!"


def test_tool_call_arguments_are_objects_unless_the_template_takes_text():
    call = ToolCall(id="c", name="f", arguments='{"b":1,  "a":2}')
    message = Message(role="assistant", tool_calls=(call,))
    by_key = "{% set arguments = messages[0].tool_calls[0].function.arguments %}{{ arguments.b }}"
    assert ChatTemplate(by_key).render([message]) == "1"
    as_text = by_key + "{{ arguments if arguments is string }}"
    assert ChatTemplate(as_text).render([message]) == call.arguments


def test_arguments_that_are_no_object_reach_the_template_as_text():
    message = Message(role="assistant", tool_calls=(ToolCall(id="c", name="f", arguments="[1"),))
    assert ChatTemplate("{{ messages[0].tool_calls[0].function.arguments }}").render([message]) == "[1"


def test_generation_tags_tell_what_was_generated():
    template = ChatTemplate(TAGGED)
    messages = [HELLO, Message(role="assistant", content="hi"), HELLO, Message(role="assistant", content="again")]
    text, spans = template.render_generations(messages)
    assert text == template.render(messages)
    assert [text[span.start : span.end] for span in spans] == ["hi</>", "again</>"]


def test_generation_spans_are_those_of_transformers():
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "hi"}]
    [theirs], [spans] = render_jinja_template([messages], chat_template=TAGGED, return_assistant_tokens_mask=True)
    ours = ChatTemplate(TAGGED).render_generations([Message(**message) for message in messages])
    assert ours == (theirs, [Span(start, end) for start, end in spans])


def test_a_broken_template_names_its_line():
    with pytest.raises(ValueError, match="not valid Jinja2, line 2"):
        ChatTemplate("fine\n{% if %}")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + none }}", "can only concatenate str"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_conversation_that_a_template_refuses_is_a_readable_error(source, complaint):
    with pytest.raises(ValueError, match=f"refuses the conversation.*{complaint}"):
        ChatTemplate(source).render([HELLO])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ strftime_now.__globals__.os }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(source):
    with pytest.raises(ValueError, match="refuses the conversation"):
        ChatTemplate(source).render([HELLO])


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="no built-in chat template 'gpt'; there are chatml, qwen3, glm4, llama3"):
        built_in("gpt")
