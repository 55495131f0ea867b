"""A real agent program, mini-swe-agent from PyPI, does a task in its folder through the proxy, in both dialects.

It has dependencies that we do not share, so it lives in a virtual environment of its own: `make test-agent`.
"""

import json
import os
import shutil

import pytest
from policies import check_tokens

from hone.envs import Limits, Rubric, StopReason, Task, reward, run_rollout, user
from hone.envs.harness import ProgramHarness
from hone.orchestrator.samples import training_samples
from hone.schema.sampling import SamplingParameters

PROGRAM = os.environ.get("HONE_TEST_MINI") or shutil.which("mini") or ""
TASK = Task(prompt=(user("Write the sum of 2 and 3 into answer.txt."),), reference="5")
VARIABLES = {
    "MSWEA_CONFIGURED": "true",
    "MSWEA_COST_TRACKING": "ignore_errors",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PROGRAM, reason="no mini-swe-agent: run `make test-agent`, or set HONE_TEST_MINI to its program `mini`"
    ),
]


@reward
def solved(state, reference):
    return (state.folder / "answer.txt").read_text().strip() == reference


def bash(command):
    call = {"name": "bash", "arguments": {"command": command}}
    return f"Let me.\n<tool_call>\n{json.dumps(call)}\n</tool_call>"


ANSWERS = [bash("expr 2 + 3 > answer.txt"), bash("cat answer.txt"), bash("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")]


@pytest.fixture(params=["openai", "anthropic"])
def environment(request):
    command = [PROGRAM, "-t", "{prompt}", "-m", request.param + "/{model}", "--yolo", "--exit-immediately"]
    return ProgramHarness(
        name="mini", rubric=Rubric([solved]), train=[TASK], command=[*command, "-o", "log.json"], variables=VARIABLES
    )


def scripted(policy):
    return policy(lambda prompt: ANSWERS[prompt.count("<|im_start|>assistant\n") - 1])


async def test_it_solves_its_task_in_one_conversation_that_trains(policy, environment):
    policy = scripted(policy)
    trace = await run_rollout(environment, TASK, 0, policy, SamplingParameters(), 7)
    assert (trace.failure, trace.stop_reason) == (None, StopReason.COMPLETED), trace.info
    assert trace.reward == 1
    assert [message.role for message in trace.messages[1:]] == [
        "system",
        "user",
        *["assistant", "tool"] * 2,
        "assistant",
    ]
    assert '"output": "5\\n"' in trace.messages[-2].content
    check_tokens(trace, policy)
    [sample] = training_samples(trace, 1.0, 1.0, 1.0)
    assert sum(sample.loss_mask) == trace.num_completion_tokens


async def test_it_is_ended_when_its_turns_are_used_up(policy, environment):
    policy = scripted(policy)
    trace = await run_rollout(environment, TASK, 0, policy, SamplingParameters(), 7, Limits(max_turns=2))
    assert (trace.failure, trace.stop_reason, trace.reward) == (None, StopReason.MAX_TURNS, 1)
    assert len(policy.engine.prompts) == 2
    check_tokens(trace, policy)
