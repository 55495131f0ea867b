"""Many rollouts, a bounded number at once: what an evaluation, a validation and a synthesis have in common."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from hone.envs.environment import Environment
from hone.envs.rollout import Limits, run_group, run_rollout
from hone.envs.sampler import Sampler
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task
from hone.schema.traces import Trace

T = TypeVar("T")


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

    async def carry_out(assignment: Assignment) -> None:
        for trace in await _traces(assignment, sampler_for(assignment), sampling, seed, limits):
            deliver(trace)

    sizes = [len(assignment.attempts) for assignment in assignments]
    await share_out(iter(assignments), carry_out, sizes=sizes, max_concurrent=max_concurrent)


async def share_out(
    pieces: Iterable[T], carry_out: Callable[[T], Awaitable[None]], *, sizes: Sequence[int], max_concurrent: int
) -> None:
    """Carry out pieces of work in their order, several at once. What one raises, or a cancellation, ends all.

    pieces: asked for one by one, by whoever is free; iterating over it twice goes on. sizes: the rollouts of each piece.
    max_concurrent: most rollouts under way, or one piece where that has more.
    """
    if max_concurrent < 1:
        raise ValueError(f"max_concurrent {max_concurrent} must be positive")

    async def work() -> None:
        for piece in pieces:
            await carry_out(piece)

    async with asyncio.TaskGroup() as workers:
        for _ in range(max(1, min(max_concurrent // max(sizes, default=1), len(sizes)))):
            workers.create_task(work())


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
