"""A policy behind the real token sampler: what it answers is scripted, tokens and logprobs are drawn by it alone."""

import random
from collections.abc import Callable

import pytest

from hone.envs import Task, user
from hone.inference.client import TokenSampler
from hone.schema.sampling import FinishReason, Generated, VersionRun
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone.text.training import train_tokenizer

Script = Callable[[str], str]
CORPUS = ["You are a helpful agent. Add the numbers, call the tool, and say what the result is. yes no done 0123456789"]


class ScriptedEngine:
    """In place of a token channel. script: the prompt as text to the answer as text, or to an exception to raise.

    Answers are spelled in other tokens than the tokenizer would choose, so that tokenising them again would show.
    `prompts` and `answers` remember what was asked and answered, `samplings` how.
    """

    def __init__(self, tokenizer: Tokenizer, script: Script) -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.prompts: list[list[int]] = []
        self.answers: list[Generated] = []
        self.samplings = []
        self.before = None

    async def generate(self, prompt_token_ids, sampling, *, deadline_seconds=None):
        self.prompts.append(prompt_token_ids)
        self.samplings.append(sampling)
        number = len(self.prompts)
        if self.before is not None:
            await self.before()
        said = self.script(self.tokenizer.decode(prompt_token_ids))
        if isinstance(said, Exception):
            raise said
        token_ids = [i for c in said for i in self.tokenizer.encode(c)] + [self.tokenizer.eos_token_ids[0]]
        token_ids = token_ids[: sampling.max_tokens]
        dice = random.Random(number)
        answer = Generated(
            request_id=str(number),
            token_ids=token_ids,
            logprobs=[-dice.random() for _ in token_ids],
            versions=[VersionRun(number, len(token_ids))],
            finish_reason=FinishReason.LENGTH if len(token_ids) == sampling.max_tokens else FinishReason.STOP,
        )
        self.answers.append(answer)
        return answer


class Policy:
    """A sampler and the engine behind it."""

    def __init__(self, tokenizer: Tokenizer, script: Script) -> None:
        self.engine = ScriptedEngine(tokenizer, script)
        self.sampler = TokenSampler(self.engine, Renderer(tokenizer))

    async def sample(self, branch, tools, sampling):
        return await self.sampler.sample(branch, tools, sampling)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS * 3, 420, chat_template="qwen3")


@pytest.fixture
def policy(tokenizer):
    return lambda script: Policy(tokenizer, script)


@pytest.fixture
def task():
    return Task(prompt=(user("Add 2 and 3."),), reference="5")
