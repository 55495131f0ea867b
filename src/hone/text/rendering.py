"""Conversations to token ids: prompts, their extension turn by turn, and training sequences with loss masks.

Tokens are trained as they were sampled. A prompt is encoded once; what the model sampled is kept as token ids; the next
messages are encoded alone and appended. So every text is cut where a completion begins and ends, here and in training
sequences, and no token ever crosses such a cut.

A template may rewrite history: Qwen3's and GLM's forget the reasoning of earlier turns. Extension appends all the same.
For training, `render_branches` gives each assistant turn the context in which it would be sampled: one sequence where
contexts extend one another, several where the template rewrites.

Control tokens come from the template and from assistant messages (training data, sampled history). Their characters in
any other message are encoded as text: a tool result cannot end a turn.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.text.parsing import detect_format, parse
from hone.text.template import ChatTemplate, Span
from hone.text.tokenizer import Tokenizer, any_of

PLACEHOLDER = "\ufdd3placeholder\ufdd3"
GUARD = "\ufdd2"  # after the first character of a control token that a message spells out
ASK = Message(role="user", content="?")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A training sequence; loss_mask is 1 for the tokens that the assistant writes, its end of turn included."""

    token_ids: list[int]
    loss_mask: list[int]


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn in its own context: the text up to its end, and where in it the turn begins.

    is_open: the template writes no end of turn, what follows tells it.
    """

    text: str
    start: int
    is_open: bool
    calls_tools: bool


class Renderer:
    """Renders conversations for one tokenizer with one chat template; prompts are remembered, the latest `cache_size`.

    `variables` are handed to the template: `enable_thinking` and so on.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None, *, cache_size: int = 4096) -> None:
        if template is None and tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; give its folder a chat_template.jinja")
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate(tokenizer.chat_template or "")
        self.format = detect_format(self.template.source)
        self._control = any_of(tokenizer.special_tokens)
        self._end = any_of(tokenizer.token(i) for i in tokenizer.eos_token_ids)
        self._remembered = Remembered(cache_size)

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), **variables: Any) -> list[int]:
        """The conversation so far and the beginning of the assistant's turn."""

        def render() -> tuple[int, ...]:
            return tuple(self._encode(self._prompt_text(messages, tools, variables)))

        return list(self._remembered.get(("prompt", messages, tools, variables), render))

    def extend(
        self,
        token_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        **variables: Any,
    ) -> list[int]:
        """What to append to `token_ids`, a prompt and the completion sampled on it, before the next completion.

        Closes the turn if the completion did not end it as the template does, then renders the new messages and the
        beginning of the next turn. Costs O(new messages).
        """

        def render() -> tuple[int, ...]:
            return tuple(self._encode(self._gap_text(new_messages, tools, variables)))

        gap = self._remembered.get(("extend", new_messages, tools, variables), render)
        is_closed = bool(token_ids) and gap[:1] == (token_ids[-1],) and gap[0] in self.tokenizer.eos_token_ids
        return list(gap[1:] if is_closed else gap)

    def parse(
        self,
        token_ids: Sequence[int],
        tools: Sequence[ToolSpec] = (),
        *,
        call_prefix: str = "call_",
        **variables: Any,
    ) -> Message:
        """The message that a sampled completion spells."""
        if token_ids and token_ids[-1] in self.tokenizer.eos_token_ids:
            token_ids = token_ids[:-1]
        text = self.tokenizer.decode(token_ids)
        in_reasoning = self.opens_reasoning(**variables)
        return parse(text, self.format, tools, in_reasoning=in_reasoning, call_prefix=call_prefix)

    def opens_reasoning(self, **variables: Any) -> bool:
        """Whether prompts end inside the reasoning, so that completions begin there."""
        if self.format.reasoning is None:
            return False
        prompt = self.tokenizer.decode(self.prompt([ASK], **variables))
        return prompt.rstrip().endswith(self.format.reasoning[0])

    def render_for_training(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), **variables: Any
    ) -> Rendered:
        """The whole conversation as one sequence, as the template renders it.

        Only turns that stand in it as they would be sampled are trained: turns whose reasoning the template forgets are
        not. `render_branches` trains every turn.
        """
        messages = self._guarded(messages)
        if "endgeneration" in self.template.source:
            return self._render_declared(messages, tools, variables)
        text = self.template.render(messages, tools, **self._with_tokens(variables))
        return self._masked(text, self._turns(messages, tools, variables))

    def render_branches(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), **variables: Any
    ) -> list[Rendered]:
        """Training sequences in which each assistant turn is trained once, in the context in which it is sampled."""
        messages = self._guarded(messages)
        if "endgeneration" in self.template.source:
            return [self._render_declared(messages, tools, variables)]
        branches: list[list[Turn]] = []
        for turn in reversed(self._turns(messages, tools, variables)):
            if branches and branches[-1][0].text.startswith(turn.text):
                branches[-1].append(turn)
            else:
                branches.append([turn])
        return [self._masked(turns[0].text, turns[::-1]) for turns in reversed(branches)]

    def _prompt_text(self, messages: Sequence[Message], tools: Sequence[ToolSpec], variables: dict[str, Any]) -> str:
        settings = self._with_tokens(variables)
        return self.template.render(self._guarded(messages), tools, add_generation_prompt=True, **settings)

    def _gap_text(self, messages: Sequence[Message], tools: Sequence[ToolSpec], variables: dict[str, Any]) -> str:
        """What the template writes between an answer and the beginning of the next one."""
        if not messages:
            raise ValueError("a conversation is extended by at least one message")
        settings = self._with_tokens(variables)
        messages = self._guarded(messages)
        refusal = None
        for answer in placeholder_answers(messages):
            try:
                text = self.template.render([ASK, answer, *messages], tools, add_generation_prompt=True, **settings)
            except ValueError as error:
                refusal = error
                continue
            return self._after_answer(text, has_calls=bool(answer.tool_calls))
        assert refusal is not None
        raise refusal

    def _after_answer(self, text: str, has_calls: bool) -> str:
        _, found, rest = text.partition(PLACEHOLDER)
        if not found:
            raise ValueError("the chat template does not print the assistant's content, so it cannot be extended")
        end = self._end.search(rest) if has_calls else None
        return rest[end.start() :] if end else rest

    def _render_declared(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], variables: dict[str, Any]
    ) -> Rendered:
        """With the spans that the template's generation tags declare, and the end of turn after each."""
        text, spans = self.template.render_generations(messages, tools, **self._with_tokens(variables))
        ends = [self._end.match(text, span.end) for span in spans]
        closed = [Span(span.start, end.end() if end else span.end) for span, end in zip(spans, ends, strict=True)]
        return self._cut(text, closed)

    def _turns(self, messages: Sequence[Message], tools: Sequence[ToolSpec], variables: dict[str, Any]) -> list[Turn]:
        settings = self._with_tokens(variables)
        turns = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self.template.render(messages[:index], tools, add_generation_prompt=True, **settings)
                text = self.template.render(messages[: index + 1], tools, **settings)
                turns.append(self._turn(prompt, text, bool(message.tool_calls)))
        return turns

    def _turn(self, prompt: str, text: str, calls_tools: bool) -> Turn:
        if not text.startswith(prompt):
            raise ValueError(
                "the chat template renders an assistant turn differently from its generation prompt, which ends with "
                f"{prompt[-40:]!r}; mark the turns in the template with {{% generation %}} tags"
            )
        ends = [end.end() for end in self._end.finditer(text, len(prompt)) if not text[end.end() :].strip()]
        return Turn(text[: ends[-1]] if ends else text, len(prompt), is_open=not ends, calls_tools=calls_tools)

    def _masked(self, text: str, turns: Sequence[Turn]) -> Rendered:
        spans = []
        for turn in turns:
            if text.startswith(turn.text):
                end = self._end.match(text, len(turn.text)) if turn.is_open else None
                spans.append(Span(turn.start, end.end() if end else len(turn.text)))
        rendered = self._cut(text, spans)
        if turns and turns[-1].is_open and text == turns[-1].text:
            rendered.token_ids.append(self._end_token_id(turns[-1].calls_tools))
            rendered.loss_mask.append(1)
        return rendered

    def _end_token_id(self, calls_tools: bool) -> int:
        """What ends a turn in a template that writes no end: the first token of what follows, if one ends turns."""
        following = Message(role="tool" if calls_tools else "user", content="?")
        gap = self.extend([], [following])
        ends = self.tokenizer.eos_token_ids
        if not ends:
            raise ValueError("the tokenizer names no token that ends a turn; set eos_token in tokenizer_config.json")
        return gap[0] if gap[0] in ends else ends[0]

    def _cut(self, text: str, spans: Sequence[Span]) -> Rendered:
        rendered = Rendered([], [])
        position = 0
        for span in spans:
            self._append(rendered, text[position : span.start], 0)
            self._append(rendered, text[span.start : span.end], 1)
            position = span.end
        self._append(rendered, text[position:], 0)
        return rendered

    def _append(self, rendered: Rendered, text: str, mask: int) -> None:
        token_ids = self._encode(text)
        rendered.token_ids.extend(token_ids)
        rendered.loss_mask.extend([mask] * len(token_ids))

    def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        return [self._guarded_message(message) for message in messages]

    def _guarded_message(self, message: Message) -> Message:
        if message.role == "assistant" or not self._control.search(message.content):
            return message
        content = self._control.sub(lambda found: found[0][0] + GUARD + found[0][1:], message.content)
        return msgspec.structs.replace(message, content=content)

    def _encode(self, text: str) -> list[int]:
        if GUARD not in text:
            return self.tokenizer.encode(text, allow_special=True)
        token_ids: list[int] = []
        for index, piece in enumerate(self._guarded_control().split(text)):
            plain = piece.replace(GUARD, "") if index % 2 else piece
            token_ids += self.tokenizer.encode(plain, allow_special=index % 2 == 0) if plain else []
        return token_ids

    def _guarded_control(self) -> re.Pattern[str]:
        guarded = any_of(token[0] + GUARD + token[1:] for token in self.tokenizer.special_tokens)
        return re.compile(f"({guarded.pattern})")

    def _with_tokens(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self.tokenizer.named_tokens | variables


class Remembered:
    """The token ids made last, by what they were made from; the ones used longest ago are forgotten first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._made: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()

    def get(self, source: tuple[Any, ...], make: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        key = blake2b(msgspec.msgpack.encode(source), digest_size=16).digest()
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
            if len(self._made) > self._size:
                self._made.popitem(last=False)
        else:
            self._made.move_to_end(key)
        return found


def placeholder_answers(following: Sequence[Message]) -> list[Message]:
    """Answers to stand before `following`: plain, and with the tool calls that strict templates want before results."""
    plain = Message(role="assistant", content=PLACEHOLDER)
    results = [message for message in following if message.role == "tool"]
    calls = [
        ToolCall(id=result.tool_call_id or f"call_{index}", name=result.name or "tool", arguments="{}")
        for index, result in enumerate(results)
    ]
    return [plain, msgspec.structs.replace(plain, tool_calls=tuple(calls))] if calls else [plain]
