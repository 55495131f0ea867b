"""A policy behind the real token sampler, and what its trace must hold afterwards."""

import random
from collections.abc import Callable

from hone.inference.client import TokenSampler
from hone.orchestrator.samples import check_trainable, training_samples
from hone.schema.sampling import FinishReason, Generated, VersionRun
from hone.schema.wire import decode, encode
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer

Script = Callable[[str], str | Exception]


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


def check_tokens(trace, policy):
    """The trace's tokens are the engine's, in the prompts as in the answers, and each is trained once."""
    engine = policy.engine
    assert trace.failure is None
    by_logprobs = {tuple(answer.logprobs): answer for answer in engine.answers}
    for turn in trace.turns:
        answer = by_logprobs[tuple(turn.logprobs)]
        assert (turn.token_ids, turn.versions) == (answer.token_ids, answer.versions)
        prompt = engine.prompts[int(answer.request_id) - 1]
        [branch] = {tuple(ids_on(branch, turn)) for branch in trace.branches() if any(n.turn is turn for n in branch)}
        assert list(branch) == prompt + answer.token_ids
    trace = decode(encode(trace), type(trace))
    check_trainable(trace)
    trained = [pair for sample in training_samples(trace, 1.0, 1.0, 0.7) for pair in trained_tokens(sample)]
    sampled = [pair for turn in trace.turns for pair in zip(turn.token_ids, turn.logprobs, strict=True)]
    assert sorted(trained) == sorted(sampled)


def ids_on(branch, last):
    ids = []
    for node in branch:
        if node.turn is not None:
            ids += node.turn.context_token_ids + node.turn.token_ids
        if node.turn is last:
            return ids
    raise AssertionError("the turn is not on the branch")


def trained_tokens(sample):
    return [
        (token, logprob)
        for token, mask, logprob in zip(sample.token_ids, sample.loss_mask, sample.logprobs, strict=True)
        if mask
    ]
