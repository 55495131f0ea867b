"""Which task comes next: environments by weight, tasks in an order derived from the seed; resumable from the ledger."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from hone.config.load import ConfigError
from hone.envs.permutation import permuted
from hone.orchestrator.curriculum import Curriculum
from hone.orchestrator.quotas import Quotas
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task


class TaskList(Protocol):
    """What the mixture needs of an environment."""

    @property
    def num_train_tasks(self) -> int | None: ...

    def train_task(self, index: int) -> Task: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """The `number`-th task (from 0) that the mixture takes from `environment`: its train task at `index`."""

    environment: str
    number: int
    index: int


class Mixture:
    """Draws environments by exact quotas (`Quotas`), and of each the next task.

    The next environment depends on the counts so far and on nothing else. Draw k of an environment without a curriculum
    is the same task in every process, and every task comes once before any comes again; a curriculum chooses by what it
    was told. A resumed run hands back what the ledger remembers and goes on where the interrupted one stopped.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        tasks: Mapping[str, TaskList],
        seed: int,
        curricula: Mapping[str, Curriculum] | None = None,
    ) -> None:
        empty = [name for name in weights if _count(name, tasks[name]) == 0]
        if empty:
            raise ConfigError(
                f"environment {empty[0]!r} has no train tasks; give it data, or remove it from the recipe"
            )
        self.curricula = dict(curricula or {})
        self._quotas = Quotas(weights)
        self._tasks = tasks
        self._seed = seed

    def restore(self, counts: Mapping[str, int]) -> None:
        """Go on after this many draws of each environment; its curriculum is restored by itself."""
        unknown = counts.keys() - self._quotas.counts.keys()
        if unknown:
            raise ConfigError(f"the ledger has tasks of environment {min(unknown)!r}, which the recipe does not list")
        self._quotas.restore(counts)

    def draw(self) -> Draw:
        name = self._quotas.take()
        number = self._quotas.counts[name] - 1
        curriculum = self.curricula.get(name)
        return Draw(name, number, self._index(name, number) if curriculum is None else curriculum.draw())

    def task(self, draw: Draw) -> Task:
        return self._tasks[draw.environment].train_task(draw.index)

    def _index(self, name: str, number: int) -> int:
        count = self._tasks[name].num_train_tasks
        if count is None:
            return number
        epoch, position = divmod(number, count)
        return permuted(position, count, derive_seed(self._seed, "tasks", name, epoch))


def _count(name: str, tasks: TaskList) -> int | None:
    try:
        return tasks.num_train_tasks
    except Exception as error:  # a source that is opened now, by code of an environment that may raise anything
        raise ConfigError(f"environment {name!r} cannot count its train tasks: {error}") from error
