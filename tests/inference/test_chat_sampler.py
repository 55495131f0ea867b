"""Turns from an OpenAI-compatible endpoint over real HTTP: retries, deadlines, and what is not tried again."""

import asyncio
import contextlib

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from hone.inference.client import MAX_BACKOFF_SECONDS, MAX_TRIES, ChatSampler, EngineLost, EngineRefused, backoff
from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, SamplingParameters
from hone.schema.traces import Node

BRANCH = [Node(Message("user", "hello"))]
ANSWER = {
    "choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


class Endpoint:
    """Answers by a script, the last line again and again; counts what it is asked."""

    def __init__(self, *script):
        self.script = script
        self.num_asked = 0
        self.bodies = []

    async def complete(self, request):
        self.bodies.append(await request.json())
        line = self.script[min(self.num_asked, len(self.script) - 1)]
        self.num_asked += 1
        if line == "break":
            request.transport.close()
            return web.Response()
        if line == "hang":
            await asyncio.sleep(60)
        if line == "ok":
            return web.json_response(ANSWER)
        status, headers = line if isinstance(line, tuple) else (line, {})
        return web.json_response({"error": {"message": f"trouble {status}"}}, status=status, headers=headers)


@contextlib.asynccontextmanager
async def sampling_from(endpoint, **arguments):
    app = web.Application()
    app.router.add_post("/v1/chat/completions", endpoint.complete)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    settings = {"backoff_seconds": 0.0001} | arguments
    try:
        async with ChatSampler(f"http://127.0.0.1:{port}/v1", "tiny", "key", **settings) as sampler:
            yield sampler
    finally:
        await runner.cleanup()


async def sample(endpoint, **arguments):
    async with sampling_from(endpoint, **arguments) as sampler:
        return await sampler.sample(BRANCH, (), SamplingParameters(max_tokens=4, seed=3))


@pytest.mark.parametrize("trouble", [429, 408, 500, 502, 503, 529, "break"])
async def test_passing_trouble_is_tried_again(trouble):
    endpoint = Endpoint(trouble, trouble, "ok")
    turn = await sample(endpoint)
    assert (turn.message.content, turn.num_prompt_tokens) == ("hi", 3)
    assert endpoint.num_asked == 3
    assert endpoint.bodies[0] == endpoint.bodies[2]


@pytest.mark.parametrize("trouble", [500, 502, "break"])
async def test_lasting_trouble_is_given_up_as_a_lost_engine(trouble):
    endpoint = Endpoint(trouble)
    with pytest.raises(EngineLost, match=f"given up after {MAX_TRIES} tries"):
        await sample(endpoint)
    assert endpoint.num_asked == MAX_TRIES


async def test_an_endpoint_that_is_busy_is_asked_until_the_deadline():
    endpoint = Endpoint(*[429] * (MAX_TRIES + 2), "ok")
    assert (await sample(endpoint)).message.content == "hi"
    busy = Endpoint(429)
    with pytest.raises(EngineLost, match="answered 429: trouble 429"):
        await sample(busy, deadline_seconds=0.3)
    assert busy.num_asked > MAX_TRIES


async def test_a_pause_that_the_endpoint_asks_for_beyond_the_deadline_is_not_begun():
    endpoint = Endpoint((429, {"Retry-After": "3600"}))
    with pytest.raises(EngineLost, match="given up after 1 try"):
        await sample(endpoint, deadline_seconds=30)
    assert endpoint.num_asked == 1


async def test_a_pause_that_is_named_as_a_date_is_left_to_the_backoff():
    endpoint = Endpoint((429, {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}), "ok")
    assert (await sample(endpoint)).message.content == "hi"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refusal_is_not_tried_again(status):
    endpoint = Endpoint(status)
    with pytest.raises(EngineRefused, match=f"answered {status}: trouble {status}"):
        await sample(endpoint)
    assert endpoint.num_asked == 1


async def test_an_endpoint_that_hangs_is_left_at_the_deadline():
    with pytest.raises(EngineLost, match=r"no answer from .* within"):
        await sample(Endpoint("hang"), deadline_seconds=0.05)


async def test_an_address_where_nobody_listens_is_a_lost_engine():
    async with ChatSampler("http://127.0.0.1:9/v1", "tiny", backoff_seconds=0.0001) as sampler:
        with pytest.raises(EngineLost, match=f"given up after {MAX_TRIES} tries"):
            await sampler.sample(BRANCH, (), SamplingParameters())


async def test_a_full_context_is_a_truncation():
    class Full(Endpoint):
        async def complete(self, request):
            return web.json_response({"error": {"code": "context_length_exceeded"}}, status=400)

    assert (await sample(Full())).finish_reason is FinishReason.LENGTH


async def test_many_requests_at_once_share_the_connections_of_those_before():
    endpoint = Endpoint("ok")
    peers = set()
    answer = endpoint.complete

    async def complete(request):
        peers.add(request.transport.get_extra_info("peername"))
        return await answer(request)

    endpoint.complete = complete
    async with sampling_from(endpoint) as sampler:
        for _ in range(4):
            await asyncio.gather(*(sampler.sample(BRANCH, (), SamplingParameters()) for _ in range(20)))
    assert endpoint.num_asked == 80
    assert len(peers) <= 20


@given(st.integers(1, 200), st.integers(0, 2**62), st.floats(0.001, 2))
def test_the_pause_grows_within_its_bounds_and_is_the_same_for_the_same_request(number, seed, seconds):
    pause = backoff(number, seconds, seed)
    longest = min(MAX_BACKOFF_SECONDS, seconds * 2 ** min(number - 1, 16))
    assert longest / 2 <= pause <= longest
    assert pause == backoff(number, seconds, seed)
