import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from fakes import ScriptedSampler
from hone.config.recipe import Recipe
from hone.envs import Limits, Rubric, SingleTurn, Task, reward, user
from hone.envs.stalls import STALLED
from hone.envs.worker import Worker, limits_from
from hone.schema.rollouts import (
    WORKER_CHANNEL,
    Farewell,
    Heartbeat,
    RolloutCancel,
    RolloutRequest,
    RolloutResult,
    Shutdown,
    WorkerHello,
)
from hone.schema.sampling import SamplingParameters
from hone.schema.wire import Wire
from hone.text.training import train_tokenizer
from hone.transport.addresses import Addresses, save_addresses

WIRE = Wire(*WORKER_CHANNEL)
TASK = Task(prompt=(user("say yes"),), reference="yes")


@reward
def exact(answer, reference):
    return answer == reference


def test_a_recipe_sets_the_budgets_and_the_deadline_of_rollouts():
    budgets = {"max_turns": 3, "max_tool_calls": 5, "rollout_timeout_seconds": 7}
    recipe = Recipe.model_validate(
        {"model": {"path": "somewhere"}, "environments": [{"name": "single"}], "rl": budgets}
    )
    assert limits_from(recipe) == Limits(max_turns=3, max_tool_calls=5, deadline_seconds=7)
    assert limits_from(recipe.model_copy(update={"rl": None})) == Limits()


ENVIRONMENT = SingleTurn(name="single", rubric=Rubric([exact]), train=[TASK])


class Orchestrator:
    """The other end of the channel: a ROUTER that knows its one worker by the latest hello."""

    def __init__(self, address="tcp://127.0.0.1:*"):
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(address)
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.heartbeats = []
        self.messages = []
        self.identity = None

    async def expect(self, kind, count=1):
        """The next `count` messages of a type; heartbeats are kept aside."""
        found = []
        async with asyncio.timeout(10):
            while len(found) < count:
                for message in await self.receive():
                    (found if isinstance(message, kind) else self.messages).append(message)
        return found

    async def receive(self):
        identity, *frames = await self.socket.recv_multipart()
        messages = [WIRE.decode(frame) for frame in frames]
        self.heartbeats += [message for message in messages if isinstance(message, Heartbeat)]
        if any(isinstance(message, WorkerHello) for message in messages):
            self.identity = identity
        return messages

    async def send(self, *messages):
        await self.socket.send_multipart([self.identity, *(WIRE.encode(message) for message in messages)])

    def close(self):
        self.socket.close()
        self.context.term()


@contextlib.asynccontextmanager
async def working(sampler, heartbeat_seconds=0.05):
    orchestrator = Orchestrator()
    worker = Worker("w", orchestrator.address, {"single": ENVIRONMENT}, sampler, heartbeat_seconds=heartbeat_seconds)
    try:
        async with worker:
            running = asyncio.create_task(worker.run())
            (hello,) = await orchestrator.expect(WorkerHello)
            assert (hello.worker, hello.pid, hello.environments) == ("w", os.getpid(), ["single"])
            yield orchestrator
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
    finally:
        orchestrator.close()


def request(group, attempts=8):
    return RolloutRequest(group, "single", TASK, list(range(attempts)), SamplingParameters(), 0)


async def test_requests_are_answered_with_one_result_for_each_attempt():
    async with working(ScriptedSampler(["yes"])) as orchestrator:
        await orchestrator.send(request("a"), request("b"))
        results = await orchestrator.expect(RolloutResult, 16)
    assert sorted((r.group, r.attempt) for r in results) == [(g, i) for g in "ab" for i in range(8)]
    assert {result.trace.reward for result in results} == {1}


async def test_many_results_of_one_tick_leave_in_bounded_messages():
    async with working(ScriptedSampler(["yes"])) as orchestrator:
        await orchestrator.send(*(request(f"g{number}", 50) for number in range(20)))
        received = 0
        largest = 0
        while received < 1000:
            messages = await asyncio.wait_for(orchestrator.receive(), 10)
            received += sum(isinstance(message, RolloutResult) for message in messages)
            largest = max(largest, len(messages))
    assert 1 < largest <= 256


async def test_heartbeats_tell_what_runs_and_how_long_the_loop_stood_still():
    async with working(ScriptedSampler(["yes"], seconds=0.3)) as orchestrator:
        await orchestrator.send(request("a", 3))
        await orchestrator.expect(Heartbeat, 2)
        time.sleep(0.3)
        await orchestrator.expect(RolloutResult, 3)
        await orchestrator.expect(Heartbeat, 2)
    assert max(beat.num_running for beat in orchestrator.heartbeats) == 3
    assert orchestrator.heartbeats[-1].num_running == 0
    assert max(beat.max_stall_seconds for beat in orchestrator.heartbeats) > 0.2


async def test_a_cancelled_group_is_not_answered():
    sampler = ScriptedSampler(["yes"], seconds=0.05)
    async with working(sampler) as orchestrator:
        await orchestrator.send(request("a"), request("b"))
        await orchestrator.send(RolloutCancel("a"))
        results = await orchestrator.expect(RolloutResult, 8)
        await orchestrator.expect(Heartbeat, 3)
    assert {result.group for result in results} == {"b"}
    assert not any(isinstance(message, RolloutResult) for message in orchestrator.messages)


async def test_an_unreadable_message_is_survived(caplog):
    async with working(ScriptedSampler(["yes"])) as orchestrator:
        await orchestrator.socket.send_multipart([orchestrator.identity, b"nonsense"])
        await orchestrator.send(request("a", 1))
        assert len(await orchestrator.expect(RolloutResult)) == 1
    assert "no request" in caplog.text


async def test_losing_the_orchestrator_gives_up_the_rollouts_and_the_next_one_is_greeted():
    sampler = ScriptedSampler(["yes"], seconds=60)
    orchestrator = Orchestrator()
    worker = Worker("w", orchestrator.address, {"single": ENVIRONMENT}, sampler, heartbeat_seconds=0.05)
    async with worker:
        running = asyncio.create_task(worker.run())
        await orchestrator.expect(WorkerHello)
        await orchestrator.send(request("a", 3))
        while sampler.num_waiting < 3:
            await asyncio.sleep(0.01)
        orchestrator.close()
        async with asyncio.timeout(10):
            while sampler.num_waiting:
                await asyncio.sleep(0.01)
        orchestrator = Orchestrator(orchestrator.address)
        await orchestrator.expect(WorkerHello)
        sampler.seconds = 0
        await orchestrator.send(request("a", 3))
        assert len(await orchestrator.expect(RolloutResult, 3)) == 3
        await orchestrator.send(Shutdown("the run is over"))
        await asyncio.wait_for(running, 10)
    orchestrator.close()


async def test_shutdown_ends_the_worker_and_what_it_runs():
    sampler = ScriptedSampler(["yes"], seconds=60)
    orchestrator = Orchestrator()
    async with Worker("w", orchestrator.address, {"single": ENVIRONMENT}, sampler) as worker:
        running = asyncio.create_task(worker.run())
        await orchestrator.expect(WorkerHello)
        await orchestrator.send(request("a"), Shutdown("enough"))
        await asyncio.wait_for(running, 10)
    assert sampler.num_waiting == 0
    orchestrator.close()


STUCK = """
import asyncio, sys, time
from fakes import ScriptedSampler
from hone.envs import Rubric, SingleTurn, reward, stalls
from hone.envs.stalls import STALLED
from hone.envs.worker import Worker
stalls.GRACE_SECONDS, stalls.AGAIN_SECONDS = 0.3, 0.1

@reward
def never_gives_in(trace):
    while trace.attempt == 1:
        try:
            time.sleep(60)
        except BaseException:
            pass
    return 1

environment = SingleTurn(name="single", rubric=Rubric([never_gives_in]), train=[])

async def main():
    sampler = ScriptedSampler(lambda branch: "yes", seconds=0.2)
    async with Worker("w", sys.argv[1], {"single": environment}, sampler, max_stall_seconds=0.4) as worker:
        await worker.run()

asyncio.run(main())
"""


async def test_a_worker_that_must_end_itself_says_which_rollout_it_was():
    orchestrator = Orchestrator()
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STUCK, orchestrator.address, env=os.environ | {"PYTHONPATH": paths}
    )
    try:
        await orchestrator.expect(WorkerHello)
        await orchestrator.send(RolloutRequest("g", "single", TASK, [1, 2], SamplingParameters(), 0))
        (farewell,) = await orchestrator.expect(Farewell)
        assert "never_gives_in" in farewell.reason
        (result,) = [message for message in orchestrator.messages if isinstance(message, RolloutResult)]
        assert (result.attempt, result.trace.failure.kind) == (1, "timeout")
        assert await asyncio.wait_for(process.wait(), 10) == STALLED
    finally:
        if process.returncode is None:
            process.kill()
        orchestrator.close()


def run_worker(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "hone.envs.worker", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_run_without_configuration_ends_with_one_readable_line(tmp_path):
    process = run_worker(str(tmp_path), "worker-0", "reverse_text")
    assert process.returncode == 2
    assert "no recipe at" in process.stderr
    assert "Traceback" not in process.stderr
    assert run_worker("too few").returncode == 2


@pytest.mark.parametrize("ending", ["shutdown", "signal"])
async def test_the_process_serves_a_run_and_ends_on_request(tmp_path, ending):
    """The whole process, with a tokenizer on disk; the engine's address leads nowhere, so rollouts fail as model."""
    orchestrator = Orchestrator()
    (tmp_path / "config.toml").write_text(
        '[model]\npath = "somewhere"\n[[environments]]\nname = "reverse_text"\n'
        "[rl]\nrollout_timeout_seconds = 0.5\n[workers]\nheartbeat_seconds = 0.1\n"
    )
    nowhere = "tcp://127.0.0.1:9"
    addresses = Addresses("http://127.0.0.1:9", "http://127.0.0.1:9", nowhere, nowhere, orchestrator.address)
    save_addresses(addresses, tmp_path / "addresses.json")
    train_tokenizer(["say yes"], None, chat_template="chatml").save(tmp_path / "model")
    command = [sys.executable, "-m", "hone.envs.worker", str(tmp_path), "worker-0", "reverse_text"]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        (hello,) = await orchestrator.expect(WorkerHello)
        assert (hello.worker, hello.environments, hello.pid) == ("worker-0", ["reverse_text"], process.pid)
        await orchestrator.send(RolloutRequest("g", "reverse_text", TASK, [0], SamplingParameters(), 0))
        (result,) = await orchestrator.expect(RolloutResult)
        assert result.trace.failure.kind == "timeout"
        if ending == "shutdown":
            await orchestrator.send(Shutdown("test is over"))
        else:
            process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        orchestrator.close()
    assert (tmp_path / "logs" / "worker-0.log").exists()
