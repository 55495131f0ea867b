"""The env worker process: takes rollout requests from the orchestrator and answers with scored traces.

Start it as `python -m hone.envs.worker RUN_FOLDER NAME ENVIRONMENT...`, with the Python that these environments of the
run's recipe are installed in. It speaks from a ZeroMQ DEALER to the orchestrator's ROUTER.
Every frame is one message in its envelope, and a multipart message carries the frames of one tick of the event loop,
in both directions. To the orchestrator: WorkerHello after each (re)connection, Heartbeat, RolloutResult, Farewell.
From it: RolloutRequest, RolloutCancel, Shutdown. When the connection breaks, all rollouts under way are given up,
because the orchestrator that comes back issues anew what it still needs; results are idempotent by group and attempt.
Code of an environment that blocks the event loop for too long is interrupted, and its rollout fails. Where that does
not help, the worker names the rollout, says farewell and ends; it is started again.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq
from zmq.utils.monitor import parse_monitor_message

from hone.config.load import load_recipe
from hone.config.recipe import Recipe
from hone.envs.environment import Environment
from hone.envs.pacing import spare_collector
from hone.envs.registry import load_environment
from hone.envs.rollout import Limits, Underway
from hone.envs.runner import RolloutRunner
from hone.envs.sampler import Sampler
from hone.envs.stalls import StallMeter
from hone.inference.client import TokenChannel, TokenSampler
from hone.observability import logs
from hone.observability.disk import disk_complaint, is_disk_trouble
from hone.schema.rollouts import (
    FRAMES_PER_MESSAGE,
    WORKER_CHANNEL,
    Farewell,
    Heartbeat,
    RolloutCancel,
    RolloutRequest,
    RolloutResult,
    Shutdown,
    WorkerHello,
)
from hone.schema.traces import Failure, FailureClass, Trace
from hone.schema.wire import Wire, WireError
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone.transport.addresses import load_addresses
from hone.transport.folders import RunFolder

logger = logging.getLogger("hone.envs.worker")

RECONNECT_MILLISECONDS = 100
PING_MILLISECONDS = 2_000
SILENCE_MILLISECONDS = 30_000
FAREWELL_MILLISECONDS = 1_000
MAX_RESULT_BYTES = 256 * 2**20
"""A longer trace is a failure: the orchestrator keeps those of all outstanding groups in memory."""
MAX_STALL_SECONDS = 30.0

WILL_NEVER_WORK = 2


def main(arguments: list[str]) -> int:
    """Run the worker that the command line asks for; the result is the process's exit code."""
    if len(arguments) < 3:
        print("usage: python -m hone.envs.worker RUN_FOLDER NAME ENVIRONMENT...", file=sys.stderr)
        return WILL_NEVER_WORK
    folder, name = RunFolder(Path(arguments[0])), arguments[1]
    try:
        logs.configure(name, folder.path)
        recipe = load_recipe(folder.config)
        environments = load_environments(recipe, arguments[2:])
        address = load_addresses(folder.addresses)
        renderer = Renderer(Tokenizer.load(folder.model))
    except ValueError as error:
        return _complain(str(error))
    except OSError as error:
        if not is_disk_trouble(error):
            raise
        return _complain(disk_complaint(error, folder.path))
    spare_collector()
    asyncio.run(_serve(recipe, name, environments, renderer, address.workers, address.tokens))
    return 0


def _complain(message: str) -> int:
    logger.error("%s", message)
    print(f"error: {message}", file=sys.stderr)
    return WILL_NEVER_WORK


def load_environments(recipe: Recipe, names: Sequence[str]) -> dict[str, Environment]:
    """Environments of a recipe that are installed here, by the names that requests use."""
    sections = {section.name: section for section in recipe.environments}
    missing = [name for name in names if name not in sections]
    if missing:
        raise ValueError(f"the recipe lists no environment {missing[0]!r}; there are {', '.join(sections) or 'none'}")
    return {name: load_environment(name, **sections[name].arguments) for name in names}


def limits_from(recipe: Recipe) -> Limits:
    """The limits that a recipe sets for rollouts."""
    if recipe.rl is None:
        return Limits()
    return Limits(
        max_turns=recipe.rl.max_turns,
        max_tool_calls=recipe.rl.max_tool_calls,
        deadline_seconds=recipe.rl.rollout_timeout_seconds,
    )


async def _serve(
    recipe: Recipe,
    name: str,
    environments: Mapping[str, Environment],
    renderer: Renderer,
    orchestrator: str,
    engine: str,
) -> None:
    async with TokenChannel(engine) as channel:
        worker = Worker(
            name,
            orchestrator,
            environments,
            TokenSampler(channel, renderer, deadline_seconds=limits_from(recipe).deadline_seconds),
            limits=limits_from(recipe),
            heartbeat_seconds=recipe.workers.heartbeat_seconds,
            max_stall_seconds=recipe.workers.max_stall_seconds,
        )
        async with worker:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, worker.stop, signal.strsignal(number))
            await worker.run()


class Worker:
    """Rollouts for one orchestrator, as tasks of this event loop. Use as a context, then `await run()`."""

    def __init__(
        self,
        name: str,
        address: str,
        environments: Mapping[str, Environment],
        sampler: Sampler,
        *,
        limits: Limits = Limits(),
        heartbeat_seconds: float = 1.0,
        max_stall_seconds: float = MAX_STALL_SECONDS,
    ) -> None:
        self._name = name
        self._address = address
        self._environments = environments
        self._runner = RolloutRunner(environments, sampler, self._deliver, limits)
        self._heartbeat_seconds = heartbeat_seconds
        self._max_stall_seconds = max_stall_seconds
        self._wire = Wire(*WORKER_CHANNEL)
        self._outgoing: list[bytes] = []
        self._flush_is_due = False
        self._over = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.LINGER, FAREWELL_MILLISECONDS),
            (zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS),
            (zmq.HEARTBEAT_IVL, PING_MILLISECONDS),
            (zmq.HEARTBEAT_TIMEOUT, SILENCE_MILLISECONDS),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._loop.add_reader(self._monitor.fileno(), self._watch)
        self._socket.connect(self._address)
        await self._runner.__aenter__()
        self._poll()  # descriptors tell what comes after a look that found nothing
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._runner.__aexit__(kind, error, trace)
        finally:
            self._flush()
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_reader(self._monitor.fileno())
            self._socket.disable_monitor()
            self._monitor.close()
            self._socket.close()
            self._context.term()

    async def run(self) -> None:
        """Work until the orchestrator says that it is over."""
        with StallMeter(deadline_seconds=self._max_stall_seconds, last_words=self._say_farewell) as stalls:
            while not self._over.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), self._heartbeat_seconds)
                stall = stalls.take_longest()
                self._send(
                    Heartbeat(self._name, self._runner.num_running, stall.seconds, stall.place, stall.environment)
                )
                self._poll()

    def stop(self, reason: str | None) -> None:
        """Let `run` return; what is under way is given up."""
        logger.info("stopping: %s", reason)
        self._over.set()

    def _say_farewell(self, guilty: Underway, failure: Failure) -> None:
        """The last words of a process whose loop stands still; its thread is not in here, so the socket is ours."""
        rollout = guilty.rollout
        trace = Trace(guilty.environment, rollout.task, rollout.attempt, group=guilty.group, failure=failure)
        result = RolloutResult(guilty.group, rollout.attempt, trace)
        for message in (result, Farewell(self._name, failure.message)):
            self._outgoing.append(self._wire.encode(message))
        self._socket.send_multipart(self._outgoing[-FRAMES_PER_MESSAGE:], zmq.NOBLOCK, copy=True)
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()  # returns when all has left, or after the time to linger

    def _deliver(self, result: RolloutResult) -> None:
        data = self._wire.encode(result)
        if len(data) > MAX_RESULT_BYTES:
            data = self._wire.encode(_too_long(result, len(data)))
        self._post(data)

    def _send(self, message: WorkerHello | Heartbeat) -> None:
        self._post(self._wire.encode(message))

    def _post(self, data: bytes) -> None:
        """Put a message among those that leave at the end of this tick."""
        self._outgoing.append(data)
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._socket.closed:
            return
        for start in range(0, len(self._outgoing), FRAMES_PER_MESSAGE):
            # The high-water marks are off, so this never waits.
            self._socket.send_multipart(self._outgoing[start : start + FRAMES_PER_MESSAGE], zmq.NOBLOCK, copy=True)
        self._outgoing = []
        self._poll()

    def _poll(self) -> None:
        """ZeroMQ's descriptor tells changes only, and sending may swallow one: look again after each use."""
        self._receive()
        self._watch()

    def _receive(self) -> None:
        for frames in _waiting(self._socket):
            for frame in frames:
                self._obey(frame)

    def _obey(self, frame: bytes) -> None:
        try:
            message = self._wire.decode(frame)
        except WireError as error:
            logger.error("the orchestrator sent what is no request: %s", error)
            return
        if isinstance(message, RolloutRequest):
            self._runner.start(message)
        elif isinstance(message, RolloutCancel):
            self._runner.cancel(message.group)
        elif isinstance(message, Shutdown):
            self.stop(message.reason)

    def _watch(self) -> None:
        for frames in _waiting(self._monitor):
            if parse_monitor_message(frames)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._send(WorkerHello(self._name, os.getpid(), list(self._environments)))
            elif self._runner.num_running:
                logger.warning("lost the orchestrator; giving up %d rollouts", self._runner.num_running)
                self._runner.cancel_all()


def _too_long(result: RolloutResult, num_bytes: int) -> RolloutResult:
    trace = result.trace
    message = (
        f"the trace has {num_bytes / 2**20:.0f} MiB, more than the {MAX_RESULT_BYTES / 2**20:.0f} that are carried"
    )
    failure = Failure(FailureClass.ENVIRONMENT, "trace", message)
    short = Trace(trace.environment, trace.task, trace.attempt, trace.environment_version, trace.group, failure=failure)
    return RolloutResult(result.group, result.attempt, short)


def _waiting(socket: "zmq.Socket[bytes]") -> Iterator[list[bytes]]:
    """The messages that have arrived."""
    while not socket.closed:
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
