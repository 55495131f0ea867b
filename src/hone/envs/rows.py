"""Tasks from the rows of JSONL and parquet files and of Hugging Face data sets, read where they lie, one at a time."""

import json
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from hone.envs.failures import describe
from hone.envs.messages import system, user
from hone.envs.sources import Tasks, TaskSourceError
from hone.envs.streams import endless
from hone.schema.messages import Message
from hone.schema.tasks import Task

CACHE_BYTES = 256 * 2**20
"""Decoded row groups of a parquet file that are kept, at most; one is always kept."""


class Row(dict[str, Any]):
    """The fields of a row; a field that is missing or no text is an error that names the place."""

    def __init__(self, fields: dict[str, Any], find_place: Callable[[], str]) -> None:
        super().__init__(fields)
        self._find_place = find_place

    @property
    def place(self) -> str:
        """File and line, or data set and row; found out when somebody asks."""
        return self._find_place()

    def __missing__(self, field: str) -> Any:
        raise TaskSourceError(f"{self.place}: no field {field!r}; it has {', '.join(self) or 'none'}")

    def text(self, field: str) -> str:
        """A field that must be text."""
        value = self[field]
        if not isinstance(value, str):
            raise TaskSourceError(f"{self.place}: field {field!r} is {type(value).__name__}, not text")
        return value


TaskOf = Callable[[Row], Task]
"""Makes a task of a row; `columns` gives the usual ones."""


def columns(
    prompt: str, reference: str | None = None, *, instructions: str | None = None, info: Sequence[str] = ()
) -> TaskOf:
    """The usual way from a row to a task, by the names of fields.

    prompt: text, which the user says, or a list of messages in the shape of the OpenAI API. reference: text or a
    number. instructions: a system message before the prompt. info: fields that go into the task's info.
    """

    def task_of(row: Row) -> Task:
        first = () if instructions is None else (system(instructions),)
        answer = None if reference is None else _reference(row, reference)
        return Task(first + _prompt(row, prompt), answer, {field: row[field] for field in info})

    return task_of


def jsonl_tasks(path: str | Path, task_of: TaskOf) -> Tasks:
    """One task for each line of a JSONL file; lines without text are passed over.

    In memory it takes 8 bytes a line. The file must not change while it is used.
    """
    file = _Jsonl(Path(path).expanduser())
    return Tasks(lambda index: _task(file.row(index), task_of), file.count)


def parquet_tasks(
    path: str | Path, task_of: TaskOf, *, fields: Sequence[str] | None = None, cache_bytes: int = CACHE_BYTES
) -> Tasks:
    """One task for each row of a parquet file, of which row groups are read as they are needed.

    fields: read only these. cache_bytes: as much of the decoded row groups stays in memory; in a file that is larger, a
    task in random order costs the decoding of its row group, so write it with small ones.
    """
    file = _Parquet(Path(path).expanduser(), fields, cache_bytes)
    return Tasks(lambda index: _task(file.row(index), task_of), file.count)


def dataset_tasks(
    name: str,
    task_of: TaskOf,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Tasks:
    """One task for each row of a Hugging Face data set, which is loaded when the first task or the count is asked for.

    name: on the hub, or of a local folder in its layout. revision: a commit; without it, a data set that its owner
    changes gives other tasks, and a run that resumes refuses them. streaming: rows come over the network as they are
    needed, endlessly, in the order of the data set and from its start again at its end; otherwise it is downloaded.
    """
    data = _DataSet(name, split, config, revision)
    if streaming:
        return endless(lambda start: (_task(row, task_of) for row in data.rows(start)))
    return Tasks(lambda index: _task(data.row(index), task_of), data.count)


def _task(row: Row, task_of: TaskOf) -> Task:
    try:
        task = task_of(row)
    except TaskSourceError:
        raise
    except Exception as error:  # the author's function may raise anything
        raise TaskSourceError(f"{row.place}: no task can be made of it: {describe(error)}") from error
    if not isinstance(task, Task):
        raise TaskSourceError(f"{row.place}: the function made {type(task).__name__} of it, not a Task")
    return task


def _prompt(row: Row, field: str) -> tuple[Message, ...]:
    value = row[field]
    if isinstance(value, str):
        return (user(value),)
    if not isinstance(value, list) or not value:
        raise TaskSourceError(f"{row.place}: field {field!r} is neither text nor a list of messages")
    # Columnar formats give every message the fields of all messages, null where it has none.
    given = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in value]
    try:
        return tuple(msgspec.convert(given, list[Message]))
    except msgspec.ValidationError as error:
        raise TaskSourceError(f"{row.place}: field {field!r} is no conversation: {error}") from error


def _reference(row: Row, field: str) -> str:
    value = row[field]
    return str(value) if isinstance(value, int | float) else row.text(field)


class _Jsonl:
    """Lines of a file by the offsets at which they begin."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts: array[int] | None = None
        self._stamp = (0, 0)

    def count(self) -> int:
        return len(self._index())

    def row(self, index: int) -> Row:
        start = self._index()[index]
        try:
            with self._path.open("rb") as file:
                self._check_unchanged()
                file.seek(start)
                line = file.readline()
        except OSError as error:
            raise TaskSourceError(f"cannot read {self._path}: {error.strerror}") from error
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise TaskSourceError(f"{self._place(start)}: not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise TaskSourceError(f"{self._place(start)}: {type(fields).__name__}, not an object with fields")
        return Row(fields, lambda: self._place(start))

    def _index(self) -> "array[int]":
        if self._starts is None:
            starts, position = array("q"), 0
            try:
                with self._path.open("rb") as file:
                    self._stamp = self._stamp_now()
                    for line in file:
                        if not line.isspace():
                            starts.append(position)
                        position += len(line)
            except OSError as error:
                raise TaskSourceError(f"cannot read {self._path}: {error.strerror}") from error
            self._starts = starts
        return self._starts

    def _check_unchanged(self) -> None:
        if self._stamp_now() != self._stamp:
            raise TaskSourceError(f"{self._path} has changed since it was first read; start again with the final file")

    def _stamp_now(self) -> tuple[int, int]:
        found = self._path.stat()
        return found.st_size, found.st_mtime_ns

    def _place(self, start: int) -> str:
        number, position = 1, 0
        with self._path.open("rb") as file:
            for line in file:
                if position >= start:
                    break
                number, position = number + 1, position + len(line)
        return f"{self._path}, line {number}"


class _Parquet:
    """Rows of a file by the row groups in which they are, with the last used ones decoded."""

    def __init__(self, path: Path, fields: Sequence[str] | None, cache_bytes: int) -> None:
        self._path = path
        self._fields = None if fields is None else list(fields)
        self._cache_bytes = cache_bytes
        self._ends: array[int] | None = None
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._num_cached_bytes = 0

    def count(self) -> int:
        ends = self._index()
        return ends[-1] if ends else 0

    def row(self, index: int) -> Row:
        ends = self._index()
        number = bisect_right(ends, index)
        offset = index - (ends[number - 1] if number else 0)
        [fields] = self._group(number).slice(offset, 1).to_pylist()
        return Row(fields, lambda: f"{self._path}, row {index}")

    def _index(self) -> "array[int]":
        if self._ends is None:
            with self._opened() as file:
                self._check_fields(file.schema_arrow.names)
                ends, end = array("q"), 0
                for number in range(file.num_row_groups):
                    end += file.metadata.row_group(number).num_rows
                    ends.append(end)
            self._ends = ends
        return self._ends

    def _group(self, number: int) -> Any:
        if number not in self._groups:
            with self._opened() as file:
                self._groups[number] = file.read_row_group(number, columns=self._fields)
            self._num_cached_bytes += self._groups[number].nbytes
        self._groups.move_to_end(number)
        while self._num_cached_bytes > self._cache_bytes and len(self._groups) > 1:
            self._num_cached_bytes -= self._groups.popitem(last=False)[1].nbytes
        return self._groups[number]

    def _check_fields(self, names: Sequence[str]) -> None:
        missing = [field for field in self._fields or () if field not in names]
        if missing:
            raise TaskSourceError(f"{self._path}: no field {missing[0]!r}; it has {', '.join(names)}")

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import pyarrow  # heavy, and an extra
            from pyarrow import parquet
        except ImportError as error:
            raise TaskSourceError(f"to read {self._path}: pip install 'hone[datasets]'") from error
        try:
            with parquet.ParquetFile(self._path) as file:
                yield file
        except OSError as error:
            raise TaskSourceError(f"cannot read {self._path}: {error.strerror or error}") from error
        except pyarrow.ArrowInvalid as error:
            raise TaskSourceError(f"{self._path} is not a parquet file: {error}") from error


class _DataSet:
    """Rows of a Hugging Face data set; memory-mapped where it is not streamed."""

    def __init__(self, name: str, split: str, config: str | None, revision: str | None) -> None:
        self._name = name
        self._split = split
        self._config = config
        self._revision = revision
        self._data: Any = None

    def count(self) -> int:
        return len(self._loaded())

    def row(self, index: int) -> Row:
        return self._row(self._loaded()[index], index)

    def rows(self, start: int) -> Iterator[Row]:
        """From number `start` on, streamed."""
        for index, fields in enumerate(self._load(streaming=True).skip(start), start):
            yield self._row(fields, index)

    def _row(self, fields: dict[str, Any], index: int) -> Row:
        return Row(fields, lambda: f"{self._name}, split {self._split}, row {index}")

    def _loaded(self) -> Any:
        if self._data is None:
            self._data = self._load(streaming=False)
        return self._data

    def _load(self, *, streaming: bool) -> Any:
        try:
            import datasets  # heavy, and an extra
        except ImportError as error:
            raise TaskSourceError(
                f"to load the Hugging Face data set {self._name!r}: pip install 'hone[datasets]'"
            ) from error
        try:
            return datasets.load_dataset(
                self._name, self._config, split=self._split, revision=self._revision, streaming=streaming
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise TaskSourceError(f"cannot load the Hugging Face data set {self._name!r}: {error}") from error
