"""The OpenAI API: chat completions, completions, models, and the chat page."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from hone.inference.engine.engine import Finished, NewToken
from hone.inference.server import errors
from hone.inference.server.bodies import ChatBody, CompletionBody, SamplingBody
from hone.inference.server.errors import ApiError, json_response
from hone.inference.server.frontend import Arrival, Frontend
from hone.inference.server.texts import ChoiceText, chat_logprobs, completion_logprobs
from hone.schema.messages import ToolCall, ToolSpec
from hone.schema.sampling import Generate, Generated, SamplingParameters
from hone.text.parsing import Delta, StreamingParser
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes need: the engine's front, the text side of the model, the name it is served under."""

    frontend: Frontend
    tokenizer: Tokenizer
    renderer: Renderer | None
    model_name: str
    max_context: int
    created: int = field(default_factory=lambda: int(time.time()))


def api_app(service: Service) -> FastAPI:
    """The API as an application; the admin routes may be added to it."""
    app = FastAPI(title="hone", docs_url=None, redoc_url=None)
    errors.install(app)
    app.include_router(api_router(service))
    return app


def api_router(service: Service) -> APIRouter:
    router = APIRouter()
    page = resources.files("hone.inference.server").joinpath("page.html").read_text(encoding="utf-8")

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> str:
        return page

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_card(service)]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(service, name)
        return json_response(model_card(service))

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        check_model(service, body.model)
        return await respond(service, ChatAnswer(service, body), request)

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        check_model(service, body.model)
        return await respond(service, TextAnswer(service, body), request)

    return router


def check_model(service: Service, name: str) -> None:
    if name != service.model_name:
        raise ApiError(
            404,
            f"the model {name!r} does not exist here; this server has {service.model_name!r}",
            param="model",
            code="model_not_found",
        )


def model_card(service: Service) -> Json:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "hone",
        "max_model_len": service.max_context,
    }


async def respond(service: Service, answer: "ChatAnswer | TextAnswer", request: Request) -> Response:
    """Generate, as a stream or at once; a client that goes away cancels what it asked for."""
    if answer.body.stream:
        chunks = stream(service, answer)
        first = await anext(chunks)  # a request that is refused gets its status code, not a broken stream
        return StreamingResponse(_chained(first, chunks), media_type="text/event-stream")
    return json_response(await _unless_gone(request, collect(service, answer)))


async def collect(service: Service, answer: "ChatAnswer | TextAnswer") -> Json:
    """The whole answer."""
    finished: dict[int, Finished] = {}
    async with service.frontend.submit(answer.requests, streams=False) as arrivals:
        async for arrival in arrivals:
            assert isinstance(arrival.event, Finished)
            check_usable(arrival.event)
            finished[arrival.index] = arrival.event
    ordered = [finished[index] for index in range(len(finished))]
    return answer.head() | {
        "choices": [answer.choice(index, one) for index, one in enumerate(ordered)],
        "usage": usage(answer.requests, ordered, answer.body.num_choices),
        **answer.prompt_fields(),
    }


async def stream(service: Service, answer: "ChatAnswer | TextAnswer") -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    finished: list[Finished] = []
    async with service.frontend.submit(answer.requests, streams=True) as arrivals:
        yield b""  # the request is accepted: from now on the response watches for a client that goes away
        for chunk in answer.opening_chunks():
            yield event(answer.head() | chunk)
        try:
            async for arrival in arrivals:
                if isinstance(arrival.event, Finished):
                    check_usable(arrival.event)
                    finished.append(arrival.event)
                for choice in answer.pieces(arrival):
                    yield event(answer.head() | {"choices": [choice]})
        except ApiError as error:
            yield event(error.body)
            return
    if answer.body.includes_usage:
        totals = usage(answer.requests, finished, answer.body.num_choices)
        yield event(answer.head() | {"choices": [], "usage": totals})
    yield b"data: [DONE]\n\n"


def event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def check_usable(finished: Finished) -> None:
    if finished.failure is not None:
        raise ApiError(500, finished.failure, kind="server_error")


def usage(requests: Sequence[Generate], finished: Sequence[Finished], choices_per_prompt: int) -> Json:
    """Token counts; a prompt counts once, however many choices continue it."""
    num_prompt = sum(len(request.prompt_token_ids) for request in requests[::choices_per_prompt])
    num_completion = sum(len(one.generated.token_ids) for one in finished)
    num_cached = sum(one.generated.num_cached_tokens for one in finished)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": min(num_cached, num_prompt)},
    }


def requests_for(identity: str, prompts: Sequence[list[int]], choices: Sequence[SamplingParameters]) -> list[Generate]:
    """One request for each choice of each prompt."""
    return [
        Generate(f"{identity}-{index * len(choices) + choice}", prompt, sampling)
        for index, prompt in enumerate(prompts)
        for choice, sampling in enumerate(choices)
    ]


def token_fields(body: SamplingBody, token_ids: Sequence[int], versions: Sequence[tuple[int, int]]) -> Json:
    """The extension of a choice that was asked for with return_token_ids."""
    return {"token_ids": token_ids, "policy_versions": versions} if body.return_token_ids else {}


def token_fields_of(body: SamplingBody, event: NewToken | Finished) -> Json:
    if isinstance(event, NewToken):
        return token_fields(body, [event.token_id], [(event.version, 1)])
    return {}


def versions_of(generated: Generated) -> list[tuple[int, int]]:
    return [(run.version, run.count) for run in generated.versions]


class ChatAnswer:
    """Answers one chat completion request."""

    def __init__(self, service: Service, body: ChatBody) -> None:
        if service.renderer is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
        self.body = body
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = service.model_name
        self._tokenizer = service.tokenizer
        self._tools: list[ToolSpec] = body.specs
        variables = body.chat_template_kwargs or {}
        try:
            prompt = service.renderer.prompt([one.message() for one in body.messages], self._tools, **variables)
            in_reasoning = service.renderer.opens_reasoning(**variables)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        self.requests = requests_for(self._id, [prompt], body.choices())
        end_ids = {*service.tokenizer.eos_token_ids, *(body.stop_token_ids or ())}
        self._texts = [ChoiceText(service.tokenizer, end_ids, body.stops, skip_special=False) for _ in self.requests]
        self._parsers = [
            StreamingParser(
                service.renderer.format,
                self._tools,
                in_reasoning=in_reasoning,
                call_prefix=f"call_{uuid.uuid4().hex[:12]}_",
            )
            for _ in self.requests
        ]
        self._num_calls = [0] * len(self.requests)

    def head(self) -> Json:
        kind = "chat.completion.chunk" if self.body.stream else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def prompt_fields(self) -> Json:
        return {"prompt_token_ids": self.requests[0].prompt_token_ids} if self.body.return_token_ids else {}

    def choice(self, index: int, finished: Finished) -> Json:
        generated = finished.generated
        text, parser = self._texts[index], self._parsers[index]
        deltas = [*parser.feed(text.feed(generated.token_ids) + text.finish()), *parser.finish()]
        calls = [call_json(delta.tool_call) for delta in deltas if delta.tool_call is not None]
        message: Json = {
            "role": "assistant",
            "content": "".join(delta.content for delta in deltas) or (None if calls else ""),
            "refusal": None,
        }
        if reasoning := "".join(delta.reasoning for delta in deltas):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(generated.token_ids, generated.logprobs, finished.top_logprobs),
            "finish_reason": "tool_calls" if calls else generated.finish_reason.value,
            **token_fields(self.body, generated.token_ids, versions_of(generated)),
        }

    def opening_chunks(self) -> list[Json]:
        return [
            {"choices": [piece(index, {"role": "assistant", "content": ""})], **self.prompt_fields()}
            for index in range(len(self.requests))
        ]

    def pieces(self, arrival: Arrival) -> list[Json]:
        index, event = arrival.index, arrival.event
        text, parser = self._texts[index], self._parsers[index]
        if isinstance(event, Finished):
            choices = [piece(index, delta) for delta in self._deltas(index, parser.feed(text.finish()))]
            choices += [piece(index, delta) for delta in self._deltas(index, parser.finish())]
            reason = "tool_calls" if self._num_calls[index] else event.generated.finish_reason.value
            return [*choices, piece(index, {}, finish_reason=reason)]
        deltas = self._deltas(index, parser.feed(text.feed([event.token_id])))
        top = [event.top_logprobs] if event.top_logprobs else []
        first = {
            "logprobs": self._logprobs([event.token_id], [event.logprob], top),
            **token_fields_of(self.body, event),
        }
        if not deltas and (self.body.logprobs or self.body.return_token_ids):
            deltas = [{}]
        return [piece(index, delta) | (first if number == 0 else {}) for number, delta in enumerate(deltas)]

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Any]) -> Json | None:
        return chat_logprobs(self._tokenizer, token_ids, logprobs, top) if self.body.logprobs else None

    def _deltas(self, index: int, deltas: Sequence[Delta]) -> list[Json]:
        found: list[Json] = []
        for delta in deltas:
            if delta.tool_call is not None:
                found.append({"tool_calls": [{"index": self._num_calls[index], **call_json(delta.tool_call)}]})
                self._num_calls[index] += 1
            elif delta.reasoning:
                found.append({"reasoning_content": delta.reasoning})
            else:
                found.append({"content": delta.content})
        return found


class TextAnswer:
    """Answers one completion request."""

    def __init__(self, service: Service, body: CompletionBody) -> None:
        self.body = body
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = service.model_name
        self._tokenizer = service.tokenizer
        prompts = [self._encode(prompt) for prompt in body.prompts]
        if not prompts or not all(prompts):
            raise ApiError(400, "the prompt is empty; give at least one token", param="prompt")
        self.requests = requests_for(self._id, prompts, body.choices())
        end_ids = {*service.tokenizer.eos_token_ids, *(body.stop_token_ids or ())}
        self._texts = [ChoiceText(service.tokenizer, end_ids, body.stops, skip_special=True) for _ in self.requests]
        self._lengths = [0] * len(self.requests)

    def head(self) -> Json:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}

    def prompt_fields(self) -> Json:
        return {}

    def choice(self, index: int, finished: Finished) -> Json:
        generated = finished.generated
        text = self._texts[index]
        fields = token_fields(self.body, generated.token_ids, versions_of(generated))
        return self._choice(
            index,
            text.feed(generated.token_ids) + text.finish(),
            self._logprobs(index, generated.token_ids, generated.logprobs, finished.top_logprobs),
            generated.finish_reason.value,
        ) | (fields | {"prompt_token_ids": self.requests[index].prompt_token_ids} if fields else {})

    def opening_chunks(self) -> list[Json]:
        if not self.body.return_token_ids:
            return []
        return [
            {
                "choices": [
                    self._choice(index, "", None, None)
                    | {"prompt_token_ids": request.prompt_token_ids, "token_ids": [], "policy_versions": []}
                ]
            }
            for index, request in enumerate(self.requests)
        ]

    def pieces(self, arrival: Arrival) -> list[Json]:
        index, event = arrival.index, arrival.event
        if isinstance(event, Finished):
            return [self._choice(index, self._texts[index].finish(), None, event.generated.finish_reason.value)]
        text = self._texts[index].feed([event.token_id])
        if not text and self.body.logprobs is None and not self.body.return_token_ids:
            return []
        top = [event.top_logprobs] if event.top_logprobs else []
        logprobs = self._logprobs(index, [event.token_id], [event.logprob], top)
        return [self._choice(index, text, logprobs, None) | token_fields_of(self.body, event)]

    def _encode(self, prompt: str | list[int]) -> list[int]:
        return self._tokenizer.encode(prompt, allow_special=True) if isinstance(prompt, str) else prompt

    def _choice(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(
        self, index: int, token_ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Any]
    ) -> Json | None:
        if self.body.logprobs is None:
            return None
        found = completion_logprobs(self._tokenizer, token_ids, logprobs, top, self._lengths[index])
        self._lengths[index] += len(self._tokenizer.decode(token_ids))
        return found


def piece(index: int, delta: Json, *, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def call_json(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(rest):  # type: ignore[type-var]
        yield first
        async for chunk in rest:
            yield chunk


async def _unless_gone(request: Request, work: Any) -> Json:
    """The result of `work`, which is cancelled when the client disconnects."""
    working: asyncio.Task[Json] = asyncio.ensure_future(work)
    watching = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client closed the connection", kind="client_disconnected")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
