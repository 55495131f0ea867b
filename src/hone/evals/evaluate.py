"""Run held-out tasks of environments against a sampler and score them; an interrupted evaluation goes on."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hone.envs.attempts import share_out
from hone.envs.environment import Environment
from hone.envs.rollout import Limits, run_group, run_rollout
from hone.envs.sampler import Sampler
from hone.evals.asked import held_out_tasks
from hone.evals.results import MAX_FAILED_SHARE, EvalResult, Outcome, Prices, Usage, outcome_of, summarise
from hone.evals.statistics import Estimate, RunningMean
from hone.evals.storage import EvalFolder, Settings
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, Trace

DEADLINES = ("deadline_seconds", "teardown_seconds")
"""Limits that fail a rollout rather than change its score: another one continues the same evaluation."""


MIN_OUTAGE = 32
"""So many rollouts in a row that the model did not answer, or as many as run at once, are an outage of the model."""


class Pending(StrEnum):
    """Which rollouts an evaluation runs."""

    MISSING = "missing"
    """Those without a record."""
    FAILED = "failed"
    """Those whose record is a failure."""
    BOTH = "both"
    """All without a valid reward."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of one model on one environment.

    arguments: what the environment was loaded with. folder: where traces, settings and result are kept; None keeps
    nothing. model: a name for the record; source: what is behind it.
    """

    environment: Environment
    num_tasks: int
    attempts: int = 1
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    model: str = ""
    source: str = ""
    prices: Prices | None = None
    max_failed_share: float = MAX_FAILED_SHARE

    def __post_init__(self) -> None:
        if self.num_tasks < 1 or self.attempts < 1:
            raise ValueError(f"num_tasks {self.num_tasks} and attempts {self.attempts} must be positive")

    @property
    def settings(self) -> Settings:
        limits = ((limit.name, getattr(self.limits, limit.name)) for limit in fields(self.limits))
        return Settings(
            environment=self.environment.name,
            environment_version=self.environment.version,
            model=self.model,
            sampling=self.sampling,
            seed=self.seed,
            arguments=dict(self.arguments),
            budgets={name: value for name, value in limits if value is not None and name not in DEADLINES},
            source=self.source,
        )


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

    def count(self, outcome: Outcome, times: int = 1) -> None:
        self.num_done += times
        self.num_failed += times * (outcome.failure is not None)
        self.sum_reward += times * outcome.reward


class Cell:
    """One model on one environment: what is asked, what is there, what is still to run. Use as a context.

    Entering reads what an earlier process has left in the plan's folder. Leaving by an error (an interruption, say)
    writes down the outcomes so far.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        tasks = held_out_tasks(plan.environment, plan.num_tasks, plan.environment.name)
        self._wanted = {(task.key, attempt): task for task in tasks for attempt in range(plan.attempts)}
        self._settings = plan.settings
        self._files = None if plan.folder is None else EvalFolder(plan.folder, self._settings)
        self._outcomes: dict[tuple[str, int], Outcome] = {}
        self._rewards = RunningMean()
        self._messages: dict[tuple[str, int], str] = {}
        self._num_groups: Counter[str] = Counter()
        self._began: float | None = None
        self._seconds = 0.0
        self._closing = contextlib.ExitStack()
        self.progress = Progress(len(self._wanted))
        self.usage = Usage()
        self.num_new_tokens = 0

    def __enter__(self) -> Self:
        if self._files is not None:
            self._closing.enter_context(self._files)
            wanted = (t for t in self._files.traces() if (t.task.key, t.attempt) in self._wanted)
            if self.plan.environment.scores_groups:
                self._recall_groups(wanted)
            else:
                for trace in wanted:
                    self._take(trace, self._outcome_of(trace))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._closing:
            if self._files is not None and error is not None:  # interrupted: `conclude` has not saved them
                self._files.save_outcomes(self._outcomes.values())

    def pending(self, which: Pending = Pending.BOTH) -> list[tuple[Task, int]]:
        """The tasks and attempts that are to run, in a fixed order."""
        return [(task, attempt) for (key, attempt), task in self._wanted.items() if self._is_due(key, attempt, which)]

    def units(self, which: Pending = Pending.BOTH) -> list[tuple[Task, list[int]]]:
        """What is pending by what runs together: single attempts, or all of a task where the group is scored."""
        pending = self.pending(which)
        if not self.plan.environment.scores_groups:
            return [(task, [attempt]) for task, attempt in pending]
        tasks = {task.key: task for task, _ in pending}
        return [(task, list(range(self.plan.attempts))) for task in tasks.values()]

    async def run(self, task: Task, attempts: list[int], sampler: Sampler) -> list[Outcome]:
        """Run one of the `units` and keep what became of it."""
        if self.plan.environment.scores_groups:
            return await self._run_group(task, attempts, sampler)
        return [await self.attempt(task, attempt, sampler) for attempt in attempts]

    async def attempt(self, task: Task, attempt: int, sampler: Sampler) -> Outcome:
        """Run one rollout and keep what became of it."""
        plan, began = self.plan, self._begin()
        trace = await run_rollout(
            plan.environment,
            task,
            attempt,
            sampler,
            plan.sampling,
            plan.seed,
            plan.limits,
            group=self._settings.group_of(task),
        )
        self._record(trace)
        outcome = self._take(trace, await self._outcome(trace))
        self._seconds = time.perf_counter() - began
        return outcome

    @property
    def outcomes(self) -> list[Outcome]:
        """One for each attempt that has ended."""
        return list(self._outcomes.values())

    def reward(self) -> Estimate | None:
        """The mean reward so far."""
        return self._rewards.estimate()

    def failure_messages(self) -> list[str]:
        """What was said of each attempt that failed, and did not succeed since."""
        return list(self._messages.values())

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens of this process per second, failed rollouts included."""
        return self.num_new_tokens / self._seconds if self._seconds else 0.0

    @property
    def cost(self) -> float | None:
        """What the tokens so far cost, where prices are known."""
        return None if self.plan.prices is None else self.usage.cost(self.plan.prices)

    def conclude(self) -> EvalResult:
        """The numbers over all outcomes; they are written to the folder."""
        plan = self.plan
        result = summarise(
            self._outcomes.values(),
            environment=plan.environment.name,
            version=plan.environment.version,
            attempts=plan.attempts,
            model=plan.model,
            seconds=self._seconds,
            num_wanted=len(self._wanted),
            max_failed_share=plan.max_failed_share,
            usage=self.usage,
            prices=plan.prices,
        )
        if self._files is not None:
            self._files.save_outcomes(self._outcomes.values())
            self._files.save_result(result)
        return result

    def _is_due(self, key: str, attempt: int, which: Pending) -> bool:
        outcome = self._outcomes.get((key, attempt))
        if outcome is None:
            return which is not Pending.FAILED
        return outcome.failure is not None and which is not Pending.MISSING

    async def _run_group(self, task: Task, attempts: list[int], sampler: Sampler) -> list[Outcome]:
        plan, began = self.plan, self._begin()
        # A name for each time that the group runs: traces of different times must not be mixed when they are read again.
        group = f"{self._settings.group_of(task)}-{self._num_groups[task.key]}"
        self._num_groups[task.key] += 1
        traces = await run_group(
            plan.environment, task, attempts, sampler, plan.sampling, plan.seed, plan.limits, group=group
        )
        for trace in traces:
            self._record(trace)
        outcomes = self._take_group(traces, [await self._outcome(trace) for trace in traces])
        self._seconds = time.perf_counter() - began
        return outcomes

    def _begin(self) -> float:
        if self._began is None:
            self._began = time.perf_counter()
        return self._began

    def _record(self, trace: Trace) -> None:
        if self._files is not None:
            self._files.append(trace)
        self.num_new_tokens += trace.num_completion_tokens

    def _recall_groups(self, traces: Iterable[Trace]) -> None:
        groups: dict[tuple[str, str], list[Trace]] = {}
        for trace in traces:
            groups.setdefault((trace.task.key, trace.group), []).append(trace)
        for (key, _), group in groups.items():
            self._num_groups[key] += 1
            if len(group) == self.plan.attempts:  # one whose end is missing runs again
                self._take_group(group, [self._outcome_of(trace) for trace in group])

    def _outcome_of(self, trace: Trace) -> Outcome:
        return outcome_of(trace, self.plan.environment.is_solved)

    async def _outcome(self, trace: Trace) -> Outcome:
        if self.plan.environment.elsewhere is None:
            return self._outcome_of(trace)
        # What is solved is asked of another process, which may be slow or gone.
        return await asyncio.to_thread(self._outcome_of, trace)

    def _take_group(self, traces: list[Trace], outcomes: list[Outcome]) -> list[Outcome]:
        """Keep a group as a whole, if it has as many valid rollouts as what is there: rewards of two do not mix."""
        keys = [(trace.task.key, trace.attempt) for trace in traces]
        before = [self._outcomes[key] for key in keys if key in self._outcomes]
        if sum(trace.failure is None for trace in traces) < sum(outcome.failure is None for outcome in before):
            for trace in traces:
                self.usage.add(trace)
            return outcomes
        for key in keys:
            self._forget(key)
        return [self._take(trace, outcome) for trace, outcome in zip(traces, outcomes, strict=True)]

    def _take(self, trace: Trace, outcome: Outcome) -> Outcome:
        self.usage.add(trace)
        key = outcome.task, outcome.attempt
        if outcome.failure is not None and key in self._outcomes and self._outcomes[key].failure is None:
            return outcome  # a failure is never kept instead of a valid one
        self._forget(key)
        self._outcomes[key] = outcome
        self.progress.count(outcome)
        if outcome.failure is None:
            self._rewards.add(outcome.task, outcome.reward)
        elif trace.failure is not None:
            self._messages[key] = f"{trace.failure.kind}: {trace.failure.where}: {trace.failure.message}"
        return outcome

    def _forget(self, key: tuple[str, int]) -> None:
        outcome = self._outcomes.pop(key, None)
        if outcome is None:
            return
        self.progress.count(outcome, -1)
        self._messages.pop(key, None)
        if outcome.failure is None:
            self._rewards.remove(outcome.task, outcome.reward)


async def complete(
    cells: Sequence[Cell],
    sampler: Sampler,
    *,
    max_concurrent: int,
    pending: Pending = Pending.BOTH,
    progress: Callable[[Cell], None] | None = None,
) -> None:
    """Run what is pending in the cells of one model, a bounded number at once: the cells in turn, without a pause between.

    During an outage of the model nothing more begins: what has not run stays missing, instead of failing one by one.
    """
    work = [(cell, task, attempts) for cell in cells for task, attempts in cell.units(pending)]
    remaining = _Remaining(iter(work), max(MIN_OUTAGE, max_concurrent))

    async def run(unit: tuple[Cell, Task, list[int]]) -> None:
        cell, task, attempts = unit
        for outcome in await cell.run(task, attempts, sampler):
            remaining.note(outcome)
        if progress is not None:
            progress(cell)

    sizes = [len(attempts) for _, _, attempts in work]
    await share_out(remaining, run, sizes=sizes, max_concurrent=max_concurrent)


@dataclass(slots=True)
class _Remaining:
    """What has not begun, until `outage` rollouts in a row were not answered."""

    work: Iterator[tuple[Cell, Task, list[int]]]
    outage: int
    num_unanswered: int = 0

    def __iter__(self) -> Iterator[tuple[Cell, Task, list[int]]]:
        while self.num_unanswered < self.outage and (following := next(self.work, None)) is not None:
            yield following

    def note(self, outcome: Outcome) -> None:
        self.num_unanswered = self.num_unanswered + 1 if outcome.failure is FailureClass.MODEL else 0


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
    pending: Pending = Pending.BOTH,
    progress: Callable[[Progress], None] | None = None,
) -> EvalResult:
    """Attempt each of the first `num_tasks` different held-out tasks `attempts` times (all of them if there are fewer).

    folder: where traces, settings and result are kept. An evaluation that was interrupted there goes on: what has a
    trace without a failure is not run again, and more tasks or attempts may be asked for. model: a name for the record.
    progress: called after each rollout.
    """
    plan = Plan(environment, num_tasks, attempts, sampling, seed, limits, folder=folder, model=model)
    with Cell(plan) as cell:
        report = None if progress is None else lambda cell: progress(cell.progress)
        await complete([cell], sampler, max_concurrent=max_concurrent, pending=pending, progress=report)
        return cell.conclude()
