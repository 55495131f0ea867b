"""An environment that is installed in another Python, because its dependencies do not go with those of others.

`RemoteEnvironment` asks a process of that Python for tasks, gold answers and what counts as solved, over its standard
input and output: each message is its length in four bytes and a typed envelope. Its rollouts run in env workers that
are started with that Python or, in an evaluation, through `hone.envs.relay`. The process is
`python -m hone.envs.remote`; it ends with its input.
"""

import contextlib
import os
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import msgspec

from hone.envs.environment import Environment, description
from hone.envs.failures import describe
from hone.envs.registry import EnvironmentLoadError, load_environment
from hone.envs.relay import RolloutRelay
from hone.envs.rollout import Rollout
from hone.envs.rubric import Rubric, reward
from hone.envs.sources import Tasks
from hone.schema.messages import Message
from hone.schema.remote import (
    ANSWERS,
    QUESTIONS,
    DifficultyGiven,
    DifficultyWanted,
    GoldGiven,
    GoldWanted,
    IsSolved,
    Load,
    Loaded,
    Raised,
    Solved,
    TaskGiven,
    TaskWanted,
)
from hone.schema.tasks import Task
from hone.schema.traces import Trace
from hone.schema.wire import Wire, WireError

LOAD_SECONDS = 600.0
"""An environment may fetch its data the first time."""
ANSWER_SECONDS = 60.0
FAREWELL_SECONDS = 5.0
LENGTH = struct.Struct("<I")
MODULE = "hone.envs.remote"

Answer = TypeVar("Answer", bound=msgspec.Struct)


def interpreter(python: str) -> Path:
    """The Python that `python` names: itself, or that of a virtual environment's folder."""
    path = Path(python).expanduser().absolute()
    found = path / "bin" / "python" if path.is_dir() else path
    if not os.access(found, os.X_OK) or not found.is_file():
        raise EnvironmentLoadError(
            f"there is no Python at {python} ({found} cannot be executed); make one with `python -m venv {python}`"
        )
    return found


class Listed(Protocol):
    """An environment as a recipe or an evaluation file lists it."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> dict[str, Any]: ...

    @property
    def python(self) -> str | None: ...


def environment_of(section: Listed) -> Environment:
    """The environment that a file lists, loaded here or, where it names a Python, there."""
    if section.python is None:
        return load_environment(section.name, **section.arguments)
    return RemoteEnvironment(section.name, section.arguments, interpreter(section.python))


@contextlib.asynccontextmanager
async def ending_processes(environments: Iterable[Environment]) -> AsyncIterator[None]:
    """End the other processes of those environments that are elsewhere, after the rollouts in the body."""
    try:
        yield
    finally:
        for environment in environments:
            if isinstance(environment, RemoteEnvironment):
                await environment.aclose()


class RemoteEnvironment(Environment):
    """The tasks of an environment in another Python, and rollouts there.

    Raises `EnvironmentLoadError` when that Python has no hone, another version of it, or not this environment.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], python: Path) -> None:
        self._remote = _Process(name, dict(arguments), python)
        loaded = self._remote.loaded
        super().__init__(
            name=loaded.name,
            version=loaded.version,
            rubric=_RubricElsewhere(loaded),
            train=Tasks(lambda index: self._task(index, is_held_out=False), loaded.num_train_tasks),
            held_out=Tasks(lambda index: self._task(index, is_held_out=True), loaded.num_held_out_tasks),
            tools=loaded.tools,
            gold=self._ask_gold if loaded.has_gold else None,
            difficulty=self._ask_difficulty if loaded.has_difficulty else None,
        )
        self.elsewhere = self._relay = RolloutRelay(Load(name, dict(arguments)), python, loaded.group_seconds)
        # Not to be waited for when the environment is no longer used: it would never end by itself.
        self._closing = weakref.finalize(self, self._remote.close)

    @property
    def tools_are_known(self) -> bool:
        """As the environment says."""
        return self._remote.loaded.tools_are_known

    def is_solved(self, trace: Trace) -> bool:
        """Whether a scored trace counts as a success, as the environment says."""
        return self._remote.ask(IsSolved(trace), Solved).is_solved

    async def run(self, rollout: Rollout) -> None:
        """Never called: `elsewhere` runs whole rollouts."""
        raise AssertionError(f"environment {self.name!r} runs elsewhere")

    def close(self) -> None:
        """End the other processes; they are started again when they are needed."""
        self._remote.close()
        self._relay.close()

    async def aclose(self) -> None:
        """As `close`, within the event loop that rollouts ran in; waits until they have ended."""
        self._remote.close()
        await self._relay.aclose()

    def _task(self, index: int, *, is_held_out: bool) -> Task:
        return self._remote.ask(TaskWanted(index, is_held_out), TaskGiven).task

    def _ask_gold(self, task: Task) -> list[Message]:
        return self._remote.ask(GoldWanted(task), GoldGiven).messages or []

    def _ask_difficulty(self, task: Task) -> float:
        found = self._remote.ask(DifficultyWanted(task), DifficultyGiven).difficulty
        if found is None:
            raise ValueError(f"environment {self.name!r} does not tell the difficulty of task {task.key}")
        return found


@reward(name="elsewhere")
def _no_reward(trace: Trace) -> float:
    raise RuntimeError(f"the rewards of {trace.environment!r} are in another Python")


class _RubricElsewhere(Rubric):
    """What the orchestrator needs to know of the other process's rubric."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__([_no_reward])
        self._loaded = loaded

    @property
    def scores_groups(self) -> bool:
        return self._loaded.scores_groups

    @property
    def group_seconds(self) -> float:
        return self._loaded.group_seconds


class _Process:
    """The other end of the pipe: started at once, and once more for a question that it died over."""

    def __init__(self, name: str, arguments: dict[str, Any], python: Path) -> None:
        self._load = Load(name, arguments)
        self._python = python
        self._questions, self._answers = Wire(*QUESTIONS), Wire(*ANSWERS)
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.RLock()
        self.loaded = self._start()

    def ask(self, question: msgspec.Struct, kind: type[Answer]) -> Answer:
        """The answer to a question; raises what the environment raised, as a ValueError or IndexError.

        Threads may ask at the same time, and are answered one after the other.
        """
        with self._turn:
            try:
                if self._process is None:
                    self._start()
                return self._exchange(question, kind, ANSWER_SECONDS)
            except _Ended:
                self._start()
                try:
                    return self._exchange(question, kind, ANSWER_SECONDS)
                except _Ended as error:
                    raise self._complaint(str(error)) from error

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None, "made with pipes"
        assert process.stdout is not None, "made with pipes"
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(FAREWELL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _start(self) -> Loaded:
        self.close()
        self._process = subprocess.Popen(
            [str(self._python), "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        try:
            return self._exchange(self._load, Loaded, LOAD_SECONDS)
        except _Ended as error:
            raise self._complaint(
                f"{error}; install the same version of hone there: {self._python} -m pip install 'hone[text]'"
            ) from error
        except WireError as error:
            raise self._complaint(str(error)) from error
        except BaseException:  # a cancellation too: undo, then pass it on
            self.close()
            raise

    def _complaint(self, reason: str) -> EnvironmentLoadError:
        self.close()
        return EnvironmentLoadError(f"environment {self._load.name!r} in {self._python}: {reason}")

    def _exchange(self, question: msgspec.Struct, kind: type[Answer], seconds: float) -> Answer:
        process = self._process
        assert process is not None, "started"
        assert process.stdin is not None, "made with pipes"
        assert process.stdout is not None, "made with pipes"
        try:
            _write(process.stdin, self._questions.encode(question))
        except BrokenPipeError:
            raise _Ended(self._story()) from None
        ends = time.monotonic() + seconds
        (length,) = LENGTH.unpack(self._read(process.stdout, LENGTH.size, ends, seconds))
        answer = self._answers.decode(self._read(process.stdout, length, ends, seconds))
        if isinstance(answer, Raised):
            raise _raised(answer)
        if not isinstance(answer, kind):
            raise WireError(f"{type(question).__name__} was answered by {type(answer).__name__}")
        return answer

    def _read(self, stream: IO[bytes], count: int, ends: float, seconds: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            ready, _, _ = select.select([stream], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                raise self._complaint(f"no answer within {seconds:g} s")
            piece = os.read(stream.fileno(), count - len(data))
            if not piece:
                raise _Ended(self._story())
            data += piece
        return bytes(data)

    def _story(self) -> str:
        assert self._process is not None, "started"
        try:
            code = self._process.wait(FAREWELL_SECONDS)
        except subprocess.TimeoutExpired:
            return "its process has closed its output"
        return f"its process ended with {code} (what it said is above)"


class _Ended(Exception):
    """The process is gone."""


def _raised(answer: Raised) -> Exception:
    if answer.kind == IndexError.__name__:
        return IndexError(answer.message)
    return EnvironmentLoadError(answer.message)


def _write(stream: IO[bytes], message: bytes) -> None:
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()


# The process in the other Python.


def main() -> int:
    """Answer questions until the input ends."""
    questions = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What an environment prints shall not come between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    server = _Server()
    with questions, answers:
        while head := questions.read(LENGTH.size):
            (length,) = LENGTH.unpack(head)
            _write(answers, server.answer(questions.read(length)))
    return 0


class _Server:
    def __init__(self) -> None:
        self._questions, self._answers = Wire(*QUESTIONS), Wire(*ANSWERS)
        self._environment: Environment | None = None

    def answer(self, data: bytes) -> bytes:
        try:
            return self._answers.encode(self._answer(self._questions.decode(data)))
        except Exception as error:  # code of an environment may raise anything
            text = str(error) if isinstance(error, EnvironmentLoadError | WireError | IndexError) else describe(error)
            return self._answers.encode(Raised(type(error).__name__, text))

    def _answer(self, question: msgspec.Struct) -> msgspec.Struct:
        if isinstance(question, Load):
            return self._load(question)
        environment = self._environment
        assert environment is not None, "loading is the first question"
        match question:
            case TaskWanted(index, is_held_out):
                return TaskGiven((environment.held_out_task if is_held_out else environment.train_task)(index))
            case GoldWanted(task):
                return GoldGiven(environment.gold(task))
            case DifficultyWanted(task):
                return DifficultyGiven(environment.difficulty(task))
            case IsSolved(trace):
                return Solved(bool(environment.is_solved(trace)))
        raise AssertionError(f"{type(question).__name__} is no question")

    def _load(self, question: Load) -> Loaded:
        _check_worker()
        environment = self._environment = load_environment(question.name, **question.arguments)
        return description(environment)


def _check_worker() -> None:
    """Env workers will run here: what they import must be there."""
    try:
        import hone.envs.worker  # noqa: F401 - what it needs beyond the base install shall be missed now, not later
    except ImportError as error:
        raise EnvironmentLoadError(
            f"env workers cannot run there: {error}; {sys.executable} -m pip install 'hone[text]'"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
