"""Where tasks come from: indexable, counted or endless, and the views that select, order, split and join them."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hone.envs.permutation import permuted
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task

MAX_MISSES = 1_000_000
"""So many tasks of an endless source in a row may fail a filter before it is taken for one that nothing passes."""

Count = int | None | Callable[[], int | None]
"""How many tasks there are, None for endless, or a function that finds out."""


class TaskSourceError(ValueError):
    """A source that does not give a task; the message names the place (file, line or row, field) and what to do."""


class Tasks:
    """Tasks made on demand. `make(index)` gives the same task in every process; count None means endless.

    Example::

        Tasks(lambda index: Task(prompt=(user(questions[index]),), reference=answers[index]), count=len(questions))

    count: a function, called once when the number is first wanted, where it costs something to find out.

    The methods make views: they hold no task and touch the source only when a task, or a count, is asked for.
    """

    __slots__ = ("_count", "_is_counted", "make")

    def __init__(self, make: Callable[[int], Task], count: Count = None) -> None:
        self.make = make
        self._count = count
        self._is_counted = not callable(count)

    @property
    def count(self) -> int | None:
        """How many tasks there are; None: endless."""
        if not self._is_counted and callable(self._count):
            self._count = self._count()
            self._is_counted = True
        assert not callable(self._count), "counted above"
        return self._count

    def __getitem__(self, index: int) -> Task:
        count = self.count
        if index < 0 or (count is not None and index >= count):
            raise IndexError(f"task {index} of {'endless' if count is None else count} tasks")
        return self.make(index)

    def __iter__(self) -> Iterator[Task]:
        """In the order of the source; endless where the source is."""
        index = 0
        while self.count is None or index < self.count:
            yield self.make(index)
            index += 1

    def take(self, limit: int) -> "Tasks":
        """The first `limit` tasks, or all when there are fewer."""
        if limit < 0:
            raise ValueError(f"take({limit}): a number of tasks is 0 or more")
        return Tasks(self.make, lambda: limit if self.count is None else min(limit, self.count))

    def subset(self, indices: Sequence[int]) -> "Tasks":
        """The tasks at these indices, in this order."""
        return Tasks(lambda index: self[indices[index]], len(indices))

    def where(self, keep: Callable[[Task], bool]) -> "Tasks":
        """The tasks that pass, in the order of the source.

        The source is gone through once, as far as it is needed (to its end, where it has one), at 8 bytes a task kept.
        """
        return _Pass(self, keep, sides=(True,)).view(True)

    def map(self, change: Callable[[Task], Task]) -> "Tasks":
        """Each task changed, for example its prompt; the change must depend on the task alone."""
        return Tasks(lambda index: change(self.make(index)), lambda: self.count)

    def shuffled(self, seed: int) -> "Tasks":
        """All tasks in the order that `seed` selects, which takes no memory. Endless tasks have no such order."""

        def make(index: int) -> Task:
            return self.make(permuted(index, self._finite("shuffled"), derive_seed(seed, "shuffle")))

        return Tasks(make, lambda: self._finite("shuffled"))

    def repeated(self, seed: int) -> "Tasks":
        """The tasks again and again, endlessly: every task once in each epoch, each epoch in another order."""

        def make(index: int) -> Task:
            count = self._finite("repeated")
            if count == 0:
                raise TaskSourceError("there is no task to repeat")
            epoch, position = divmod(index, count)
            return self.make(permuted(position, count, derive_seed(seed, "shuffle", epoch)))

        return Tasks(make)

    def split(self, held_out_share: float, by: Callable[[Task], str] = lambda task: task.key) -> "Split":
        """Two parts of which the second gets about `held_out_share` of the tasks, decided by `is_held_out`.

        by: the content that decides, where tasks that differ elsewhere shall not be torn apart. The source is gone
        through once for both, as for `where`.
        """
        if not 0 <= held_out_share <= 1:
            raise ValueError(f"held_out_share {held_out_share} is not between 0 and 1")
        both = _Pass(self, lambda task: is_held_out(by(task), held_out_share), sides=(False, True))
        return Split(train=both.view(False), held_out=both.view(True))

    def duplicates(self) -> "list[Duplicate]":
        """The tasks whose content occurs more than once, in the order of their first occurrence."""
        places: dict[str, list[int]] = {}
        for index in range(self._finite("searched for duplicates")):
            places.setdefault(self.make(index).key, []).append(index)
        return [Duplicate(key, tuple(found)) for key, found in places.items() if len(found) > 1]

    def unique(self) -> "Tasks":
        """The first of all tasks with equal content."""
        seen: set[str] = set()

        def is_new(task: Task) -> bool:
            self._finite("searched for duplicates")
            if task.key in seen:
                return False
            seen.add(task.key)
            return True

        return self.where(is_new)

    def _finite(self, what: str) -> int:
        if self.count is None:
            raise ValueError(f"endless tasks cannot be {what}; cut them with take(limit) first")
        return self.count


class Split(NamedTuple):
    """The two sides of a split; no content is on both."""

    train: Tasks
    held_out: Tasks


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Tasks of one source with the same content, by their indices."""

    key: str
    indices: tuple[int, ...]


def concatenated(*sources: Sequence[Task] | Tasks) -> Tasks:
    """All tasks of the first source, then those of the next. Only the last one may be endless."""
    parts = [tasks_from(source) for source in sources]

    def make(index: int) -> Task:
        for number, part in enumerate(parts):
            count = part.count
            if count is None and number < len(parts) - 1:
                raise ValueError(f"source {number} of {len(parts)} is endless, so the next would never come")
            if count is None or index < count:
                return part.make(index)
            index -= count
        raise IndexError(f"task {index} beyond the end")

    def count() -> int | None:
        counts = [part.count for part in parts]
        return None if None in counts else sum(found for found in counts if found is not None)

    return Tasks(make, count)


def tasks_from(tasks: Sequence[Task] | Tasks) -> Tasks:
    """A source of the tasks in a sequence; a source is returned as it is."""
    return tasks if isinstance(tasks, Tasks) else Tasks(tasks.__getitem__, len(tasks))


def is_held_out(content: str, share: float) -> bool:
    """Whether a task with this content belongs to the held-out split, which gets about `share` of all contents.

    It depends on the content alone, so a task is never on both sides, whatever else the environment contains.
    """
    return derive_seed(0, "held out", content) < share * 2**63


class _Pass:
    """Where the tasks are of which a claim is true, or false, found by going through the source once."""

    __slots__ = ("_claim", "_next", "_places", "_source")

    def __init__(self, source: Tasks, claim: Callable[[Task], bool], sides: Sequence[bool]) -> None:
        self._source = source
        self._claim = claim
        self._places = {side: array("q") for side in sides}
        self._next = 0

    def view(self, side: bool) -> Tasks:
        return Tasks(lambda index: self._source.make(self._place(side, index)), lambda: self._count(side))

    def _place(self, side: bool, number: int) -> int:
        """The index in the source of the `number`-th task on this side."""
        places, misses = self._places[side], 0
        while len(places) <= number:
            misses = 0 if self._look() is side else misses + 1
            if misses > MAX_MISSES:
                raise TaskSourceError(f"{misses:,} endless tasks in a row do not pass the filter; correct it")
        return places[number]

    def _count(self, side: bool) -> int | None:
        total = self._source.count
        if total is None:
            return None
        while self._next < total:
            self._look()
        return len(self._places[side])

    def _look(self) -> bool:
        """On which side the next task of the source is."""
        side = bool(self._claim(self._source[self._next]))
        if side in self._places:
            self._places[side].append(self._next)
        self._next += 1
        return side
