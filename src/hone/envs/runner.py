"""Rollout requests carried out as tasks of this event loop: the inside of an env worker, and a run without workers."""

import asyncio
import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from hone.envs.environment import Environment
from hone.envs.rollout import Limits, run_rollout
from hone.envs.sampler import Sampler
from hone.schema.rollouts import RolloutRequest, RolloutResult
from hone.schema.traces import Failure, FailureClass, Trace


class RolloutRunner:
    """Starts the rollouts of requests and hands each result over as soon as it is there.

    Example::

        async with RolloutRunner(environments, sampler, results.append) as runner:
            runner.start(request)
            await runner.wait_idle()

    deliver: called in this event loop, once for each attempt that is not cancelled. Leaving the context cancels what
    still runs.
    """

    def __init__(
        self,
        environments: Mapping[str, Environment],
        sampler: Sampler,
        deliver: Callable[[RolloutResult], None],
        limits: Limits = Limits(),
    ) -> None:
        self._environments = environments
        self._sampler = sampler
        self._deliver = deliver
        self._limits = limits
        self._tasks = asyncio.TaskGroup()
        self._running: dict[str, dict[int, asyncio.Task[Trace]]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_running = 0

    def start(self, request: RolloutRequest) -> None:
        """Begin the attempts of a request; those that run already go on, so that a repeated request is harmless."""
        group = self._running.setdefault(request.group, {})
        for attempt in request.attempts:
            if attempt not in group:
                self.num_running += 1
                self._idle.clear()
                group[attempt] = rollout = self._tasks.create_task(self._attempt(request, attempt))
                rollout.add_done_callback(functools.partial(self._finish, request.group, attempt))

    def cancel(self, group: str) -> None:
        """Give up a group; nothing more of it is delivered. An unknown group is none of our business."""
        for rollout in self._running.pop(group, {}).values():
            rollout.cancel()

    def cancel_all(self) -> None:
        """Give up everything under way."""
        for group in list(self._running):
            self.cancel(group)

    async def wait_idle(self) -> None:
        """Wait until nothing is under way; the deadline of each rollout bounds it."""
        await self._idle.wait()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel_all()
        await self._tasks.__aexit__(kind, error, trace)

    async def _attempt(self, request: RolloutRequest, attempt: int) -> Trace:
        environment = self._environments.get(request.environment)
        if environment is None:
            return _unknown_environment(request, attempt, list(self._environments))
        return await run_rollout(
            environment,
            request.task,
            attempt,
            self._sampler,
            request.sampling,
            request.seed,
            self._limits,
            group=request.group,
        )

    def _finish(self, group: str, attempt: int, rollout: asyncio.Task[Trace]) -> None:
        self.num_running -= 1
        if not self.num_running:
            self._idle.set()
        attempts = self._running.get(group, {})
        if attempts.get(attempt) is not rollout:  # given up
            return
        del attempts[attempt]
        if not attempts:
            del self._running[group]
        if not rollout.cancelled() and rollout.exception() is None:
            self._deliver(RolloutResult(group, attempt, rollout.result()))


def _unknown_environment(request: RolloutRequest, attempt: int, known: list[str]) -> Trace:
    message = f"environment {request.environment!r} is not loaded in this process, which has {', '.join(known)}"
    return Trace(
        environment=request.environment,
        task=request.task,
        attempt=attempt,
        group=request.group,
        failure=Failure(FailureClass.ENVIRONMENT, "start", message),
    )
