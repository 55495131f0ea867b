"""Rollouts of an environment in another Python that are sampled here: its process asks for each turn.

Evaluations and everything else that calls `run_rollout` can so run an environment that is not installed beside hone.
(In RL its rollouts run in env workers, which reach the engine by themselves.) `RolloutRelay` is this side; the other is
`python -m hone.envs.relay`, started at the first rollout, ended with its input, and started again when it dies.
"""

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import msgspec

from hone.envs.environment import Environment, description
from hone.envs.failures import describe, sendable
from hone.envs.pacing import spare_collector
from hone.envs.registry import EnvironmentLoadError, load_environment
from hone.envs.rollout import Limits, run_group, run_rollout
from hone.envs.sampler import Sampler
from hone.envs.stalls import StallMeter
from hone.schema.messages import ToolSpec
from hone.schema.remote import (
    FROM_ROLLOUTS,
    TO_ROLLOUTS,
    Abandoned,
    Attempted,
    AttemptWanted,
    Load,
    Raised,
    TurnGiven,
    TurnRefused,
    TurnWanted,
)
from hone.schema.sampling import SamplingParameters, Turn
from hone.schema.tasks import Task
from hone.schema.traces import Failure, FailureClass, Node, Trace
from hone.schema.wire import Wire, WireError

LOAD_SECONDS = 600.0
GRACE_SECONDS = 60.0
"""Beyond the deadlines that the other process keeps by itself."""
MAX_STALL_SECONDS = 30.0
LENGTH_BYTES = 4

Settled = TypeVar("Settled")


class RolloutRelay:
    """Runs rollouts of one environment in a process of another Python."""

    def __init__(self, load: Load, python: Path, group_seconds: float) -> None:
        self._load = load
        self._python = python
        self._group_seconds = group_seconds
        self._numbers = itertools.count()
        self._channel: _Channel | None = None
        self._starting: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

    async def attempt(
        self,
        task: Task,
        attempts: Sequence[int],
        sampler: Sampler,
        sampling: SamplingParameters,
        seed: int,
        limits: Limits,
        group: str,
        as_group: bool,
    ) -> list[Trace]:
        """The traces; of class worker when the process dies or does not answer in time."""
        wanted = AttemptWanted(
            next(self._numbers), task, list(attempts), as_group, sampling, seed, asdict(limits), group
        )
        seconds = limits.deadline_seconds + limits.teardown_seconds + self._group_seconds + GRACE_SECONDS
        channel = await self._open()
        try:
            async with asyncio.timeout(seconds):
                return await channel.attempt(wanted, sampler)
        except _Ended as error:
            return self._failed(wanted, str(error))
        except TimeoutError:
            channel.close()  # which fails its other rollouts too
            return self._failed(wanted, f"no result within {seconds:g} s")

    def close(self) -> None:
        """End the process."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    async def aclose(self) -> None:
        """End the process and wait until it is gone."""
        channel = self._channel
        self.close()
        if channel is not None:
            await channel.gone()

    async def _open(self) -> "_Channel":
        loop = asyncio.get_running_loop()
        async with self._starting.setdefault(loop, asyncio.Lock()):
            if self._channel is None or self._channel.is_over or self._channel.loop is not loop:
                self.close()
                self._channel = await _Channel.start(self._load, self._python)
            return self._channel

    def _failed(self, wanted: AttemptWanted, message: str) -> list[Trace]:
        failure = Failure(FailureClass.WORKER, "relay", f"{self._python}: {message}")
        return [failed_trace(self._load.name, wanted, attempt, failure) for attempt in wanted.attempts]


def failed_trace(environment: str, wanted: AttemptWanted, attempt: int, failure: Failure) -> Trace:
    """The trace of an attempt of which nothing else is known."""
    return Trace(environment, wanted.task, attempt, group=wanted.group, failure=failure)


class _Ended(Exception):
    """The process is gone."""


class _Channel:
    """One life of the process, and who waits for what from it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.loop = asyncio.get_running_loop()
        self.is_over = False
        self._process = process
        self._out, self._in = Wire(*TO_ROLLOUTS), Wire(*FROM_ROLLOUTS)
        self._samplers: dict[int, Sampler] = {}
        self._results: dict[int, asyncio.Future[list[Trace]]] = {}
        self._turns: set[asyncio.Task[None]] = set()
        self._reader: asyncio.Task[None]

    @classmethod
    async def start(cls, load: Load, python: Path) -> "_Channel":
        process = await asyncio.create_subprocess_exec(
            str(python), "-m", "hone.envs.relay", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        channel = cls(process)
        channel._send(load)
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                answer = await channel._receive()
        except (TimeoutError, asyncio.IncompleteReadError) as error:
            channel.close()
            raise EnvironmentLoadError(f"environment {load.name!r} in {python} did not load") from error
        except BaseException:  # a cancellation too: undo, then pass it on
            channel.close()
            raise
        if isinstance(answer, Raised):
            channel.close()
            raise EnvironmentLoadError(answer.message)
        channel._reader = asyncio.create_task(channel._read())
        return channel

    async def attempt(self, wanted: AttemptWanted, sampler: Sampler) -> list[Trace]:
        if self.is_over:
            raise _Ended("the process has ended")
        result: asyncio.Future[list[Trace]] = self.loop.create_future()
        self._results[wanted.number] = result
        self._samplers[wanted.number] = sampler
        self._send(wanted)
        try:
            traces = await result
        except asyncio.CancelledError:
            self._send(Abandoned(wanted.number))
            raise
        finally:
            del self._results[wanted.number], self._samplers[wanted.number]
        return traces

    def close(self) -> None:
        self.is_over = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if self.loop.is_closed():  # nobody else will wait for it
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._process.pid, 0)
            return
        for turn in self._turns:
            turn.cancel()
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def gone(self) -> None:
        """Wait for the end of the process, after `close`."""
        await self._process.wait()
        await asyncio.gather(self._reader, return_exceptions=True)

    def _send(self, message: msgspec.Struct) -> None:
        if not self.is_over:
            assert self._process.stdin is not None, "made with pipes"
            self._process.stdin.write(_framed(self._out.encode(message)))

    async def _receive(self) -> Any:
        assert self._process.stdout is not None, "made with pipes"
        length = int.from_bytes(await self._process.stdout.readexactly(LENGTH_BYTES), "little")
        return self._in.decode(await self._process.stdout.readexactly(length))

    async def _read(self) -> None:
        try:
            while True:
                message = await self._receive()
                if isinstance(message, TurnWanted):
                    turn = asyncio.create_task(self._give_turn(message))
                    self._turns.add(turn)
                    turn.add_done_callback(self._turns.discard)
                elif isinstance(message, Attempted) and message.number in self._results:
                    _settle(self._results[message.number], message.traces)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.close()
            self._fail(f"its process ended with {await self._process.wait()}")
        except WireError as error:
            self.close()
            self._fail(f"it sent what cannot be read: {error}")

    def _fail(self, reason: str) -> None:
        for result in self._results.values():
            if not result.done():
                result.set_exception(_Ended(reason))

    async def _give_turn(self, wanted: TurnWanted) -> None:
        sampler = self._samplers.get(wanted.number)
        if sampler is None:  # abandoned
            return
        try:
            turn = await sampler.sample(wanted.branch, wanted.tools, wanted.sampling)
            self._send(TurnGiven(wanted.request, turn))
        except Exception as error:  # a sampler may raise and give anything; it is the other side that sorts it
            self._send(TurnRefused(wanted.request, sendable(describe(error))))


def _settle(waiting: asyncio.Future[Settled], value: Settled) -> None:
    """Who was cancelled in the same moment no longer waits."""
    if not waiting.done():
        waiting.set_result(value)


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


# The process in the other Python.


class TurnRefusedError(Exception):
    """The sampler on the other side gave no turn."""


class _RelaySampler:
    """Asks the process that started this one."""

    def __init__(self, guest: "_Guest", number: int) -> None:
        self._guest = guest
        self._number = number

    async def sample(self, branch: Sequence[Node], tools: Sequence[ToolSpec], sampling: SamplingParameters) -> Turn:
        return await self._guest.ask(self._number, list(branch), list(tools), sampling)


class _Guest:
    """Rollouts for the process that started this one."""

    def __init__(self, reader: asyncio.StreamReader, writer: int) -> None:
        self._reader = reader
        self._writer = writer
        self._in, self._out = Wire(*TO_ROLLOUTS), Wire(*FROM_ROLLOUTS)
        self._requests = itertools.count()
        self._turns: dict[int, asyncio.Future[Turn]] = {}
        self._running: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Until the input ends."""
        load = await self._receive()
        try:
            environment = load_environment(load.name, **load.arguments)
        except Exception as error:  # code of an environment may raise anything
            self._send(Raised(type(error).__name__, f"environment {load.name!r}: {error}"))
            return
        self._send(description(environment))
        spare_collector()
        with StallMeter(deadline_seconds=MAX_STALL_SECONDS), contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                self._obey(environment, await self._receive())
        for running in self._running.values():
            running.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def ask(self, number: int, branch: list[Node], tools: list[ToolSpec], sampling: SamplingParameters) -> Turn:
        request = next(self._requests)
        turn: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self._turns[request] = turn
        self._send(TurnWanted(request, number, branch, tools, sampling))
        try:
            return await turn
        finally:
            del self._turns[request]

    def _obey(self, environment: Environment, message: msgspec.Struct) -> None:
        match message:
            case AttemptWanted(number):
                self._running[number] = asyncio.create_task(self._attempt(environment, message))
            case Abandoned(number) if number in self._running:
                self._running[number].cancel()
            case TurnGiven(request, turn) if request in self._turns:
                _settle(self._turns[request], turn)
            case TurnRefused(request, reason) if request in self._turns and not self._turns[request].done():
                self._turns[request].set_exception(TurnRefusedError(reason))

    async def _attempt(self, environment: Environment, wanted: AttemptWanted) -> None:
        try:
            self._send(Attempted(wanted.number, await self._traces(environment, wanted)))
        except Exception as error:  # a fault of ours, or a trace that cannot be sent: whoever waits shall know at once
            failure = Failure(FailureClass.WORKER, "relay", sendable(describe(error)))
            traces = [failed_trace(environment.name, wanted, attempt, failure) for attempt in wanted.attempts]
            self._send(Attempted(wanted.number, traces))
        finally:
            del self._running[wanted.number]

    async def _traces(self, environment: Environment, wanted: AttemptWanted) -> list[Trace]:
        sampler, limits = _RelaySampler(self, wanted.number), msgspec.convert(wanted.limits, Limits)
        task, sampling, seed, group = wanted.task, wanted.sampling, wanted.seed, wanted.group
        if wanted.as_group:
            attempts = wanted.attempts
            return await run_group(environment, task, attempts, sampler, sampling, seed, limits, group=group)
        [attempt] = wanted.attempts
        return [await run_rollout(environment, task, attempt, sampler, sampling, seed, limits, group=group)]

    async def _receive(self) -> Any:
        length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
        return self._in.decode(await self._reader.readexactly(length))

    def _send(self, message: msgspec.Struct) -> None:
        data = memoryview(_framed(self._out.encode(message)))
        while data:  # the other side always reads, so the pipe is free again in a moment
            data = data[os.write(self._writer, data) :]


async def _serve() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    )
    writer = os.dup(sys.stdout.fileno())
    # What an environment prints shall not come between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    await _Guest(reader, writer).serve()


if __name__ == "__main__":
    asyncio.run(_serve())
