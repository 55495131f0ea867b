import asyncio
import socket

import pytest

from hone.config.recipe import EngineSection
from hone.inference.client import EngineLost, EngineRefused, TokenChannel, seen_tokens
from hone.inference.engine.engine import Engine
from hone.inference.server.loop import EngineLoop
from hone.inference.server.tokens import AddressInUseError, TokenServer
from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, SamplingParameters, Turn
from hone.schema.traces import Node

SETTINGS = EngineSection(num_blocks=64, block_size=8, max_running=16)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def serve(model, address: str) -> EngineLoop:
    return EngineLoop(Engine(model, [1], SETTINGS), tokens_address=address)


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_many_requests_are_answered_each_with_its_own_tokens(model):
    address = free_address()
    with serve(model, address):
        async with TokenChannel(address) as channel:
            sampling = [SamplingParameters(max_tokens=4 + i % 3, seed=i, ignore_eos=True) for i in range(40)]
            answers = await asyncio.gather(*(channel.generate([2, 3, 4], s) for s in sampling))
            again = await channel.generate([2, 3, 4], sampling[7])
    assert [len(answer.token_ids) for answer in answers] == [s.max_tokens for s in sampling]
    assert all(answer.finish_reason is FinishReason.LENGTH for answer in answers)
    assert [(run.version, run.count) for run in answers[0].versions] == [(0, 4)]
    assert again.token_ids == answers[7].token_ids


async def test_a_wrong_request_is_refused_with_its_reason(model):
    address = free_address()
    with serve(model, address):
        async with TokenChannel(address) as channel:
            with pytest.raises(EngineRefused, match="token 96, but the vocabulary has 96") as refused:
                await channel.generate([96], SamplingParameters())
    assert not refused.value.retry


async def test_a_prompt_that_fills_the_context_ends_at_once(model):
    address = free_address()
    with serve(model, address):
        async with TokenChannel(address) as channel:
            answer = await channel.generate([2] * 256, SamplingParameters())
    assert (answer.token_ids, answer.finish_reason) == ([], FinishReason.LENGTH)


async def test_a_cancelled_task_frees_what_its_request_held(model):
    address = free_address()
    with serve(model, address) as loop:
        async with TokenChannel(address) as channel:
            loop.pause()
            task = asyncio.create_task(channel.generate([2, 3], SamplingParameters(max_tokens=200)))
            await until(lambda: loop.engine.num_waiting == 1)
            task.cancel()
            await until(lambda: not loop.engine.has_work)
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_unanswered_requests_survive_a_restart_of_the_server(model):
    address = free_address()
    sampling = SamplingParameters(max_tokens=8, seed=3, ignore_eos=True)
    async with TokenChannel(address) as channel:
        with serve(model, address) as first:
            first.pause()
            task = asyncio.create_task(channel.generate([2, 3], sampling))
            await until(lambda: first.engine.num_waiting == 1)
        with serve(model, address):
            async with asyncio.timeout(20):
                answer = await task
    assert len(answer.token_ids) == 8


async def test_a_request_outlives_the_wait_for_the_server_to_start(model):
    address = free_address()
    async with TokenChannel(address) as channel:
        task = asyncio.create_task(channel.generate([2, 3], SamplingParameters(max_tokens=2, ignore_eos=True)))
        await asyncio.sleep(0.05)
        with serve(model, address):
            async with asyncio.timeout(20):
                assert len((await task).token_ids) == 2


async def test_a_deadline_passes_as_a_lost_engine():
    async with TokenChannel(free_address()) as channel:
        with pytest.raises(EngineLost, match=r"within 0.05 s \(not connected\)"):
            await channel.generate([2], SamplingParameters(), deadline_seconds=0.05)


async def test_new_weights_in_flight_are_seen_on_every_token(model):
    address = free_address()
    with serve(model, address) as loop:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        async with TokenChannel(address) as channel:
            task = asyncio.create_task(channel.generate([2, 3], SamplingParameters(max_tokens=250, ignore_eos=True)))
            await until(lambda: loop.engine.num_sampled > 5)
            await asyncio.wrap_future(loop.call(lambda engine: engine.load_weights(state, 7)))
            answer = await task
    assert [run.version for run in answer.versions] == [0, 7]
    assert sum(run.count for run in answer.versions) == len(answer.token_ids) == 250


def test_a_taken_address_is_named():
    address = free_address()
    server = TokenServer(address)
    try:
        with pytest.raises(AddressInUseError, match=address):
            TokenServer(address)
    finally:
        server.close()


def test_what_was_seen_ends_at_the_last_turn():
    user, answer = Message(role="user", content="?"), Message(role="assistant", content="!")
    turn = Turn(answer, FinishReason.STOP, context_token_ids=[1, 2], token_ids=[3])
    assert seen_tokens([Node(user), Node(answer, 0, turn), Node(user, 1)]) == ([1, 2, 3], [user])
