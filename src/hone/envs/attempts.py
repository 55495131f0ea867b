"""Many rollouts, a bounded number at once: what an evaluation, a validation and a synthesis have in common."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from hone.envs.environment import Environment
from hone.envs.rollout import Limits, run_group, run_rollout
from hone.envs.sampler import Sampler
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task
from hone.schema.traces import Trace


class Assignment(NamedTuple):
    """One task to attempt, and the numbers of the attempts; those of one assignment are scored as a group."""

    environment: Environment
    task: Task
    attempts: tuple[int, ...]


def assign(environment: Environment, task: Task, attempts: Sequence[int]) -> list[Assignment]:
    """One assignment for each attempt, or one for all where the environment compares the rollouts of a group."""
    if environment.scores_groups:
        return [Assignment(environment, task, tuple(attempts))]
    return [Assignment(environment, task, (attempt,)) for attempt in attempts]


async def run_assignments(
    assignments: Sequence[Assignment],
    sampler_for: Callable[[Assignment], Sampler],
    sampling: SamplingParameters,
    seed: int,
    *,
    max_concurrent: int,
    deliver: Callable[[Trace], None],
    limits: Limits = Limits(),
) -> None:
    """Carry out the assignments in their order; each trace is delivered in this event loop as soon as it has its rewards.

    max_concurrent: most rollouts under way, or one assignment where that has more. What `deliver` raises ends
    everything, as does a cancellation; the rollouts under way are cancelled then.
    """
    if max_concurrent < 1:
        raise ValueError(f"max_concurrent {max_concurrent} must be positive")
    largest = max((len(assignment.attempts) for assignment in assignments), default=1)
    waiting = iter(assignments)

    async def work(waiting: Iterator[Assignment]) -> None:
        for assignment in waiting:
            for trace in await _traces(assignment, sampler_for(assignment), sampling, seed, limits):
                deliver(trace)

    async with asyncio.TaskGroup() as workers:
        for _ in range(max(1, min(max_concurrent // largest, len(assignments)))):
            workers.create_task(work(waiting))


async def _traces(
    assignment: Assignment, sampler: Sampler, sampling: SamplingParameters, seed: int, limits: Limits
) -> list[Trace]:
    environment, task, attempts = assignment
    if environment.scores_groups:
        return await run_group(environment, task, attempts, sampler, sampling, seed, limits, group=task.key)
    return [
        await run_rollout(environment, task, attempt, sampler, sampling, seed, limits, group=task.key)
        for attempt in attempts
    ]
