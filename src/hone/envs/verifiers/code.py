"""Tests run against a program in a sandbox; the verdict is made where no code of the program runs.

The program and the tests run in two processes, each in a sandbox of its own. Only calls and plain data pass between
them, through this module: the program never sees an expected value, and the tests never run a method of the program's
objects to compare them. So exit(0), printing marks, patched modules, an `__eq__` that says yes or a program that looks
for the tests in its own process gain nothing.

What remains: a program can know answers by heart (keep tests out of the prompt and out of what the sandbox can read).
Arguments are given by value: a function cannot be tested for changing its argument. Tests that give functions or
objects of their own classes to the program are refused (`ValueError`). Objects of the program's classes compare by
identity. Where a test asks the program itself for a judgement (`assert solution.is_valid(x)`), the program is believed.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hone.envs.failures import RolloutFailure, deadline
from hone.envs.guest_processes import MessageStream, guest_code
from hone.envs.guests.channel import ERROR, GONE, VALUE, VERDICT, decode, encode
from hone.envs.providers import HERE, provider_of
from hone.envs.sandboxes import LazySandbox, Sandbox, SandboxProvider
from hone.envs.verifiers.assertions import prepare
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec
from hone.schema.traces import FailureClass

if TYPE_CHECKING:
    from hone.sandbox.client import Built

START_SECONDS = 60.0
COMPILE_SECONDS = 60.0
CHECK_SECONDS = 30.0
"""For the tests' own work between two questions; only a program's answer, such as a huge range, makes it take long."""

EMPTY = "an empty program"


@dataclass(frozen=True, slots=True)
class Assertions:
    """Python code with assertions about a program, as in HumanEval and MBPP.

    tests: run one after another. setup: run before them, and trusted: what it defines is not taken from the program.
    Any other name that they use is the program's. entry_point: a name that is the program's whatever setup defines and
    also if Python has a built-in of that name.

    Each `assert` is a test, and so is a piece of code without any.
    """

    tests: Sequence[str]
    setup: str = ""
    entry_point: str = ""

    def __len__(self) -> int:
        return len(self.tests)


@dataclass(frozen=True, slots=True)
class Call:
    """What a function shall return for arguments; all of it JSON-like data."""

    arguments: Sequence[Any]
    expected: Any
    named: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of one function of a program. tolerance: by which floats may differ, relative where they are above 1."""

    function: str
    calls: Sequence[Call]
    tolerance: float = 1e-6

    def __len__(self) -> int:
        return len(self.calls)


@dataclass(frozen=True, slots=True)
class InputsOutputs:
    """Texts that a program reads from stdin, and what it shall write to stdout for each.

    White space at the ends of lines and empty lines at the end do not count. The program must exit with code 0.
    language: of the program, as `hone.sandbox.languages` names it; its compiler or interpreter is the sandbox's.
    """

    cases: Sequence[tuple[str, str]]
    language: str = "python"

    def __len__(self) -> int:
        return len(self.cases)


@dataclass(frozen=True, slots=True)
class CodeVerdict:
    """What tests found. problem: the first thing that went wrong, for people; empty when all passed."""

    num_passed: int
    num_tests: int
    problem: str = ""

    @property
    def is_right(self) -> bool:
        """Whether all tests passed."""
        return self.num_passed == self.num_tests

    @property
    def share(self) -> float:
        """The share of the tests that passed."""
        return self.num_passed / self.num_tests


class CodeVerifier:
    """Runs tests against programs, each in fresh sandboxes.

    Example::

        verifier = CodeVerifier()

        @reward
        async def tests_pass(answer, info):
            return (await verifier.verify(code_of(answer), Assertions(info["tests"]))).is_right

    sandboxes: a provider, or what `sandboxes_at` takes. timeout_seconds: what the program has for all assertions and
    calls, or for each of its inputs, by the clock on the wall: leave it room on a busy machine. It begins when the
    program's process is ready.

    Trouble with a sandbox is a `RolloutFailure` of class sandbox; tests that cannot be run are a `ValueError`.
    """

    def __init__(
        self,
        sandboxes: SandboxProvider | str = HERE,
        spec: SandboxSpec = SandboxSpec(),
        timeout_seconds: float = 10.0,
    ) -> None:
        self._sandboxes = provider_of(sandboxes)
        self._spec = spec
        self._timeout_seconds = timeout_seconds

    async def verify(self, program: str, tests: Assertions | Calls | InputsOutputs) -> CodeVerdict:
        """Run the tests against a program, in Python unless the tests say otherwise."""
        if not len(tests):
            raise ValueError("no tests; every program would pass")
        if isinstance(tests, InputsOutputs):
            return await self._feed(program, tests)
        return await self._check(program, await asyncio.to_thread(_job, tests))

    async def _check(self, program: str, job: Mapping[str, Any]) -> CodeVerdict:
        if not program.strip():
            return CodeVerdict(0, job["num_tests"], EMPTY)
        async with (
            LazySandbox(self._sandboxes, self._spec) as around_checker,
            LazySandbox(self._sandboxes, self._spec) as around_candidate,
            contextlib.AsyncExitStack() as stack,
        ):
            checker = MessageStream(await around_checker.start_python(guest_code("checker")))
            stack.push_async_callback(checker.process.close)
            candidate = _Candidate(around_candidate, self._timeout_seconds)
            stack.push_async_callback(candidate.close)
            await candidate.load(program)
            return await _relay(candidate, checker, job)

    async def _feed(self, program: str, tests: InputsOutputs) -> CodeVerdict:
        if not program.strip():
            return CodeVerdict(0, len(tests), EMPTY)
        async with LazySandbox(self._sandboxes, self._spec) as sandbox:
            built = await _built(sandbox, program, tests.language)
            if not built.is_ready:
                return CodeVerdict(0, len(tests), f"it does not compile: {_first_line(built.compiled)}")
            return await _fed(sandbox, built, tests.cases, self._timeout_seconds)


async def _built(sandbox: Sandbox, program: str, language: str) -> "Built":
    from hone.sandbox.client import SandboxError, build_code  # `import hone.envs` stays light

    try:
        return await build_code(sandbox, program, language=language, timeout_seconds=COMPILE_SECONDS)
    except SandboxError as error:
        raise RolloutFailure(FailureClass.SANDBOX, "code verifier", str(error)) from error


async def _fed(
    sandbox: Sandbox, built: "Built", cases: Sequence[tuple[str, str]], timeout_seconds: float
) -> CodeVerdict:
    num_passed, problem = 0, ""
    for number, (given, expected) in enumerate(cases):
        kept_bytes = 2 * len(expected.encode()) + (64 << 10)
        result = await built.run(sandbox, given.encode(), timeout_seconds=timeout_seconds, kept_bytes=kept_bytes)
        if result.is_success and _lines(result.stdout) == _lines(expected):
            num_passed += 1
        elif not problem:
            wrong = "a wrong output" if result.is_success else f"{result.outcome} with code {result.exit_code}"
            problem = f"case {number}: {wrong}"
        if result.outcome is Outcome.TIMEOUT:  # the others would take as long
            break
    return CodeVerdict(num_passed, len(cases), problem)


async def _relay(candidate: "_Candidate", checker: MessageStream, job: Mapping[str, Any]) -> CodeVerdict:
    """Carry the checker's questions to the candidate and the answers back, until there is a verdict."""
    await checker.send(encode(job, _refuse))
    message = await _first(checker)
    while True:
        kind, content = message[:1], message[1:]
        if kind == VERDICT:
            num_passed, problem = decode(content, int)
            return CodeVerdict(num_passed, job["num_tests"], problem)
        if kind == ERROR:
            raise ValueError(f"these tests cannot be run: {content.decode()}")
        await checker.send(await candidate.ask(content))
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                message = _said(await checker.receive())
        except TimeoutError:
            return CodeVerdict(0, job["num_tests"], "the tests do not come to an end with the program's answers")


async def _first(process: MessageStream) -> bytes:
    """What a process says when Python is up; that it says nothing is the sandbox's fault."""
    try:
        async with deadline(START_SECONDS):
            return _said(await process.receive())
    except TimeoutError as error:
        raise RolloutFailure(FailureClass.SANDBOX, "code verifier", f"Python does not start ({error})") from error


def _said(message: bytes | None) -> bytes:
    if message is None:
        raise RolloutFailure(FailureClass.SANDBOX, "code verifier", "Python ended in the middle of its work")
    return message


class _Candidate:
    """The process that runs the program, and how much time it has left."""

    def __init__(self, sandbox: LazySandbox, seconds_left: float) -> None:
        self._sandbox = sandbox
        self._total_seconds = self._seconds_left = seconds_left
        self._stream: MessageStream | None = None
        self._gone = ""

    async def load(self, program: str) -> None:
        """Start the process, and run the program on the module's level."""
        self._stream = MessageStream(await self._sandbox.start_python(guest_code("candidate")))
        await _first(self._stream)
        answer = await self.ask(program.encode("utf-8", "surrogatepass"))
        if answer[:1] == ERROR:
            names, _, text = answer[1:].decode(errors="replace").partition("\n")
            self._gone = f"the program does not load: {names.partition(' ')[0]}: {text}"

    async def ask(self, question: bytes) -> bytes:
        """The candidate's answer as it gave it, or that it is gone."""
        if not self._gone:
            assert self._stream is not None
            started = time.perf_counter()
            try:
                async with asyncio.timeout(max(0.0, self._seconds_left)):
                    await self._stream.send(question)
                    answer = await self._stream.receive()
                if answer is not None and answer[:1] in (VALUE, ERROR):
                    return answer
                self._gone = "the program ended early"
            except TimeoutError:
                self._gone = f"the program took longer than {self._total_seconds:g} s"
            except BrokenPipeError:
                self._gone = "the program ended early"
            except ValueError as error:
                self._gone = str(error)
            finally:
                self._seconds_left -= time.perf_counter() - started
            await self._sandbox.exec(["true"])  # a sandbox that died is a failure, not the program's
        return GONE + self._gone.encode()

    async def close(self) -> None:
        if self._stream is not None:
            await self._stream.process.close()


def _job(tests: Assertions | Calls) -> dict[str, Any]:
    if isinstance(tests, Calls):
        calls = [[list(call.arguments), dict(call.named), call.expected] for call in tests.calls]
        return {"function": tests.function, "calls": calls, "tolerance": tests.tolerance, "num_tests": len(calls)}
    prepared = _prepared(tuple(tests.tests), tests.setup)
    return {
        "setup": prepared.setup,
        "tests": prepared.tests,
        "names": [name for name in prepared.names if name != tests.entry_point],
        "entry_point": tests.entry_point,
        "num_tests": prepared.num_tests,
    }


_prepared = functools.lru_cache(maxsize=256)(prepare)  # a group's rollouts run the same tests


def _refuse(value: Any) -> int:
    raise ValueError(f"a {type(value).__name__} in tests; calls take and return JSON-like data")


def _first_line(result: ExecResult | None) -> str:
    if result is None or result.outcome is Outcome.TIMEOUT:
        return f"the compiler took longer than {COMPILE_SECONDS:g} s"
    return next(iter(result.stderr.splitlines()), f"{result.outcome} with code {result.exit_code}")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
