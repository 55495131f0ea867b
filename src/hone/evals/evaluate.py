"""Run an environment's held-out tasks against a sampler and score it; an interrupted evaluation goes on."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hone.envs.environment import Environment
from hone.envs.rollout import Limits, run_rollout
from hone.envs.sampler import Sampler
from hone.evals.results import EvalResult, Outcome, outcome_of, summarise
from hone.evals.storage import EvalFolder, Settings
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task
from hone.schema.traces import Trace

DRAWS_PER_TASK = 20
"""Endless sources may repeat a task; after so many times the wanted number of draws we take what was found."""


@dataclass(slots=True)
class Progress:
    """How far an evaluation is."""

    num_total: int
    num_done: int = 0
    num_failed: int = 0
    sum_reward: float = 0.0

    @property
    def mean_reward(self) -> float:
        """Over the rollouts that are done and did not fail."""
        return self.sum_reward / max(1, self.num_done - self.num_failed)

    def count(self, outcome: Outcome) -> None:
        self.num_done += 1
        self.num_failed += outcome.failure is not None
        self.sum_reward += outcome.reward


async def evaluate(
    environment: Environment,
    sampler: Sampler,
    *,
    num_tasks: int,
    attempts: int = 1,
    sampling: SamplingParameters = SamplingParameters(),
    seed: int = 0,
    max_concurrent: int = 256,
    limits: Limits = Limits(),
    folder: Path | None = None,
    model: str = "",
    progress: Callable[[Progress], None] | None = None,
) -> EvalResult:
    """Attempt each of the first `num_tasks` different held-out tasks `attempts` times (all of them if there are fewer).

    folder: where traces, settings and result are kept. An evaluation that was interrupted there goes on: what has a
    trace without a failure is not run again, and more tasks or attempts may be asked for. model: a name for the record.
    progress: called after each rollout.
    """
    if num_tasks < 1 or attempts < 1 or max_concurrent < 1:
        raise ValueError(
            f"num_tasks {num_tasks}, attempts {attempts} and max_concurrent {max_concurrent} must be positive"
        )
    tasks = held_out_tasks(environment, num_tasks)
    settings = Settings(environment.name, environment.version, model, sampling, seed)
    started = time.perf_counter()
    with contextlib.nullcontext() if folder is None else EvalFolder(folder, settings) as files:
        run = _Evaluation(environment, sampler, sampling, seed, limits, files, progress)
        await run.complete(tasks, attempts, max_concurrent)
        result = summarise(
            run.outcomes.values(),
            environment,
            attempts=attempts,
            model=model,
            seconds=time.perf_counter() - started,
        )
        if files is not None:
            files.save_result(result)
    return result


def held_out_tasks(environment: Environment, num_tasks: int) -> list[Task]:
    """The first different held-out tasks."""
    available = environment.num_held_out_tasks
    if available == 0:
        raise ValueError(f"environment {environment.name!r} has no held-out tasks to evaluate on")
    most = DRAWS_PER_TASK * num_tasks if available is None else available
    found: dict[str, Task] = {}
    for index in range(most):
        task = environment.held_out_task(index)
        found.setdefault(task.key, task)
        if len(found) == num_tasks:
            break
    return list(found.values())


@dataclass(slots=True)
class _Evaluation:
    environment: Environment
    sampler: Sampler
    sampling: SamplingParameters
    seed: int
    limits: Limits
    files: EvalFolder | None
    report: Callable[[Progress], None] | None
    outcomes: dict[tuple[str, int], Outcome] = field(default_factory=dict)

    async def complete(self, tasks: list[Task], attempts: int, max_concurrent: int) -> None:
        wanted = {(task.key, attempt): task for task in tasks for attempt in range(attempts)}
        self._recall(wanted)
        progress = Progress(len(wanted))
        for outcome in self.outcomes.values():
            progress.count(outcome)
        missing = iter(
            [(task, attempt) for (key, attempt), task in wanted.items() if (key, attempt) not in self.outcomes]
        )
        async with asyncio.TaskGroup() as running:
            for _ in range(min(max_concurrent, len(wanted))):
                running.create_task(self._work(missing, progress))

    def _recall(self, wanted: dict[tuple[str, int], Task]) -> None:
        """What an earlier run in this folder has done, failures aside."""
        for trace in self.files.traces() if self.files is not None else ():
            if trace.failure is None and (trace.task.key, trace.attempt) in wanted:
                self.outcomes[trace.task.key, trace.attempt] = outcome_of(trace, self.environment)

    async def _work(self, missing: Iterator[tuple[Task, int]], progress: Progress) -> None:
        for task, attempt in missing:
            trace = await self._attempt(task, attempt)
            if self.files is not None:
                self.files.append(trace)
            outcome = self.outcomes[task.key, attempt] = outcome_of(trace, self.environment)
            progress.count(outcome)
            if self.report is not None:
                self.report(progress)

    async def _attempt(self, task: Task, attempt: int) -> Trace:
        return await run_rollout(
            self.environment, task, attempt, self.sampler, self.sampling, self.seed, self.limits, group=task.key
        )
