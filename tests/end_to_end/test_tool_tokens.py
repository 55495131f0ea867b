"""SFT on a gold conversation with tools and RL on a rollout that says the same train the same tokens."""

import json

import pytest

from hone.envs import (
    Message,
    Rubric,
    Task,
    ToolUse,
    assistant,
    reward,
    run_rollout,
    tool,
    tool_call,
    tool_result,
    user,
)
from hone.inference.client import TokenSampler
from hone.orchestrator.samples import training_samples
from hone.schema.sampling import FinishReason, Generated, SamplingParameters, VersionRun
from hone.text.rendering import Renderer
from hone.text.template import FAMILIES
from hone.text.training import train_tokenizer


@tool
def add(left: int, right: str | None = None) -> int:
    """The sum of two numbers.

    left: a number. right: another one in words, or nothing.
    """
    return left + {"1": 1, None: 0}[right]


@reward
def exact(answer, reference):
    return answer == reference


GOLD = [
    assistant("", tool_call("add", {"left": 20, "right": "1"}, id="call_1_0")),
    tool_result("21", id="call_1_0"),
    assistant("", tool_call("add", {"left": 3}, id="call_3_0")),
    tool_result("3", id="call_3_0"),
    assistant("24"),
]


class Parrot:
    """An engine that writes the gold turns, as training data spells them."""

    def __init__(self, turns: list[list[int]]) -> None:
        self.turns = turns
        self.prompts: list[list[int]] = []

    async def generate(self, prompt, sampling, *, deadline_seconds=None):
        token_ids = self.turns[len(self.prompts)]
        self.prompts.append(prompt)
        versions = [VersionRun(3, len(token_ids))]
        return Generated("", token_ids, [-0.1] * len(token_ids), versions, FinishReason.STOP)


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_rollout_with_tools_trains_the_tokens_of_its_gold_conversation(family):
    task = Task(prompt=(user("What is 20 + 1 + 3?"),), reference="24")
    environment = ToolUse(name="sums", rubric=Rubric([exact]), train=[task], tools=[add])
    texts = [message.content for message in [*task.prompt, *GOLD]]
    renderer = Renderer(train_tokenizer(texts, 400, chat_template=family))
    branches = renderer.render_branches([*task.prompt, *GOLD], environment.tools)
    parrot = Parrot([run for gold in branches for run in trained_runs(gold.token_ids, gold.loss_mask)])

    trace = await run_rollout(environment, task, 0, TokenSampler(parrot, renderer), SamplingParameters(), seed=0)

    assert trace.failure is None, trace.failure
    assert trace.reward == 1
    assert [plain(message) for message in trace.messages[1:]] == [plain(message) for message in GOLD]
    [sample] = training_samples(trace, trace.reward, 1.0, 1.0)
    assert trained_runs(sample.token_ids, sample.loss_mask) == parrot.turns
    if len(branches) == 1:  # the template does not rewrite earlier turns: what stands between the turns is equal, too
        end = len(sample.token_ids)
        assert sample.token_ids == branches[0].token_ids[:end]
        assert sample.loss_mask == branches[0].loss_mask[:end]
        assert not any(branches[0].loss_mask[end:])


def trained_runs(token_ids: list[int], loss_mask: list[int]) -> list[list[int]]:
    """The stretches that the assistant writes."""
    runs: list[list[int]] = []
    for index, (token_id, trains) in enumerate(zip(token_ids, loss_mask, strict=True)):
        if trains:
            if index == 0 or not loss_mask[index - 1]:
                runs.append([])
            runs[-1].append(token_id)
    return runs


def plain(message: Message) -> tuple:
    """What matters of a message: arguments as values, however they are spelled."""
    calls = [(call.id, call.name, json.loads(call.arguments)) for call in message.tool_calls]
    return message.role, message.content, calls, message.tool_call_id
