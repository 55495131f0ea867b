"""Which task comes next: environments by weight, tasks in an order derived from the seed; resumable from counts alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from hone.config.load import ConfigError
from hone.envs.permutation import permuted
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task


class TaskList(Protocol):
    """What the mixture needs of an environment."""

    @property
    def num_train_tasks(self) -> int | None: ...

    def train_task(self, index: int) -> Task: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """The `number`-th task (from 0) that the mixture takes from `environment`."""

    environment: str
    number: int


class Mixture:
    """Draws environments so that after n draws each has its share of n to within less than one task.

    The next draw depends on the counts so far and on nothing else, so a resumed run hands its counts back and goes on
    where the interrupted one stopped. Draw k of an environment is the same task in every process; every task comes
    once before any comes again.
    """

    def __init__(self, weights: Mapping[str, float], tasks: Mapping[str, TaskList], seed: int) -> None:
        empty = [name for name in weights if tasks[name].num_train_tasks == 0]
        if empty:
            raise ConfigError(
                f"environment {empty[0]!r} has no train tasks; give it data, or remove it from the recipe"
            )
        total = sum(weights.values())
        self._shares = {name: weight / total for name, weight in weights.items()}
        self._tasks = tasks
        self._seed = seed
        self._counts = dict.fromkeys(weights, 0)

    def restore(self, counts: Mapping[str, int]) -> None:
        """Go on after this many draws of each environment."""
        unknown = counts.keys() - self._counts.keys()
        if unknown:
            raise ConfigError(f"the ledger has tasks of environment {min(unknown)!r}, which the recipe does not list")
        self._counts |= counts

    def draw(self) -> Draw:
        # The quota method of Balinski and Young: who has not yet its share rounded up, and needs the next seat most.
        num_draws = sum(self._counts.values()) + 1
        eligible = [name for name, share in self._shares.items() if self._counts[name] < share * num_draws]
        name = max(eligible, key=lambda name: self._shares[name] / (self._counts[name] + 1))
        self._counts[name] += 1
        return Draw(name, self._counts[name] - 1)

    def task(self, draw: Draw) -> Task:
        tasks = self._tasks[draw.environment]
        count = tasks.num_train_tasks
        if count is None:
            return tasks.train_task(draw.number)
        epoch, position = divmod(draw.number, count)
        return tasks.train_task(permuted(position, count, derive_seed(self._seed, "tasks", draw.environment, epoch)))
