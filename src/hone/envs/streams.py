"""Tasks from generators and streams, by index, without keeping them in memory."""

import errno
import io
import itertools
import os
import tempfile
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import msgspec

from hone.envs.sources import Tasks, TaskSourceError
from hone.schema.tasks import Task


def generated(generate: Callable[[], Iterable[Task]]) -> Tasks:
    """The tasks of a generator that ends.

    Example::

        generated(lambda: (task for chapter in book() for task in exercises(chapter)))

    It is run once in each process, and must give the same tasks each time. What it gives is written to an unnamed
    temporary file, from where any task is read at once; in memory it takes 8 bytes a task.
    """
    spill = _Spill(generate)
    return Tasks(spill.task, spill.count)


def endless(begin: Callable[[int], Iterable[Task]], *, window: int = 1024) -> Tasks:
    """The tasks of a stream: `begin(start)` gives them from number `start` on, the same in every process.

    Example::

        endless(lambda start: (question(number) for number in itertools.count(start)))

    Reading on costs one step of the stream; going back further than `window` tasks, or ahead by more, costs another
    `begin`. So a run that resumes at task 100,000 pays what `begin(100_000)` costs: a stream that cannot jump goes
    there step by step (`itertools.islice(generate(), start, None)`). A stream that ends begins anew.
    """
    if window < 1:
        raise ValueError(f"window {window} keeps no task; use 1 or more")
    return Tasks(_Stream(begin, window).task)


class _Spill:
    """What a generator has given so far, encoded in a file that has no name and goes with this object."""

    def __init__(self, generate: Callable[[], Iterable[Task]]) -> None:
        self._generate = generate
        self._iterator: Iterator[Task] | None = None
        self._file: io.FileIO | None = None
        self._offsets = array("q", [0])
        self._is_complete = False

    def task(self, index: int) -> Task:
        while len(self._offsets) - 1 <= index:
            if not self._write_next():
                raise IndexError(f"task {index} of {len(self._offsets) - 1} tasks")
        start, end = self._offsets[index], self._offsets[index + 1]
        return _decoder.decode(os.pread(self._opened().fileno(), end - start, start))

    def count(self) -> int:
        while self._write_next():
            pass
        return len(self._offsets) - 1

    def _write_next(self) -> bool:
        if self._is_complete:
            return False
        if self._iterator is None:
            self._iterator = itertools.islice(self._generate(), len(self._offsets) - 1, None)
        try:
            task = next(self._iterator, None)
            if task is not None:
                self._write(_checked(task, len(self._offsets) - 1))
        except BaseException:  # a cancellation too: undo, then pass it on
            self._iterator = None  # one that has raised seems to be at its end, and a task not written would be missing
            raise
        self._is_complete = task is None
        return not self._is_complete

    def _write(self, task: Task) -> None:
        data, start = msgspec.msgpack.encode(task), self._offsets[-1]
        if os.pwrite(self._opened().fileno(), data, start) < len(data):
            raise OSError(errno.ENOSPC, "no space for the tasks of a generator", tempfile.gettempdir())
        self._offsets.append(start + len(data))

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with this object
            weakref.finalize(self, self._file.close)
        return self._file


_decoder = msgspec.msgpack.Decoder(Task)


class _Stream:
    """A stream under way, with the last tasks that it gave."""

    def __init__(self, begin: Callable[[int], Iterable[Task]], window: int) -> None:
        self._begin = begin
        self._window = window
        self._recent: deque[Task] = deque(maxlen=window)
        self._iterator: Iterator[Task] | None = None
        self._next = 0
        self._length: int | None = None

    def task(self, index: int) -> Task:
        if self._length is not None:
            index %= self._length
        if not self._next - len(self._recent) <= index < self._next + self._window:
            self._restart(index)
        while self._next <= index:
            if not self._read_next():
                self._length = self._measured()
                return self.task(index)
        return self._recent[index - self._next]

    def _restart(self, start: int) -> None:
        self._recent.clear()
        self._next = start
        self._iterator = None

    def _read_next(self) -> bool:
        if self._iterator is None:
            self._iterator = iter(self._begin(self._next))
        try:
            task = next(self._iterator, None)
            if task is not None:
                self._recent.append(_checked(task, self._next))
                self._next += 1
        except BaseException:  # a cancellation too: undo, then pass it on
            self._iterator = None  # one that has raised seems to be at its end
            raise
        return task is not None

    def _measured(self) -> int:
        """The length of a stream that has ended: where it did, or counted when it was begun behind its end."""
        length = self._next if self._recent else sum(1 for _ in self._begin(0))
        if not length:
            raise TaskSourceError("a stream gives no task at all; begin(0) must give at least one")
        return length


def _checked(task: object, index: int) -> Task:
    if not isinstance(task, Task):
        raise TaskSourceError(f"task {index} of a stream is {type(task).__name__}, not a Task")
    return task
