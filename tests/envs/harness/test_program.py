"""Agent programs as processes: what they are given, what is kept of them, and that they end."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from hone.envs import (
    FailureClass,
    Limits,
    RolloutFailure,
    Rubric,
    StopReason,
    Task,
    assistant,
    reward,
    run_group,
    run_rollout,
    user,
)
from hone.envs.harness import ProgramHarness, process
from hone.envs.local_processes import LocalProcesses
from hone.schema.sampling import SamplingParameters
from hone.schema.sandboxes import SandboxSpec

SAMPLING = SamplingParameters(max_tokens=100)
TASK = Task(prompt=(user("Add 2 and 3: {api_key}"),), reference="5")
ASK = """
import json, os, sys, time, urllib.request, urllib.error, subprocess
def ask(text):
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]
"""


@reward
def written(state, reference):
    return (state.folder / "answer.txt").read_text() == reference


@reward
def always():
    return 1.0


def program(code, *arguments, measure=always, **settings):
    command = [sys.executable, "-c", ASK + code, *arguments]
    return ProgramHarness(
        name="program", rubric=Rubric([measure]), train=[TASK], command=command, grace_seconds=0.3, **settings
    )


async def run(environment, policy, limits=Limits()):
    return await run_rollout(environment, TASK, 0, policy, SAMPLING, 7, limits)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_program_is_started_with_its_prompt_and_scored_by_what_it_left(policy):
    environment = program("open('answer.txt', 'w').write(ask(sys.argv[1]))", "{prompt}", measure=written)
    trace = await run(environment, policy := policy(lambda prompt: "5"))
    assert (trace.failure, trace.reward, trace.stop_reason) == (None, 1, StopReason.COMPLETED)
    assert trace.info["program"] == {"exit_code": 0, "stdout": "", "stderr": ""}
    assert "Add 2 and 3: {api_key}" in policy.engine.tokenizer.decode(policy.engine.prompts[0])


class Prepared(ProgramHarness):
    async def prepare(self, rollout, run):
        await run.write("folder/given.txt", b"given")


@pytest.mark.parametrize("sandboxes", [None, LocalProcesses()])
async def test_the_folder_is_prepared_read_and_removed(policy, sandboxes):
    runs = []

    @reward
    async def answered(state):
        runs.append(state)
        return float(await state.read("answer.txt"))

    code = ASK + "open('answer.txt', 'w').write(ask(open('folder/given.txt').read() + sys.argv[1]))"
    command = ["python3", "-c", code, "{prompt}"]
    environment = Prepared(
        name="prepared", rubric=Rubric([answered]), train=[TASK], command=command, sandboxes=sandboxes
    )
    traces = await run_group(environment, TASK, [0, 1], policy(lambda prompt: "5"), SAMPLING, 7)
    assert [(trace.failure, trace.reward) for trace in traces] == [(None, 5), (None, 5)]
    assert traces[0].messages[1].content == "givenAdd 2 and 3: {api_key}"
    assert len(set(runs)) == 2
    for run in runs:
        with pytest.raises((FileNotFoundError, RolloutFailure)):
            await run.read("answer.txt")


@pytest.mark.parametrize("sandboxes", [None, LocalProcesses()])
async def test_a_prompt_may_be_read_from_a_file(policy, sandboxes):
    long = Task(prompt=(user("Add 2 and 3." + " " * 200_000),), reference="5")
    environment = program("assert ask(open(sys.argv[1]).read()) == '5'", "{prompt_file}", sandboxes=sandboxes)
    trace = await run_rollout(environment, long, 0, policy(lambda prompt: "5"), SAMPLING, 7)
    assert (trace.failure, trace.reward) == (None, 1)
    assert [node.message for node in trace.nodes] == [*long.prompt, assistant("5")]  # nothing was cut


async def test_a_program_in_a_sandbox_crashes_and_is_ended_like_any_other(policy):
    code = "ask('x'); print('said'); ask('y'); sys.exit('it went wrong')"
    environment = program(code, sandboxes=LocalProcesses())
    trace = await run(environment, policy(lambda prompt: "5"))
    assert trace.failure.kind is FailureClass.HARNESS
    assert "exit code 1: it went wrong" in trace.failure.message
    assert trace.info["program"] == {"exit_code": 1, "stdout": "said\n", "stderr": "it went wrong\n"}
    environment = program(
        "for number in range(9):\n  try: ask(str(number))\n  except OSError: time.sleep(60)", sandboxes=LocalProcesses()
    )
    trace = await run(environment, policy(lambda prompt: "5"), Limits(max_turns=2))
    assert (trace.stop_reason, len(trace.turns), trace.reward) == (StopReason.MAX_TURNS, 2, 1)


async def test_a_sandbox_that_cannot_be_made_is_a_failure_of_the_sandbox(policy):
    environment = program("ask('x')", sandboxes=LocalProcesses(), spec=SandboxSpec(image="none", network="host"))
    trace = await run(environment, policy(lambda prompt: "5"))
    assert trace.failure.kind is FailureClass.SANDBOX


def test_a_sandbox_without_network_is_refused():
    with pytest.raises(ValueError, match="cannot reach the proxy"):
        program("", sandboxes=LocalProcesses(), spec=SandboxSpec())


async def test_a_program_gets_what_clients_read_and_no_secrets_of_ours(policy, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "ours")
    monkeypatch.setenv("OPENAI_API_KEY", "ours too")
    environment = program(
        "print(json.dumps(dict(os.environ))); print(sys.argv[1:], os.listdir()); ask('x')",
        "{base_url} {anthropic_base_url}",
        "{model}",
        "{api_key}",
        "{other}",
        variables={"MY_URL": "{anthropic_base_url}/x", "HOME": "/nowhere"},
        model="openai/policy",
    )
    trace = await run(environment, policy(lambda prompt: "5"))
    said = trace.info["program"]["stdout"]
    assert "ours" not in said
    variables, rest = said.splitlines()
    variables = json.loads(variables)
    url, key = variables["ANTHROPIC_BASE_URL"], variables["OPENAI_API_KEY"]
    assert variables["OPENAI_BASE_URL"] == url + "/v1"
    assert variables["ANTHROPIC_API_KEY"] == key
    assert (variables["MY_URL"], variables["HOME"]) == (url + "/x", "/nowhere")
    assert variables["PATH"] == os.environ["PATH"]
    assert rest == f"{[f'{url}/v1 {url}', 'openai/policy', key, '{other}']} []"


async def test_a_program_that_crashes_fails_or_is_scored_by_choice(policy):
    code = "ask('x'); sys.exit('it went wrong')"
    trace = await run(program(code), policy(lambda prompt: "5"))
    assert trace.failure.kind is FailureClass.HARNESS
    assert "exit code 1: it went wrong" in trace.failure.message
    assert trace.info["program"]["exit_code"] == 1
    trace = await run(program(code, on_crash="score"), policy(lambda prompt: "5"))
    assert (trace.failure, trace.reward) == (None, 1)
    assert "it went wrong" in trace.info["crash"]


@pytest.mark.parametrize("on_crash", ["fail", "score"])
async def test_a_program_that_cannot_be_started_or_never_calls_is_a_failure_of_the_harness(policy, on_crash):
    environment = ProgramHarness(
        name="none", rubric=Rubric([always]), train=[TASK], command=["./no-such-program"], on_crash=on_crash
    )
    trace = await run(environment, policy(lambda prompt: "5"))
    assert trace.failure.kind is FailureClass.HARNESS
    assert "no-such-program" in trace.failure.message
    trace = await run(program("print('bye')", on_crash=on_crash), policy(lambda prompt: "5"))
    assert trace.failure.kind is FailureClass.HARNESS
    assert "took no turn: it made no call" in trace.failure.message
    assert trace.info["program"]["stdout"] == "bye\n"


async def test_budgets_end_a_program_with_all_that_it_started(policy):
    code = """
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
for number in range(9):
    try:
        print(ask(str(number)), flush=True)
    except urllib.error.HTTPError as error:
        print(error.code, json.load(error)["error"]["message"], flush=True)
        time.sleep(60)
"""
    trace = await run(program(code), policy(lambda prompt: "5"), Limits(max_turns=2))
    assert (trace.failure, trace.stop_reason, trace.reward) == (None, StopReason.MAX_TURNS, 1)
    child, *said = trace.info["program"]["stdout"].splitlines()
    assert said == ["5", "5", "403 the rollout has ended (max_turns): no further turn is given"]
    assert trace.info["program"]["exit_code"] == -15
    assert not is_alive(child)


@pytest.mark.parametrize("limits", [Limits(budget_seconds=1.0), Limits(deadline_seconds=1.0)])
async def test_a_program_that_will_not_end_is_killed(policy, monkeypatch, limits):
    monkeypatch.setattr(process, "END_SECONDS", 0.2)
    code = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
ask("x")
while True:
    time.sleep(60)
"""
    trace = await run(program(code), policy(lambda prompt: "5"), limits)
    assert trace.info["program"]["exit_code"] == -9
    assert not is_alive(trace.info["program"]["stdout"].strip())
    if limits.budget_seconds:
        assert (trace.stop_reason, trace.reward) == (StopReason.TIMEOUT, 1)
    else:
        assert trace.failure.kind is FailureClass.TIMEOUT


async def test_a_child_that_outlives_the_program_and_holds_its_output_open_is_not_waited_for(policy):
    code = """
ask("x")
away = subprocess.Popen(["sleep", "60"], start_new_session=True)
near = subprocess.Popen(["sleep", "60"])
print(away.pid, near.pid, flush=True)
"""
    trace = await run(program(code), policy(lambda prompt: "5"))
    away, near = trace.info["program"]["stdout"].split()
    try:
        assert (trace.failure, trace.info["program"]["exit_code"]) == (None, 0)
        assert not is_alive(near)
    finally:
        os.kill(int(away), 9)


async def test_of_a_huge_output_the_end_is_kept(policy):
    code = "ask('x'); print('x' * 10_000_000); print('the end'); print('é', file=sys.stderr)"
    trace = await run(program(code), policy(lambda prompt: "5"))
    assert trace.info["program"]["stdout"].endswith("x\nthe end\n")
    assert len(trace.info["program"]["stdout"]) == 2000
    assert trace.info["program"]["stderr"] == "é\n"


async def test_a_cancelled_rollout_ends_its_program(policy):
    started = asyncio.Event()
    scripted = policy(lambda prompt: "5")

    async def never():
        started.set()
        await asyncio.sleep(60)

    scripted.engine.before = never
    pids = []

    class Remembering(ProgramHarness):
        async def teardown(self, rollout):
            pids.append(rollout.info["program"]["stdout"].strip())
            await super().teardown(rollout)

    command = [sys.executable, "-c", ASK + "print(os.getpid(), flush=True); ask('x')"]
    environment = Remembering(name="cancelled", rubric=Rubric([always]), train=[TASK], command=command)
    rollout = asyncio.create_task(run(environment, scripted))
    async with asyncio.timeout(20):
        await started.wait()
    rollout.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rollout
    assert not is_alive(pids[0])


@pytest.mark.parametrize("command", ["agent --task {prompt}", []])
def test_a_command_is_a_list(command):
    with pytest.raises(ValueError, match="must be a list"):
        ProgramHarness(name="x", rubric=Rubric([always]), train=[TASK], command=command)


def test_on_crash_is_one_of_two():
    with pytest.raises(ValueError, match="neither 'fail' nor 'score'"):
        program("", on_crash="ignore")
