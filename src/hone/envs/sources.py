"""Where tasks come from: indexable, counted or endless, split into train and held-out by the hash of their content."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks made on demand. `make(index)` gives the same task in every process; count None means endless.

    Example::

        Tasks(lambda index: Task(prompt=(user(questions[index]),), reference=answers[index]), count=len(questions))
    """

    make: Callable[[int], Task]
    count: int | None = None

    def __getitem__(self, index: int) -> Task:
        if index < 0 or (self.count is not None and index >= self.count):
            raise IndexError(f"task {index} of {'endless' if self.count is None else self.count} tasks")
        return self.make(index)


def tasks_from(tasks: Sequence[Task] | Tasks) -> Tasks:
    """A source of the tasks in a sequence; a source is returned as it is."""
    return tasks if isinstance(tasks, Tasks) else Tasks(tasks.__getitem__, len(tasks))


def is_held_out(content: str, share: float) -> bool:
    """Whether a task with this content belongs to the held-out split, which gets about `share` of all contents.

    It depends on the content alone, so a task is never on both sides, whatever else the environment contains.
    """
    return derive_seed(0, "held out", content) < share * 2**63
