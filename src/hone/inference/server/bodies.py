"""Request bodies of the OpenAI API: what is served, what is accepted and means nothing here, and nothing else."""

from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.sampling import SamplingParameters
from hone.schema.seeds import derive_seed

MAX_CHOICES = 128


class Body(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class CallBody(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class MessageBody(Body):
    """A message; what assistants of other servers add is accepted empty, so that their answers can be sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def message(self) -> Message:
        content = self.content or ""
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=content if isinstance(content, str) else "".join(part.text for part in content),
            reasoning=self.reasoning_content,
            tool_calls=tuple(
                ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ()
            ),
            tool_call_id=self.tool_call_id,
            name=self.name,
        )


class FunctionBody(Body):
    name: str = Field(min_length=1)
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionBody

    def spec(self) -> ToolSpec:
        return ToolSpec(self.function.name, self.function.description, self.function.parameters)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(Body):
    type: Literal["text"]


class SamplingBody(Body):
    """What both routes share. The second half of the fields are extensions."""

    model: str
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    user: str | None = None

    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no effect without stream = true")
        if any(not stop for stop in self.stops):
            raise ValueError("a stop string is empty; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int | None, top_logprobs: int) -> list[SamplingParameters]:
        """The parameters of each choice: they differ in their seeds."""
        first = SamplingParameters(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            max_tokens=max_tokens,
            seed=self.seed,
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logit_bias=self.logit_bias or {},
            top_logprobs=top_logprobs,
        )
        if self.seed is None or self.num_choices == 1:
            return [first] * self.num_choices
        seeds = [self.seed, *(derive_seed(self.seed, "choice", i) for i in range(1, self.num_choices))]
        return [msgspec.structs.replace(first, seed=seed) for seed in seeds]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _chat_consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs = true")
        taken = {"messages", "tools", "add_generation_prompt"} & set(self.chat_template_kwargs or ())
        if taken:
            raise ValueError(f"chat_template_kwargs must not set {', '.join(sorted(taken))}: the request itself does")
        return self

    @property
    def specs(self) -> list[ToolSpec]:
        return [] if self.tool_choice == "none" else [tool.spec() for tool in self.tools or ()]

    def choices(self) -> list[SamplingParameters]:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling(limit, self.top_logprobs or 0)


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(gt=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [one for one in prompt if not isinstance(one, int)]

    def choices(self) -> list[SamplingParameters]:
        return self.sampling(self.max_tokens, self.logprobs or 0)


class LoadBody(Body):
    """POST /admin/load."""

    version: Annotated[int, Field(ge=0)]
    folder: str
