"""An evaluation against an OpenAI-compatible endpoint, over real HTTP."""

import contextlib

from aiohttp import web

from hone.envs import load_environment
from hone.evals.evaluate import evaluate
from hone.inference.client import ChatSampler
from hone.schema.sampling import SamplingParameters


@contextlib.asynccontextmanager
async def endpoint(answer):
    async def complete(request):
        return answer(await request.json())

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    async with ChatSampler(f"http://127.0.0.1:{port}/v1", "tiny", backoff_seconds=0.001) as sampler:
        yield sampler
    await runner.cleanup()


def said(content, finish_reason="stop"):
    return web.json_response(
        {
            "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 4},
        }
    )


async def run(sampler):
    environment = load_environment("reverse_text", prompt="{text}")
    return await evaluate(environment, sampler, num_tasks=6, attempts=2, sampling=SamplingParameters(max_tokens=16))


async def test_an_endpoint_that_answers_is_scored():
    async with endpoint(lambda body: said(body["messages"][-1]["content"][::-1])) as sampler:
        result = await run(sampler)
    assert result.score("exact").mean == result.pass_at[2].mean == 1
    assert result.completion_tokens.mean == 4


async def test_an_endpoint_that_breaks_is_a_failure_and_no_score():
    async with endpoint(lambda body: web.json_response({"error": {"message": "on fire"}}, status=500)) as sampler:
        result = await run(sampler)
    assert result.failures == {"model": 12}
    assert result.reward is None


async def test_answers_that_the_endpoint_cuts_are_truncated():
    async with endpoint(lambda body: said("ab", "length")) as sampler:
        result = await run(sampler)
    assert result.truncated.mean == 1
