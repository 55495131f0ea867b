"""The recording proxy: one HTTP server for all harness rollouts of an event loop, up while there are any.

It speaks OpenAI's chat completions and responses, and Anthropic's messages. Which rollout a call belongs to is told by
its API key.
"""

import asyncio
import contextlib
import contextvars
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from weakref import WeakKeyDictionary

import msgspec
from aiohttp import web

from hone.envs.harness.anthropic_messages import AnthropicMessages
from hone.envs.harness.dialect import Answer, Call, Dialect, Json, Refusal, Trouble
from hone.envs.harness.openai_chat import OpenAIChat
from hone.envs.harness.openai_responses import OpenAIResponses
from hone.envs.harness.recorder import Recorder
from hone.envs.rollout import Rollout
from hone.schema.sampling import Turn

HOST = "127.0.0.1"
MAX_BODY_BYTES = 256 * 2**20
KEEP_ALIVE_SECONDS = 10.0
"""A streamed answer that takes longer begins with events that say nothing, so that no client gives it up."""
SHUTDOWN_SECONDS = 1.0
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's and Anthropic's clients retry a status of 500 otherwise
EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RecordingProxy:
    """The server; `record` lets one rollout use it."""

    def __init__(self) -> None:
        self._recorders: dict[str, Recorder] = {}
        self._changing = asyncio.Lock()
        self._runner: web.AppRunner | None = None
        self.address = ""

    @contextlib.asynccontextmanager
    async def record(self, rollout: Rollout) -> AsyncIterator[Recorder]:
        """Answer the calls that carry the recorder's API key by turns of `rollout`, until the context is left."""
        recorder = Recorder(rollout)
        self._recorders[recorder.identity] = recorder
        try:
            async with self._changing:
                if self._runner is None:  # in a context of its own: it serves other rollouts than this
                    await asyncio.create_task(self._start(), context=contextvars.Context())
            yield recorder
        finally:
            del self._recorders[recorder.identity]
            await recorder.close()
            async with self._changing:
                if not self._recorders:
                    await self._stop()

    async def _start(self) -> None:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        openai, responses, anthropic = OpenAIChat(), OpenAIResponses(), AnthropicMessages()
        for prefix in ("/v1", ""):  # base URLs are given with and without it
            app.router.add_post(prefix + "/chat/completions", self._answers(openai))
            app.router.add_post(prefix + "/responses", self._answers(responses))
            app.router.add_post(prefix + "/messages", self._answers(anthropic))
            app.router.add_post(prefix + "/messages/count_tokens", self._counts(anthropic))
            app.router.add_get(prefix + "/models", self._models)
            app.router.add_get(prefix + "/models/{name:.+}", self._model)
        app.router.add_route("*", "/{path:.*}", self._unknown)
        # With cancellation, a client that goes away gives up the turn that it asked for.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
        try:
            await runner.setup()
            site = web.TCPSite(runner, HOST, 0)
            await site.start()
        except BaseException:  # a cancellation too: undo, then pass it on
            await runner.cleanup()
            raise
        self._runner = runner
        host, port = runner.addresses[0][:2]
        self.address = f"http://{host}:{port}"

    async def _stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def _answers(self, dialect: Dialect) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                recorder, call = await self._opened(request, dialect)
                return await _respond(request, dialect, recorder, call)
            except Refusal as refusal:
                return _refused(dialect, refusal)

        return handle

    def _counts(self, dialect: Dialect) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                recorder, call = await self._opened(request, dialect)
            except Refusal as refusal:
                return _refused(dialect, refusal)
            return _json({"input_tokens": recorder.estimated_tokens(call)})

        return handle

    async def _opened(self, request: web.Request, dialect: Dialect) -> tuple[Recorder, Call]:
        recorder = self._recorder(request)
        return recorder, dialect.read(await request.read())

    async def _models(self, request: web.Request) -> web.StreamResponse:
        """No name is better than another; clients that list them shall find one."""
        try:
            self._recorder(request)
        except Refusal as refusal:
            return _refused(_dialect_of(request), refusal)
        card = _model_card("policy")
        return _json({"object": "list", "data": [card], "has_more": False, "first_id": "policy", "last_id": "policy"})

    async def _model(self, request: web.Request) -> web.StreamResponse:
        try:
            self._recorder(request)
        except Refusal as refusal:
            return _refused(_dialect_of(request), refusal)
        return _json(_model_card(request.match_info["name"]))

    async def _unknown(self, request: web.Request) -> web.StreamResponse:
        refusal = Refusal(Trouble.NOT_FOUND, f"there is no {request.method} {request.path} here")
        return _refused(_dialect_of(request), refusal)

    def _recorder(self, request: web.Request) -> Recorder:
        """The rollout that the API key names, if the secret in it is right."""
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        key = request.headers.get("x-api-key") or bearer
        _, _, name = key.partition("-")
        identity, _, secret = name.partition("-")
        recorder = self._recorders.get(identity)
        if recorder is None or not recorder.opens(secret):
            raise Refusal(Trouble.UNKNOWN_KEY, "the API key belongs to no rollout under way")
        return recorder


def proxy_of_this_loop() -> RecordingProxy:
    """The proxy that the rollouts of the running event loop share."""
    return _proxies.setdefault(asyncio.get_running_loop(), RecordingProxy())


_proxies: WeakKeyDictionary[asyncio.AbstractEventLoop, RecordingProxy] = WeakKeyDictionary()


async def _respond(request: web.Request, dialect: Dialect, recorder: Recorder, call: Call) -> web.StreamResponse:
    if call.stream:
        return await _stream(request, dialect, recorder, call)
    return _json(dialect.write(_answer(call, await recorder.turn(call))))


async def _stream(request: web.Request, dialect: Dialect, recorder: Recorder, call: Call) -> web.StreamResponse:
    """The answer as events. A call that is refused at once gets its status code."""
    turn = asyncio.create_task(recorder.turn(call))
    try:
        await asyncio.wait({turn}, timeout=KEEP_ALIVE_SECONDS)
        if turn.done():
            turn.result()
        response = web.StreamResponse(headers=EVENT_STREAM)
        await response.prepare(request)
        while not turn.done():
            await response.write(dialect.keep_alive)
            await asyncio.wait({turn}, timeout=KEEP_ALIVE_SECONDS)
        try:
            events = dialect.events(_answer(call, turn.result()))
        except Refusal as refusal:
            events = iter([dialect.error_event(refusal)])
        await response.write(b"".join(events))
        await response.write_eof()
        return response
    finally:
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)


def _answer(call: Call, turn: Turn) -> Answer:
    return Answer(call, turn, secrets.token_hex(12), int(time.time()))


def _refused(dialect: Dialect, refusal: Refusal) -> web.Response:
    return _json(dialect.error(refusal), refusal.trouble.value, NO_RETRY)


def _json(content: Json, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(content), status=status, headers=headers, content_type="application/json"
    )


def _dialect_of(request: web.Request) -> Dialect:
    is_anthropic = "anthropic-version" in request.headers
    return AnthropicMessages() if is_anthropic else OpenAIChat()


def _model_card(name: str) -> Json:
    """In both dialects at once."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "hone",
        "type": "model",
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
    }
