"""How others reach an inference server: the token channel, samplers for environments, the admin routes."""

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.sampling import (
    Answers,
    Cancel,
    FinishReason,
    Generate,
    Generated,
    GenerateMany,
    SamplingParameters,
    Turn,
)
from hone.schema.seeds import derive_seed
from hone.schema.traces import Node
from hone.schema.wire import Wire, WireError
from hone.text.parsing import parse
from hone.text.rendering import Renderer

if TYPE_CHECKING:
    import aiohttp

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 600.0
REPEAT_SECONDS = 10.0
RECONNECT_MILLISECONDS = 100
ADMIN_SECONDS = 300.0

BUSY = frozenset({429, 503, 529})
"""Statuses of an endpoint that will answer later: asked again until the deadline."""
MAX_TRIES = 6
"""How often a request is sent that fails otherwise (a broken connection, 408, any other 5xx) before it is given up."""
BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0


class EngineError(Exception):
    """The engine gave no completion."""


class EngineLost(EngineError):
    """No answer within the deadline, or the connection broke."""


class EngineRefused(EngineError):
    """The engine will not serve this request; `retry` tells whether the same request may succeed later."""

    def __init__(self, reason: str, *, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry


@dataclass(slots=True)
class _Waiting:
    request: Generate
    answer: asyncio.Future[Generated]


class TokenChannel:
    """A connection to a server's token channel, shared by everything in one event loop. Use as a context.

    All requests of one tick of the loop leave in one message. Requests that are unanswered when the connection comes
    back are sent again; their seeds make that safe.
    """

    def __init__(self, address: str, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.address = address
        self._deadline_seconds = deadline_seconds
        self._name = uuid.uuid4().hex[:12]
        self._count = 0
        self._waiting: dict[str, _Waiting] = {}
        self._requests: list[Generate] = []
        self._cancels: list[Cancel] = []
        self._flush_is_due = False
        self._is_connected = False
        self._requests_out = Wire(GenerateMany)
        self._answers_in = Wire(Answers)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self._name.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(self.address)
        self._tasks = [asyncio.create_task(job()) for job in (self._receive, self._watch, self._repeat)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all("the token channel was closed")
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    async def generate(
        self, prompt_token_ids: list[int], sampling: SamplingParameters, *, deadline_seconds: float | None = None
    ) -> Generated:
        """One completion. Raises `EngineLost` or `EngineRefused`; a full context is an empty completion of length 0.

        Cancelling the awaiting task cancels the request.
        """
        self._count += 1
        request = Generate(f"{self._name}-{self._count}", prompt_token_ids, sampling)
        waiting = _Waiting(request, self._loop.create_future())
        self._waiting[request.request_id] = waiting
        self._requests.append(request)
        self._flush_soon()
        seconds = deadline_seconds or self._deadline_seconds
        timer = self._loop.call_later(seconds, self._expire, request.request_id, seconds)
        try:
            return await waiting.answer
        finally:
            timer.cancel()
            if self._waiting.pop(request.request_id, None) is not None:
                self._cancels.append(Cancel(request.request_id))
                self._flush_soon()

    def _expire(self, request_id: str, seconds: float) -> None:
        waiting = self._waiting.get(request_id)
        if waiting is not None and not waiting.answer.done():
            state = "connected" if self._is_connected else "not connected"
            waiting.answer.set_exception(
                EngineLost(f"no answer from {self.address} within {seconds:g} s ({state}); is the engine overloaded?")
            )

    def _flush_soon(self) -> None:
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._is_connected and not self._socket.closed and (self._requests or self._cancels):
            self._send(self._requests)

    def _send(self, requests: list[Generate]) -> None:
        # The high-water mark is off, so this never waits.
        self._socket.send(self._requests_out.encode(GenerateMany(requests, self._cancels)), zmq.NOBLOCK)
        self._requests, self._cancels = [], []

    def _fail_all(self, reason: str) -> None:
        for waiting in self._waiting.values():
            if not waiting.answer.done():
                waiting.answer.set_exception(EngineLost(reason))

    async def _receive(self) -> None:
        while True:
            data = await self._socket.recv()
            try:
                answers: Answers = self._answers_in.decode(data)
            except WireError as error:  # which request it answers is unknown, so none can go on
                self._fail_all(f"{self.address} gave an unreadable answer: {error}")
                continue
            for generated in answers.generated:
                waiting = self._waiting.pop(generated.request_id, None)
                if waiting is not None and not waiting.answer.done():
                    waiting.answer.set_result(generated)
            for refused in answers.refused:
                waiting = self._waiting.pop(refused.request_id, None)
                if waiting is not None and not waiting.answer.done():
                    waiting.answer.set_exception(EngineRefused(refused.reason, retry=refused.retry))

    async def _watch(self) -> None:
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            self._is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self._is_connected:
                self._send([waiting.request for waiting in self._waiting.values()])
            else:
                logger.warning("the connection to %s broke; unanswered requests will be sent again", self.address)

    async def _repeat(self) -> None:
        """The server drops the requests of clients that are silent for long."""
        while True:
            await asyncio.sleep(REPEAT_SECONDS)
            if self._waiting and self._is_connected:
                self._send(self._requests)


class TokenSampler:
    """Samples turns of conversations through a token channel; the turns carry their tokens, logprobs and versions."""

    def __init__(
        self, channel: TokenChannel, renderer: Renderer, *, deadline_seconds: float | None = None, **variables: Any
    ) -> None:
        self._channel = channel
        self._renderer = renderer
        self._deadline_seconds = deadline_seconds
        self._variables = variables

    async def sample(self, branch: Sequence[Node], tools: Sequence[ToolSpec], sampling: SamplingParameters) -> Turn:
        """Continue the conversation by one turn; what was sampled before is never tokenised again."""
        started = time.perf_counter()
        seen, new_messages = seen_tokens(branch)
        if seen:
            context = self._renderer.extend(seen, new_messages, tools, **self._variables)
        else:
            context = self._renderer.prompt(new_messages, tools, **self._variables)
        prompt = seen + context
        generated = await self._channel.generate(prompt, sampling, deadline_seconds=self._deadline_seconds)
        return Turn(
            message=self._message(generated, tools, sampling, call_prefix=f"call_{len(branch)}_"),
            finish_reason=generated.finish_reason,
            context_token_ids=context,
            token_ids=generated.token_ids,
            logprobs=generated.logprobs,
            versions=generated.versions,
            num_prompt_tokens=len(prompt),
            num_completion_tokens=len(generated.token_ids),
            num_cached_tokens=generated.num_cached_tokens,
            seconds=time.perf_counter() - started,
        )

    def _message(
        self, generated: Generated, tools: Sequence[ToolSpec], sampling: SamplingParameters, call_prefix: str
    ) -> Message:
        if generated.finish_reason is FinishReason.STOP and sampling.stop:
            tokenizer = self._renderer.tokenizer
            ends = {*tokenizer.eos_token_ids, *sampling.stop_token_ids}
            kept = [token_id for token_id in generated.token_ids if token_id not in ends]
            text = before_stop(tokenizer.decode(kept), sampling.stop)
            in_reasoning = self._renderer.opens_reasoning(**self._variables)
            return parse(text, self._renderer.format, tools, in_reasoning=in_reasoning, call_prefix=call_prefix)
        return self._renderer.parse(generated.token_ids, tools, call_prefix=call_prefix, **self._variables)


def seen_tokens(branch: Sequence[Node]) -> tuple[list[int], list[Message]]:
    """What the model has seen and written on this branch, and the messages since then."""
    seen: list[int] = []
    new_messages: list[Message] = []
    for node in branch:
        if node.turn is not None and node.turn.token_ids:
            seen += node.turn.context_token_ids
            seen += node.turn.token_ids
            new_messages = []
        else:
            new_messages.append(node.message)
    return seen, new_messages


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


class ChatSampler:
    """Samples turns from any OpenAI-compatible endpoint; the turns carry text, but no tokens. Use as a context.

    base_url includes the version part: http://127.0.0.1:8000/v1. deadline_seconds: for a turn, all tries together; no
    shorter wait is hidden in it. backoff_seconds: before the second try, doubled before each further one; an endpoint
    that names a time (Retry-After) gets it.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        backoff_seconds: float = BACKOFF_SECONDS,
    ) -> None:
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._deadline_seconds = deadline_seconds
        self._backoff_seconds = backoff_seconds
        self._http = _Http(deadline_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def sample(self, branch: Sequence[Node], tools: Sequence[ToolSpec], sampling: SamplingParameters) -> Turn:
        """Continue the conversation by one turn."""
        started = time.perf_counter()
        body = {
            "model": self._model,
            "messages": [message_json(node.message) for node in branch],
            **sampling_json(sampling),
        }
        if tools:
            body["tools"] = [{"type": "function", "function": msgspec.to_builtins(tool)} for tool in tools]
        status, answer = await self._ask(body, sampling.seed or 0)
        if status == 400 and error_code(answer) == "context_length_exceeded":
            return Turn(message=Message(role="assistant"), finish_reason=FinishReason.LENGTH)
        if status != 200:
            raise EngineRefused(f"{self._url} answered {status}: {error_message(answer)}")
        return read_turn(answer, time.perf_counter() - started)

    async def _ask(self, body: dict[str, Any], seed: int) -> tuple[int, dict[str, Any]]:
        """The status and body of the first answer that another try would not change; `EngineLost` without one."""
        ends = time.monotonic() + self._deadline_seconds
        for number in itertools.count(1):
            asked_to_wait = 0.0
            try:
                left = max(0.001, ends - time.monotonic())  # zero would be no deadline at all
                answer = await self._http.request("POST", self._url, body, self._headers, left)
            except EngineLost as error:
                trouble, may_go_on = str(error), number < MAX_TRIES
            else:
                if answer.status < 500 and answer.status not in (408, 429):
                    return answer.status, answer.body
                trouble = f"{self._url} answered {answer.status}: {error_message(answer.body)}"
                may_go_on = number < MAX_TRIES or answer.status in BUSY
                asked_to_wait = answer.retry_after_seconds
            pause = max(asked_to_wait, backoff(number, self._backoff_seconds, seed))
            if not may_go_on or time.monotonic() + pause >= ends:
                raise EngineLost(f"{trouble} (given up after {number} {'try' if number == 1 else 'tries'})")
            await asyncio.sleep(pause)
        raise AssertionError("counting ends never")


def backoff(number: int, seconds: float, seed: int) -> float:
    """How long to wait after the `number`-th try: doubled each time, and spread so that requests do not return as one."""
    longest = min(MAX_BACKOFF_SECONDS, seconds * 2.0 ** min(number - 1, 16))
    return longest * (0.5 + derive_seed(seed, "backoff", number) / 2**64)


def message_json(message: Message) -> dict[str, Any]:
    """A message as the OpenAI API wants it."""
    answer: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        answer["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        answer["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        answer["name"] = message.name
    return answer


def sampling_json(sampling: SamplingParameters) -> dict[str, Any]:
    """The request's fields; those outside the OpenAI API only where they differ from off."""
    answer: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    optional = {
        "max_completion_tokens": sampling.max_tokens,
        "seed": None if sampling.seed is None else sampling.seed % 2**31,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()},
    }
    return answer | {name: value for name, value in optional.items() if value is not None and value not in (0, [], {})}


def read_turn(answer: dict[str, Any], seconds: float) -> Turn:
    """The turn in a chat completion; `EngineLost` when it is none."""
    try:
        choice = answer["choices"][0]
        said, usage = choice["message"], answer.get("usage") or {}
        calls = tuple(
            ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in said.get("tool_calls") or ()
        )
        message = Message(
            role="assistant",
            content=said.get("content") or "",
            reasoning=said.get("reasoning_content"),
            tool_calls=calls,
        )
        finish_reason = FinishReason.LENGTH if choice["finish_reason"] == "length" else FinishReason.STOP
    except (KeyError, IndexError, TypeError) as error:
        raise EngineLost(f"the endpoint's answer is no chat completion: {error!r} in {str(answer)[:200]}") from error
    return Turn(
        message=message,
        finish_reason=finish_reason,
        num_prompt_tokens=usage.get("prompt_tokens", 0),
        num_completion_tokens=usage.get("completion_tokens", 0),
        num_cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        seconds=seconds,
    )


def error_message(answer: dict[str, Any]) -> str:
    error = answer.get("error", answer)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def error_code(answer: dict[str, Any]) -> str | None:
    error = answer.get("error")
    return error.get("code") if isinstance(error, dict) else None


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What /health says."""

    ready: bool
    version: int
    running: int
    waiting: int
    kv_usage: float
    paused: bool


class AdminClient:
    """The admin routes of one server. Use as a context."""

    def __init__(self, base_url: str, token: str | None = None, *, deadline_seconds: float = ADMIN_SECONDS) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = _Http(deadline_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def load(self, version: int, folder: str) -> None:
        """Switch to the weights in `folder`; returns when every later token is sampled by them."""
        await self._post("/admin/load", {"version": version, "folder": folder})

    async def pause(self) -> None:
        """No step is made until `resume`."""
        await self._post("/admin/pause", {})

    async def resume(self) -> None:
        await self._post("/admin/resume", {})

    async def health(self) -> Health:
        """The server's state; `EngineLost` when there is no server (yet)."""
        status, answer = await self._http.get(self._base_url + "/health", self._headers)
        if status not in (200, 503):
            raise EngineLost(f"{self._base_url}/health answered {status}: {error_message(answer)}")
        return msgspec.convert(answer, Health)

    async def is_ready(self) -> bool:
        """Whether the server is there and its engine serves."""
        try:
            return (await self.health()).ready
        except EngineLost:
            return False

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        status, answer = await self._http.post(self._base_url + path, body, self._headers)
        if status != 200:
            reason = f"{self._base_url}{path} answered {status}: {error_message(answer)}"
            raise EngineRefused(reason) if status < 500 else EngineLost(reason)


@dataclass(slots=True)
class _Http:
    """One aiohttp session, opened in the event loop that first needs it."""

    deadline_seconds: float
    _session: "aiohttp.ClientSession | None" = field(default=None)

    async def post(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        answer = await self.request("POST", url, body, headers, self.deadline_seconds)
        return answer.status, answer.body

    async def get(self, url: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        answer = await self.request("GET", url, None, headers, self.deadline_seconds)
        return answer.status, answer.body

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def request(
        self, method: str, url: str, body: dict[str, Any] | None, headers: dict[str, str], seconds: float
    ) -> "_Answer":
        """One try that takes `seconds` at most; `EngineLost` without an answer."""
        import aiohttp  # of an extra that those who only use the token channel do not need

        if self._session is None:
            # No limit: whoever asks bounds how much runs at once, and a queue in here would eat the deadline. The pool
            # of free connections is a deque for each host, so that it costs the same whatever their number.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        data = None if body is None else msgspec.json.encode(body)
        if data is not None:
            headers = headers | {"Content-Type": "application/json"}
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self._session.request(method, url, data=data, headers=headers, timeout=timeout) as response:
                content = await response.read()
        except TimeoutError as error:
            raise EngineLost(f"no answer from {url} within {seconds:.3g} s") from error
        except aiohttp.ClientError as error:
            raise EngineLost(f"no answer from {url}: {error}") from error
        retry_after = _seconds(response.headers.get("Retry-After")) if response.status != 200 else 0.0
        with contextlib.suppress(msgspec.DecodeError):
            answer = msgspec.json.decode(content)
            if isinstance(answer, dict):
                return _Answer(response.status, answer, retry_after)
        return _Answer(response.status, {"error": content[:500].decode(errors="replace")}, retry_after)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: dict[str, Any]
    retry_after_seconds: float


def _seconds(retry_after: str | None) -> float:
    """The header Retry-After where it is a number; as a date it is left to the backoff."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0
