"""Fakes of everything around the orchestrator, speaking over the real sockets: engine, env worker, trainer."""

import asyncio
import contextlib
import os
import random
import runpy
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import zmq
import zmq.asyncio
from aiohttp import web
from zmq.utils.monitor import recv_monitor_message

from hone.config.load import recipe_from, save_recipe
from hone.orchestrator.loop import orchestrate
from hone.schema.batches import (
    TRAINER_CHANNEL,
    Acknowledged,
    BatchPending,
    BatchReady,
    BatchWanted,
    CheckpointSaved,
    NoMoreBatches,
    StepDone,
)
from hone.schema.messages import Message
from hone.schema.rollouts import (
    WORKER_CHANNEL,
    Heartbeat,
    RolloutCancel,
    RolloutRequest,
    RolloutResult,
    Shutdown,
    WorkerHello,
)
from hone.schema.sampling import FinishReason, Turn, VersionRun
from hone.schema.traces import Node, Reward, StopReason, Timing, Trace
from hone.schema.wire import Wire
from hone.transport.addresses import allocate, save_addresses
from hone.transport.batches import read_batch, samples_of
from hone.transport.folders import RunFolder

PROCESS = Path(__file__).parent / "orchestrator_process.py"


class FakeEngine:
    """The admin routes; `version` is what it serves."""

    def __init__(self, run, address):
        self.run, self.address = run, urlsplit(address)
        self.version = run.newest_weights()[0]
        self.loaded = []
        self.load_seconds = 0.0
        self.refusal = None
        self.num_refused = 0

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_post("/admin/load", self.load)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, self.address.hostname, self.address.port).start()
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    async def health(self, request):
        answer = {"ready": True, "version": self.version, "running": 0, "waiting": 0, "kv_usage": 0.0, "paused": False}
        return web.json_response(answer)

    async def load(self, request):
        body = await request.json()
        assert Path(body["folder"]).is_dir(), body
        await asyncio.sleep(self.load_seconds)
        if self.refusal:
            self.num_refused += 1
            return web.json_response({"error": {"message": self.refusal}}, status=400)
        self.version = body["version"]
        self.loaded.append(body["version"])
        return web.json_response({"version": self.version})

    async def restart(self):
        await self.__aexit__()
        await asyncio.sleep(0.05)
        self.version = self.run.newest_weights()[0]
        await self.__aenter__()


class FakeWorker:
    """Answers every attempt after `seconds(dice)` with a trace of two sampled tokens and `reward(request, attempt)`, or with `outcome(request, attempt)`."""

    def __init__(self, address, engine, name="worker-0", pid=None):
        self.address, self.engine, self.name = address, engine, name
        self.pid = pid or os.getpid()
        self.wire = Wire(*WORKER_CHANNEL)
        self.dice = random.Random(0)
        self.seconds = lambda dice: 0.0
        self.reward = lambda request, attempt: self.dice.choice([0.0, 1.0])
        self.outcome = lambda request, attempt: None
        self.requests = []
        self.finished = []
        self.cancelled = []
        self.num_hellos = 0
        self.is_stalled = False
        self.is_over = False
        self.tasks = set()

    async def __aenter__(self):
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self.socket.connect(self.address)
        self.jobs = [asyncio.create_task(job()) for job in (self.receive, self.watch, self.beat)]
        return self

    async def __aexit__(self, *_):
        for task in [*self.jobs, *self.tasks]:
            task.cancel()
        await asyncio.gather(*self.jobs, *self.tasks, return_exceptions=True)
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()
        self.context.term()

    async def send(self, *messages):
        await self.socket.send_multipart([self.wire.encode(message) for message in messages])

    async def watch(self):
        while True:
            event = await recv_monitor_message(self.monitor)
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.num_hellos += 1
                await self.send(WorkerHello(self.name, self.pid, ["digits"]))
            else:
                for task in self.tasks:
                    task.cancel()

    async def beat(self):
        while True:
            await asyncio.sleep(0.1)
            if not self.is_stalled:
                await self.send(Heartbeat(self.name, len(self.tasks), 0.0))

    async def receive(self):
        while True:
            for frame in await self.socket.recv_multipart():
                message = self.wire.decode(frame)
                if isinstance(message, RolloutRequest):
                    self.requests.append(message)
                    for attempt in message.attempts:
                        task = asyncio.create_task(self.roll_out(message, attempt))
                        self.tasks.add(task)
                        task.add_done_callback(self.tasks.discard)
                elif isinstance(message, RolloutCancel):
                    self.cancelled.append(message.group)
                elif isinstance(message, Shutdown):
                    self.is_over = True

    async def roll_out(self, request, attempt):
        began = self.engine.version
        seconds = self.seconds(self.dice)
        if seconds:
            await asyncio.sleep(seconds)
        trace = self.outcome(request, attempt) or self.trace(request, attempt, began)
        if trace.failure is None:
            self.finished.append((request.group, attempt))
        await self.send(RolloutResult(request.group, attempt, trace))

    def trace(self, request, attempt, began):
        return trace_of(request, attempt, began, self.engine.version, self.reward(request, attempt))


def trace_of(request, attempt, first_version, last_version, reward):
    turn = Turn(
        Message("assistant", "42"),
        FinishReason.STOP,
        context_token_ids=[1, 2, 3],
        token_ids=[4, 5],
        logprobs=[-0.5, -0.25],
        versions=[VersionRun(first_version, 1), VersionRun(last_version, 1)],
        num_completion_tokens=2,
    )
    return Trace(
        environment=request.environment,
        task=request.task,
        attempt=attempt,
        group=request.group,
        nodes=[Node(request.task.prompt[0]), Node(turn.message, 0, turn)],
        rewards={"exact": Reward(reward)},
        metrics={"length": 2.0},
        stop_reason=StopReason.COMPLETED,
        timing=Timing(1.0, 0.5),
    )


class FakeTrainer:
    """Trains by looking: every batch it is given is kept, by step."""

    def __init__(self, run, address, checkpoint_every=3, seconds=0.0, keep=1):
        self.run, self.address, self.checkpoint_every, self.seconds = run, address, checkpoint_every, seconds
        self.keep = keep
        self.pending = []
        self.wire = Wire(*TRAINER_CHANNEL)
        self.batches = {}
        self.steps_done = []
        self.last_step = None

    async def __aenter__(self):
        self.start()
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def start(self):
        self.task = asyncio.create_task(self.train())

    async def restart(self):
        await self.__aexit__()
        self.start()

    async def train(self):
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 20)
            socket.connect(self.address)
            saved = self.run.saved_steps()
            step = saved[-1] if saved else 0
            self.publish(step)
            while isinstance(ready := await self.ask(socket, BatchWanted(step + 1)), BatchReady):
                step += 1
                self.look_at(step, read_batch(self.run.resolve(ready.path)))
                await asyncio.sleep(self.seconds)
                self.publish(step)
                self.steps_done.append(step)
                await self.ask(socket, StepDone(step, self.run.relative(self.run.weights_of(step))))
                if step % self.checkpoint_every == 0:
                    await self.save(socket, step)
            await self.save(socket, step)
            self.last_step = step
            self.run.export.mkdir(exist_ok=True)
            (self.run.export / f"step_{step}").touch()

    def look_at(self, step, batch):
        samples = list(samples_of(batch))
        staleness = [step - 1 - sample.version for sample in samples]
        content = [(sample.version, sample.reward, sample.advantages) for sample in samples]
        before = self.batches.setdefault(step, (max(staleness), content))
        assert before == (max(staleness), content), "a batch changed when it was offered again"

    def publish(self, version):
        self.run.weights_of(version).mkdir(parents=True, exist_ok=True)

    async def save(self, socket, step):
        self.run.checkpoint_of(step).mkdir(parents=True, exist_ok=True)
        saved = self.run.saved_steps()
        for old in saved[: -self.keep]:
            self.run.checkpoint_of(old).rmdir()
        await self.ask(socket, CheckpointSaved(step, saved[-self.keep] if len(saved) >= self.keep else 0))

    async def ask(self, socket, message):
        while True:
            await socket.send(self.wire.encode(message))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    while True:
                        answer = self.wire.decode(await socket.recv())
                        if isinstance(answer, BatchPending):
                            self.pending.append(answer)
                        elif isinstance(message, BatchWanted):
                            if isinstance(answer, NoMoreBatches) or getattr(answer, "path", None):
                                return answer
                        elif answer == Acknowledged.of(message):
                            return answer


class FakeRun:
    """A run's folder with its recipe and addresses, and the orchestrator over it."""

    def __init__(self, path, rl=None, **sections):
        defaults = {"num_steps": 4, "batch_size": 8, "group_size": 4, "max_staleness": 1}
        tree = {
            "run": {"folder": str(path), "name": "run"},
            "model": {"path": "unused"},
            "environments": [{"name": "digits"}],
            "workers": {"heartbeat_seconds": 0.1, "max_stall_seconds": 0.5},
            "rl": defaults | (rl or {}),
        } | sections
        self.recipe = recipe_from(tree, "test")
        self.folder = RunFolder(self.recipe.folder)
        self.addresses = allocate(self.recipe)
        save_recipe(self.recipe, self.folder.config)
        save_addresses(self.addresses, self.folder.addresses)
        self.environments = {"digits": runpy.run_path(str(PROCESS))["digits"]()}

    async def orchestrate(self):
        await orchestrate(self.folder, self.recipe, self.environments, self.addresses)

    @contextlib.asynccontextmanager
    async def world(self, **trainer):
        """Engine, one worker and the trainer."""
        async with (
            FakeEngine(self.folder, self.addresses.admin) as engine,
            FakeWorker(self.addresses.workers, engine) as worker,
            FakeTrainer(self.folder, self.addresses.trainer, **trainer) as trainer,
        ):
            yield engine, worker, trainer


@pytest.fixture
def make_run(tmp_path):
    def make(rl=None, **sections):
        return FakeRun(tmp_path, rl, **sections)

    return make
