"""Many rollouts, a bounded number at once: what an evaluation, a validation and a synthesis have in common."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from hone.envs.environment import Environment
from hone.envs.rollout import Limits, run_rollout
from hone.envs.sampler import Sampler
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task
from hone.schema.traces import Trace


class Attempt(NamedTuple):
    """One rollout that is wanted."""

    environment: Environment
    task: Task
    number: int


async def run_attempts(
    attempts: Iterable[Attempt],
    sampler_for: Callable[[Attempt], Sampler],
    sampling: SamplingParameters,
    seed: int,
    *,
    max_concurrent: int,
    deliver: Callable[[Trace], None],
    limits: Limits = Limits(),
) -> None:
    """Carry out the attempts in their order; each trace is delivered in this event loop as soon as it is there.

    What `deliver` raises ends everything, as does a cancellation; the rollouts under way are cancelled then.
    """
    if max_concurrent < 1:
        raise ValueError(f"max_concurrent {max_concurrent} must be positive")
    waiting = iter(attempts)

    async def work(waiting: Iterator[Attempt]) -> None:
        for attempt in waiting:
            sampler = sampler_for(attempt)
            environment, task, number = attempt
            deliver(await run_rollout(environment, task, number, sampler, sampling, seed, limits, group=task.key))

    async with asyncio.TaskGroup() as workers:
        for _ in range(max_concurrent):
            workers.create_task(work(waiting))
