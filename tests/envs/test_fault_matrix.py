"""Every fault at every place: the recorded class is right, the others of the group are unharmed, nothing trains on it.

Rows are faults, columns the places where code of an environment runs; every cell is a group of four rollouts in a real
env worker, one of them guilty. A cell's entry is the class that is recorded for that one.
"""

import asyncio
import contextlib
import functools
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

import hone.envs.worker
from fakes import ScriptedSampler
from hone.config.load import recipe_from
from hone.envs import FailureClass, Limits, Rollout, Rubric, Task, ToolUse, reward, stalls, tool, user
from hone.envs.judges import Judge, choice_verdict
from hone.envs.local_processes import LocalProcesses
from hone.envs.worker import Worker
from hone.orchestrator.advantages import advantages
from hone.orchestrator.batching import make_batch
from hone.orchestrator.dispatch import Dispatch
from hone.orchestrator.samples import check_trainable
from hone.schema.messages import Message, ToolCall
from hone.schema.rollouts import WORKER_CHANNEL, RolloutRequest, RolloutResult, WorkerHello
from hone.schema.sampling import FinishReason, SamplingParameters, Turn, VersionRun
from hone.schema.sandboxes import SandboxSpec
from hone.schema.wire import Wire
from hone.transport.batches import samples_of

PLACES = ("reward", "tool", "shown tool", "reply", "setup", "teardown")
GUILTY = 1
TASK = Task(prompt=(user("call the tool"),))
SECTION = recipe_from({"model": {"path": "m"}, "environments": [{"name": "matrix"}], "rl": {}}, "test").rl
WIRE = Wire(*WORKER_CHANNEL)
MANY = 2 * 2**20


class Matrix(ToolUse):
    """A tool call, an answer, a reply, another answer, a reward; `fault` happens at one place of the guilty attempt."""

    def __init__(self, place, fault):
        async def at(here, attempt):
            return await fault(here) if here in place and attempt == GUILTY else None

        @tool(timeout_seconds=0.5, on_error="show" if place == "shown tool" else "fail")
        async def look(rollout: Rollout):
            """Look around."""
            return await at("tool", rollout.attempt)

        @reward(deadline_seconds=0.5)
        async def own_number(trace):
            found = await at("reward", trace.attempt)
            return float(trace.attempt) if found is None else found

        super().__init__(name="matrix", rubric=Rubric([own_number]), train=[TASK], tools=[look])
        self.at = at

    async def setup(self, rollout):
        rollout.info["setup"] = await self.at("setup", rollout.attempt)

    async def reply(self, rollout):
        if rollout.num_turns == 3:
            return None
        return await self.at("reply", rollout.attempt) or [user("once more")]

    async def teardown(self, rollout):
        rollout.info["teardown"] = await self.at("teardown", rollout.attempt)


def policy(branch):
    if branch[-1].message != TASK.prompt[0]:
        return "done"
    message = Message("assistant", tool_calls=(ToolCall("call_0", "look", "{}"),))
    return Turn(message, FinishReason.STOP, [1], [2], [-0.5], [VersionRun(0, 1)], num_completion_tokens=1)


# The rows.


async def raises(place):
    raise KeyError("broken")


async def hangs(place):
    await asyncio.sleep(3600)


async def blocks(place):
    time.sleep(3600)


async def gives_nan(place):
    return float("nan")


async def gives_a_wrong_type(place):
    return object()


async def gives_too_much(place):
    return {"reward": 10**400, "reply": [user("x" * MANY)]}.get(place, "x" * MANY)


async def is_cancelled(place):
    raise asyncio.CancelledError


async def finds_its_judge_dead(place):
    nobody = "http://127.0.0.1:9/v1"
    await Judge(nobody, "judge", "{answer}", choice_verdict("yes", "no"), deadline_seconds=0.1).ask(answer=place)


async def finds_its_sandbox_dead(sandbox, place):
    await sandbox.exec(["true"])


KEPT, SHOWN = "keeps its reward", "is read by the policy"
ENVIRONMENT, TIMEOUT, TOOL = FailureClass.ENVIRONMENT, FailureClass.TIMEOUT, FailureClass.TOOL
JUDGE, SANDBOX = FailureClass.JUDGE, FailureClass.SANDBOX

MATRIX = {
    #                        reward       tool     shown tool  reply       setup        teardown
    raises:                 (ENVIRONMENT, TOOL,    SHOWN,   ENVIRONMENT, ENVIRONMENT, KEPT),
    hangs:                  (TIMEOUT,     TOOL,    SHOWN,   TIMEOUT,     TIMEOUT,     KEPT),
    blocks:                 (TIMEOUT,     TIMEOUT, TIMEOUT, TIMEOUT,     TIMEOUT,     KEPT),
    gives_nan:              (ENVIRONMENT, KEPT,    KEPT,    ENVIRONMENT, KEPT,        KEPT),
    gives_a_wrong_type:     (ENVIRONMENT, TOOL,    TOOL,    ENVIRONMENT, ENVIRONMENT, ENVIRONMENT),
    gives_too_much:         (ENVIRONMENT, KEPT,    KEPT,    ENVIRONMENT, ENVIRONMENT, ENVIRONMENT),
    is_cancelled:           (ENVIRONMENT, TOOL,    SHOWN,   ENVIRONMENT, ENVIRONMENT, KEPT),
    finds_its_judge_dead:   (JUDGE,       JUDGE,   JUDGE,   JUDGE,       JUDGE,       KEPT),
    finds_its_sandbox_dead: (SANDBOX,     SANDBOX, SANDBOX, SANDBOX,     SANDBOX,     KEPT),
}  # fmt: skip
CELLS = [
    pytest.param(fault, place, entry, id=f"{fault.__name__}-{place.replace(' ', '_')}")
    for fault, row in MATRIX.items()
    for place, entry in zip(PLACES, row, strict=True)
]


@contextlib.asynccontextmanager
async def orchestrator():
    """A bound ROUTER, and a function that gives the next messages of a type with their sender."""
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind("tcp://127.0.0.1:*")

        async def expect(kind, count=1):
            found = []
            async with asyncio.timeout(20):
                while len(found) < count:
                    identity, *frames = await socket.recv_multipart()
                    found += [(identity, m) for frame in frames if isinstance(m := WIRE.decode(frame), kind)]
            return found

        yield socket, expect


async def traces_of(environment, max_stall_seconds):
    """The traces of a group of four, by attempt, as a worker sends them."""
    async with orchestrator() as (socket, expect):
        worker = Worker(
            "w",
            socket.getsockopt_string(zmq.LAST_ENDPOINT),
            {"matrix": environment},
            ScriptedSampler(policy),
            limits=Limits(deadline_seconds=2.0, teardown_seconds=0.5),
            max_stall_seconds=max_stall_seconds,
        )
        async with worker:
            running = asyncio.create_task(worker.run())
            [(identity, _)] = await expect(WorkerHello)
            request = RolloutRequest("1", "matrix", TASK, list(range(4)), SamplingParameters(), 0)
            await socket.send_multipart([identity, WIRE.encode(request)])
            results = [result for _, result in await expect(RolloutResult, 4)]
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
    return [result.trace for result in sorted(results, key=lambda result: result.attempt)]


@pytest.mark.parametrize(("fault", "place", "entry"), CELLS)
async def test_every_fault_at_every_place(fault, place, entry, monkeypatch):
    monkeypatch.setattr(hone.envs.worker, "MAX_RESULT_BYTES", MANY)
    monkeypatch.setattr(stalls, "AGAIN_SECONDS", 0.1)
    async with contextlib.AsyncExitStack() as stack:
        if fault is finds_its_sandbox_dead:
            fault = functools.partial(fault, await dead_sandbox(stack))
        traces = await traces_of(Matrix(place, fault), 0.2 if fault is blocks else 20.0)
    guilty = traces[GUILTY]
    siblings = [trace for trace in traces if trace is not guilty]
    assert [(trace.failure, trace.reward) for trace in siblings] == [(None, 0.0), (None, 2.0), (None, 3.0)]
    if entry in (KEPT, SHOWN):
        assert (guilty.failure, guilty.reward) == (None, 1.0)
        assert ("Error" in guilty.messages[2].content) is (entry is SHOWN)
    else:
        assert guilty.failure is not None
        assert guilty.failure.kind is entry, guilty.failure
        assert (guilty.rewards, guilty.metrics, guilty.stop_reason) == ({}, {}, None)
        with pytest.raises(ValueError, match=r"failed trace has no reward|nothing to train"):
            check_trainable(guilty)
    assert_only_valid_rollouts_train(traces)


def assert_only_valid_rollouts_train(traces):
    """The batch has a sample for each valid rollout, whose advantages are relative to the valid ones alone."""
    valid = [trace for trace in traces if trace.failure is None]
    samples = list(samples_of(make_batch(1, [valid], SECTION).batch))
    rewards = [trace.reward for trace in valid]
    assert [sample.reward for sample in samples] == rewards
    trained = [[a for a, m in zip(sample.advantages, sample.loss_mask, strict=True) if m] for sample in samples]
    for found, wanted in zip(trained, advantages(SECTION.advantage, rewards), strict=True):
        assert found == [pytest.approx(wanted)] * len(found)


async def dead_sandbox(stack):
    """A sandbox whose guardian was killed."""
    sandbox = await LocalProcesses().create(SandboxSpec())
    stack.push_async_callback(sandbox.close)
    os.kill(sandbox._guardian, signal.SIGKILL)
    return sandbox


DYING = """
import asyncio, os, sys
from pathlib import Path
from fakes import ScriptedSampler
from test_fault_matrix import Matrix, policy
from hone.envs.worker import Worker

address, place, mark = sys.argv[1:]

async def dies_once(place):
    if not Path(mark).exists():
        Path(mark).touch()
        os._exit(1)

async def main():
    sampler = ScriptedSampler(policy)
    async with Worker("w", address, {"matrix": Matrix(place, dies_once)}, sampler) as worker:
        await worker.run()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
async def test_a_worker_that_dies_at_every_place_costs_its_rollouts_nothing_but_time(place, tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    dispatch, results, lost = Dispatch(100), {}, []
    dispatch.submit(RolloutRequest("1", "matrix", TASK, list(range(4)), SamplingParameters(), 0))
    async with orchestrator() as (socket, expect), asyncio.timeout(60):
        address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        for life in range(2):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", DYING, address, place, str(tmp_path / "died"),
                env=os.environ | {"PYTHONPATH": paths},
            )  # fmt: skip
            [(identity, hello)] = await expect(WorkerHello)
            lost.append(dispatch.greet(hello.worker, hello.pid, identity, frozenset(hello.environments), 0.0))
            if life:
                for key in lost[1].keys:
                    again = RolloutRequest(key[0], "matrix", TASK, [key[1]], SamplingParameters(), 0)
                    dispatch.submit(again)
            for _, request in dispatch.assign(0.0):
                await socket.send_multipart([identity, WIRE.encode(request)])
            if not life:
                assert await process.wait() == 1
                await take_what_arrived(socket, dispatch, results)
        while len(results) < 4:
            for _, result in await expect(RolloutResult):
                assert dispatch.is_owner(identity, (result.group, result.attempt))
                dispatch.done((result.group, result.attempt))
                results[result.attempt] = result.trace
        process.kill()
        await process.wait()
    assert lost[0] is None
    assert lost[1].has_died
    assert ("1", GUILTY) in lost[1].keys
    assert [results[attempt].reward for attempt in range(4)] == [0.0, 1.0, 2.0, 3.0]


async def take_what_arrived(socket, dispatch, results):
    """What a worker managed to send before it died."""
    while await socket.poll(200):
        for frame in (await socket.recv_multipart())[1:]:
            message = WIRE.decode(frame)
            if isinstance(message, RolloutResult):
                dispatch.done((message.group, message.attempt))
                results[message.attempt] = message.trace
