"""From a program's calls to the trainer's model: the samples carry the logprobs that the model gives to their tokens."""

import asyncio
import socket

import anthropic
import openai
import torch

from hone.config.recipe import EngineSection
from hone.envs import Endpoint, Rollout, Rubric, SdkHarness, Task, reward, run_rollout, user
from hone.inference.client import TokenChannel, TokenSampler
from hone.inference.engine.engine import Engine
from hone.inference.server.loop import EngineLoop
from hone.model.families import ModelConfig
from hone.model.layers.attention import PackedAttention
from hone.model.transformer import Transformer
from hone.orchestrator.samples import training_samples
from hone.schema.sampling import SamplingParameters
from hone.text.rendering import Renderer

TASK = Task(prompt=(user("Add 2 and 3."),))


@reward
def always():
    return 1.0


async def talk(rollout: Rollout, endpoint: Endpoint) -> None:
    """Two conversations at once, one of which is rewritten in the end."""

    async def one(number: int) -> None:
        messages = [{"role": "user", "content": f"Add {number} and 3."}]
        async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
            for _ in range(3):
                answer = await client.chat.completions.create(model="m", messages=messages)
                messages.append(answer.choices[0].message.model_dump(include={"role", "content", "tool_calls"}))
                messages.append({"role": "user", "content": "Go on."})

    async def other() -> None:
        messages = [{"role": "user", "content": "Say yes."}]
        async with anthropic.AsyncAnthropic(base_url=endpoint.address, api_key=endpoint.api_key) as client:
            for _ in range(3):
                answer = await client.messages.create(model="m", max_tokens=1, messages=messages)
                messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": "no"}]
            await client.messages.create(model="m", max_tokens=1, messages=[*messages[:2], messages[-1]])
            await client.messages.create(
                model="m", max_tokens=1, messages=[messages[0], *messages[3:4], {"role": "user", "content": "done"}]
            )

    await asyncio.gather(one(2), other())


def model_for(tokenizer):
    return Transformer(
        ModelConfig.from_hugging_face(
            {
                "model_type": "qwen3",
                "vocab_size": tokenizer.vocab_size,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 64,
                "max_position_embeddings": 2048,
                "initializer_range": 0.3,
                "eos_token_id": tokenizer.eos_token_ids[0],
            }
        )
    ).initialize(0)


def logprobs_of(model, token_ids, temperature):
    tokens = torch.tensor(token_ids)
    attention = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
    with torch.no_grad():
        logits = model.unembed(model(tokens, torch.arange(len(tokens)), attention))
    scores = torch.log_softmax(logits[:-1] / temperature, dim=-1)
    return scores.gather(1, tokens[1:, None])[:, 0].tolist()


async def test_the_trainers_model_gives_the_recorded_tokens_their_recorded_logprobs(tokenizer):
    model = model_for(tokenizer).requires_grad_(False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    # Any of half the tokens ends a turn, so that a model that has learned nothing ends its turns soon.
    ends = tuple(range(0, tokenizer.vocab_size, 2))
    sampling = SamplingParameters(temperature=0.8, max_tokens=200, stop_token_ids=ends)
    environment = SdkHarness(name="talk", rubric=Rubric([always]), train=[TASK], agent=talk)
    settings = EngineSection(num_blocks=512, block_size=8, max_running=16, threads=1)
    with EngineLoop(Engine(model, list(tokenizer.eos_token_ids), settings), tokens_address=address):
        async with TokenChannel(address) as channel:
            sampler = TokenSampler(channel, Renderer(tokenizer))
            trace = await run_rollout(environment, TASK, 0, sampler, sampling, 7)
    assert (trace.failure, len(trace.turns)) == (None, 8)
    samples = training_samples(trace, 1.0, 1.0, 0.8)
    assert sum(sum(sample.loss_mask) for sample in samples) == trace.num_completion_tokens > 8
    assert len(samples) == trace.metrics["num_branches"] >= 3
    for sample in samples:
        expected = logprobs_of(model, sample.token_ids, 0.8)
        for mask, recorded, given in zip(sample.loss_mask[1:], sample.logprobs[1:], expected, strict=True):
            assert not mask or abs(recorded - given) < 1e-4
