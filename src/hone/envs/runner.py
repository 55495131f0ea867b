"""Rollout requests carried out as tasks of this event loop: the inside of an env worker, and a run without workers."""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Self

from hone.envs.environment import Environment
from hone.envs.rollout import Limits, run_group, run_rollout
from hone.envs.sampler import Sampler
from hone.schema.rollouts import RolloutRequest, RolloutResult
from hone.schema.traces import Failure, FailureClass, Trace


class RolloutRunner:
    """Starts the rollouts of requests and hands each result over as soon as it is there.

    Example::

        async with RolloutRunner(environments, sampler, results.append) as runner:
            runner.start(request)
            await runner.wait_idle()

    deliver: called in this event loop, once for each attempt that is not cancelled. Where an environment scores groups,
    all attempts of a request are delivered together. Leaving the context cancels what still runs.
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
        self._running: dict[str, dict[int, asyncio.Task[list[Trace]]]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_running = 0

    def start(self, request: RolloutRequest) -> None:
        """Begin the attempts of a request; those that run already go on, so that a repeated request is harmless."""
        environment = self._environments.get(request.environment)
        if environment is not None and environment.scores_groups:
            if request.attempts and request.group not in self._running:
                self._begin(request.group, request.attempts, self._group(environment, request))
            return
        for attempt in request.attempts:
            if attempt not in self._running.get(request.group, {}):
                self._begin(request.group, [attempt], self._attempt(environment, request, attempt))

    def cancel(self, group: str) -> None:
        """Give up a group; nothing more of it is delivered. An unknown group is none of our business."""
        for rollouts in set(self._running.pop(group, {}).values()):
            rollouts.cancel()

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

    def _begin(self, group: str, attempts: list[int], work: Coroutine[Any, Any, list[Trace]]) -> None:
        self.num_running += len(attempts)
        self._idle.clear()
        rollouts = self._tasks.create_task(work)
        self._running.setdefault(group, {}).update(dict.fromkeys(attempts, rollouts))
        rollouts.add_done_callback(functools.partial(self._finish, group, attempts))

    async def _attempt(self, environment: Environment | None, request: RolloutRequest, attempt: int) -> list[Trace]:
        if environment is None:
            return [_unknown_environment(request, attempt, list(self._environments))]
        trace = await run_rollout(
            environment,
            request.task,
            attempt,
            self._sampler,
            request.sampling,
            request.seed,
            self._limits,
            group=request.group,
        )
        return [trace]

    async def _group(self, environment: Environment, request: RolloutRequest) -> list[Trace]:
        return await run_group(
            environment,
            request.task,
            request.attempts,
            self._sampler,
            request.sampling,
            request.seed,
            self._limits,
            group=request.group,
        )

    def _finish(self, group: str, attempts: list[int], rollouts: asyncio.Task[list[Trace]]) -> None:
        self.num_running -= len(attempts)
        if not self.num_running:
            self._idle.set()
        running = self._running.get(group, {})
        if running.get(attempts[0]) is not rollouts:  # given up
            return
        for attempt in attempts:
            del running[attempt]
        if not running:
            del self._running[group]
        if not rollouts.cancelled() and rollouts.exception() is None:
            for trace in rollouts.result():
                self._deliver(RolloutResult(group, trace.attempt, trace))


def _unknown_environment(request: RolloutRequest, attempt: int, known: list[str]) -> Trace:
    message = f"environment {request.environment!r} is not loaded in this process, which has {', '.join(known)}"
    return Trace(
        environment=request.environment,
        task=request.task,
        attempt=attempt,
        group=request.group,
        failure=Failure(FailureClass.ENVIRONMENT, "start", message),
    )
