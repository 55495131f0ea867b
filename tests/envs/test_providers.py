"""Environments on cells: the same tools and verifiers as on local processes, and failures typed at the boundary."""

import asyncio
import json
import os
import signal

import pytest

from hone.envs import Rubric, Task, assistant, play, reward, tool_call, user
from hone.envs.failures import RolloutFailure
from hone.envs.local_processes import LocalProcesses, LocalSandbox
from hone.envs.providers import NodeSandboxes, SandboxesHere, sandboxes_at
from hone.envs.sandbox_tools import SandboxToolUse
from hone.envs.sandboxes import LazySandbox
from hone.envs.sessions import PythonSession
from hone.envs.verifiers.code import Assertions, CodeVerifier, InputsOutputs
from hone.sandbox import client
from hone.sandbox.client import SandboxError, Unsupported, embedded_node
from hone.sandbox.node.node import Node
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandboxes import Outcome, SandboxSpec
from hone.schema.traces import FailureClass

TASK = Task(prompt=(user("work"),))
SMALL = SandboxSpec(memory_mb=256, disk_mb=16)


@pytest.fixture
async def provider():
    provider = sandboxes_at("cells")
    try:
        await (await provider.create(SMALL)).close()
    except RolloutFailure as failure:
        pytest.skip(str(failure))
    return provider


def test_a_provider_has_a_name_or_an_address():
    assert isinstance(sandboxes_at("processes"), LocalProcesses)
    assert isinstance(sandboxes_at("unix:/run/node"), NodeSandboxes)
    assert isinstance(sandboxes_at("tls://gateway:7300"), NodeSandboxes)
    assert isinstance(sandboxes_at("here"), SandboxesHere)
    with pytest.raises(ValueError, match="say here, cells, processes"):
        sandboxes_at("somewhere")


async def test_here_is_a_cell_where_there_are_cells(provider):
    async with LazySandbox(SandboxesHere(), SMALL) as box:
        assert (await box.exec(["cat", "/proc/self/uid_map"])).stdout.split()[:1] == ["0"]
        assert (await box.exec(["pwd"])).stdout == "/work\n"


async def test_a_machine_that_cannot_have_cells_is_given_processes_and_told_so(monkeypatch, caplog):
    async def refuse(self):
        raise Unsupported("no user namespaces")

    monkeypatch.setattr(client.Sandbox, "open", refuse)
    here = SandboxesHere()
    for _ in range(2):
        box = await here.create(SMALL)
        assert isinstance(box, LocalSandbox)
        await box.close()
    (warning,) = caplog.messages
    assert "no boundary" in warning
    assert "no user namespaces" in warning


async def test_trouble_with_cells_does_not_make_weaker_sandboxes_of_them(monkeypatch):
    async def break_down(self):
        raise SandboxError("the node is gone")

    monkeypatch.setattr(client.Sandbox, "open", break_down)
    with pytest.raises(RolloutFailure, match="the node is gone"):
        await SandboxesHere().create(SMALL)


async def test_what_the_protocol_says_holds(provider):
    async with LazySandbox(provider, SMALL) as box:
        await box.write("deep/a.txt", b"hello")
        assert await box.read("deep/a.txt") == b"hello"
        assert "deep/" in await box.list()
        with pytest.raises(ValueError, match="larger max_bytes"):
            await box.read("deep/a.txt", max_bytes=2)
        with pytest.raises(OSError, match="no-such"):
            await box.read("no-such")
        process = await box.start(["sh", "-c", "head -c 1000000 /dev/zero >&2; cat"])
        await process.write(b"echo")
        assert await process.read() == b"echo"
        await process.close()


async def test_a_sandbox_that_its_programs_ended_gives_results_and_no_failure(provider, monkeypatch):
    outcome = Outcome.OUT_OF_MEMORY

    async def refuse(self, *args, **options):
        raise SandboxError("its memory was used up", outcome)

    async with LazySandbox(provider, SMALL) as box:
        assert (await box.exec(["true"])).is_success
        monkeypatch.setattr(client.Sandbox, "exec", refuse)
        result = await box.exec(["true"])
        assert (result.outcome, result.exit_code, result.is_success) == (outcome, -signal.SIGKILL, False)
        outcome = Outcome.AGENT_LOST
        with pytest.raises(RolloutFailure, match="agent_lost"):
            await box.exec(["true"])


async def test_a_python_session_runs_in_a_cell(provider):
    async with LazySandbox(provider, SMALL) as box:
        session = PythonSession(box)
        await session.run("x = 6")
        assert await session.run("x * 7") == "42\n"


async def test_code_is_verified_in_cells(provider):
    verifier = CodeVerifier(provider, SMALL)
    right, wrong = "def double(x):\n    return 2 * x", "def double(x):\n    return x"
    tests = Assertions(["assert double(1) == 2", "assert double(0) == 0"])
    assert (await verifier.verify(right, tests)).is_right
    assert (await verifier.verify(wrong, tests)).num_passed == 1
    assert (await verifier.verify("print(int(input()) * 2)", InputsOutputs([("1", "2")]))).is_right


async def test_a_sandbox_that_dies_is_a_failure_and_never_a_result(provider):
    box = await provider.create(SMALL)
    pid = (await embedded_node()).sandbox(box._inner.sandbox_id).cell.pid
    asyncio.get_running_loop().call_later(0.1, os.kill, pid, signal.SIGKILL)
    with pytest.raises(RolloutFailure) as failure:
        await box.exec(["sleep", "60"])
    assert failure.value.failure.kind is FailureClass.SANDBOX
    await box.close()


async def test_a_node_that_is_not_there_is_a_failure(tmp_path):
    with pytest.raises(RolloutFailure) as failure:
        await sandboxes_at(f"unix:{tmp_path}/none").create(SMALL)
    assert failure.value.failure.kind is FailureClass.SANDBOX


@reward
def worked() -> float:
    return 1.0


async def test_a_trace_tells_the_time_in_sandboxes_and_the_sandbox_its_rollout(provider, tmp_path):
    async with Node(folder=tmp_path / "node") as node, NodeServer(node, f"unix:{tmp_path}/socket") as server:
        environment = SandboxToolUse(
            name="work", rubric=Rubric([worked]), train=[TASK], sandboxes=sandboxes_at(server.address), spec=SMALL
        )
        call = assistant("", tool_call("shell", {"command": "sleep 0.1"}, id="1"))
        trace = await play(environment, TASK, call, "done")
    assert trace.failure is None
    assert 0.1 < trace.timing.sandbox_seconds < 60
    [line] = (tmp_path / "node" / "sandboxes.jsonl").read_text().splitlines()
    assert json.loads(line)["rollout"] == "work/0"
