"""The built-in templates render what their golden files say, and what transformers renders; same ids too."""

import json
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hone.text.rendering import Renderer
from hone.text.template import FAMILIES, ChatTemplate, built_in
from hone.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "text"


def rendered(name, conversations):
    family = built_in(name)
    template = ChatTemplate(family.source)
    named = {"bos_token": family.bos_token} if family.bos_token else {}
    return "".join(
        f"===== {conversation.name} =====\n{render(template, conversation, named)}⏎\n" for conversation in conversations
    )


def render(template, conversation, named):
    return template.render(
        conversation.messages,
        conversation.tools,
        add_generation_prompt=conversation.add_generation_prompt,
        **named,
        **conversation.variables,
    )


def plain(message, arguments_as_text):
    """A message in the shape of the OpenAI API, as transformers takes it."""
    made = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        made["reasoning_content"] = message.reasoning
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.arguments if arguments_as_text else json.loads(call.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return made


def plain_tool(tool):
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, chat_template=tokenizer.chat_template, **tokenizer.named_tokens
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_render_their_golden_files(name, conversations):
    assert rendered(name, conversations) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments_as_text", [False, True])
def test_transformers_renders_the_same_text_and_ids(tokenizer, conversations, arguments_as_text):
    if arguments_as_text and "arguments is string" not in tokenizer.chat_template:
        return
    theirs = as_transformers(tokenizer)
    template = ChatTemplate(tokenizer.chat_template)
    for conversation in conversations:
        text = theirs.apply_chat_template(
            [plain(message, arguments_as_text) for message in conversation.messages],
            tools=[plain_tool(tool) for tool in conversation.tools] or None,
            add_generation_prompt=conversation.add_generation_prompt,
            tokenize=False,
            **conversation.variables,
        )
        ours = render(template, conversation, tokenizer.named_tokens)
        assert ours == text
        assert tokenizer.encode(ours, allow_special=True) == theirs.encode(text, add_special_tokens=False)


def test_prompts_have_the_ids_that_transformers_gives(tokenizer, conversations):
    theirs = as_transformers(tokenizer)
    renderer = Renderer(tokenizer)
    as_text = "arguments is string" in tokenizer.chat_template
    for conversation in conversations:
        ids = theirs.apply_chat_template(
            [plain(message, as_text) for message in conversation.messages],
            tools=[plain_tool(tool) for tool in conversation.tools] or None,
            add_generation_prompt=True,
            return_dict=False,
            **conversation.variables,
        )
        assert renderer.prompt(conversation.messages, conversation.tools, **conversation.variables) == ids


if __name__ == "__main__":  # writes the golden files anew; look at the difference before committing it
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import read_conversations

    for family_name in FAMILIES:
        path = GOLDEN / f"{family_name}.txt"
        path.write_text(rendered(family_name, read_conversations()), encoding="utf-8")
