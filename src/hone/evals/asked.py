"""What an evaluation asks: the first different held-out tasks, and how they are sampled, from the configuration."""

from dataclasses import dataclass
from typing import Protocol

from hone.config.recipe import SamplingSection
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task

DRAWS_PER_TASK = 20
"""Endless sources may repeat a task; after so many times the wanted number of draws we take what was found."""


class HeldOut(Protocol):
    """What the choice of tasks needs of an environment."""

    @property
    def num_held_out_tasks(self) -> int | None: ...

    def held_out_task(self, index: int) -> Task: ...


@dataclass(frozen=True, slots=True)
class HeldOutTasks:
    """Different tasks by their place in the split, and what the environment raised instead of others."""

    tasks: dict[int, Task]
    errors: dict[int, str]


def draw_held_out(environment: HeldOut, num_tasks: int) -> HeldOutTasks:
    """The first `num_tasks` different held-out tasks, or all if there are fewer; a place that raises is one of them."""
    available = environment.num_held_out_tasks
    most = DRAWS_PER_TASK * num_tasks if available is None else available
    tasks: dict[int, Task] = {}
    errors: dict[int, str] = {}
    seen: set[str] = set()
    for index in range(most):
        if len(tasks) + len(errors) == num_tasks:
            break
        try:
            task = environment.held_out_task(index)
        except Exception as error:  # code of an environment may raise anything
            errors[index] = repr(error)
            continue
        if task.key not in seen:
            seen.add(task.key)
            tasks[index] = task
    return HeldOutTasks(tasks, errors)


def held_out_tasks(environment: HeldOut, num_tasks: int, name: str) -> list[Task]:
    """The same where nothing may be missing: `ValueError` when the environment raises, or has no held-out tasks."""
    found = draw_held_out(environment, num_tasks)
    for index, error in found.errors.items():
        raise ValueError(f"environment {name!r} gives no held-out task {index}: {error}; correct its source of tasks")
    if not found.tasks:
        raise ValueError(f"environment {name!r} has no held-out tasks to evaluate on")
    return list(found.tasks.values())


def sampling_parameters(section: SamplingSection) -> SamplingParameters:
    """A section of the configuration as an engine takes it; the seeds of turns are derived by the rollout."""
    return SamplingParameters(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        max_tokens=section.max_tokens,
    )
