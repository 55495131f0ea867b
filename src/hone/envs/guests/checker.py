"""The checker of a code test: runs the tests, asks the candidate through the verifier, and tells the verdict."""

from __future__ import annotations

import builtins

from hone.envs.guests.channel import ASK, ERROR, GONE, VALUE, VERDICT, Channel, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any


class Gone(BaseException):
    """The candidate answers no more."""


class UnsupportedTest(BaseException):
    """The test asks for what cannot be asked over a channel."""


class CandidateError(Exception):
    """What the candidate raised, when it is no built-in exception."""


class Remote:
    """An object of the candidate's, as the tests see it.

    It can be called, iterated, measured, indexed and shown, and it has attributes. It compares by identity: an `__eq__`
    of the candidate's would decide about itself. For the same reason it has no arithmetic, no order and no `in`.
    """

    __slots__ = ("_asker", "_number")

    def __init__(self, asker: Asker, number: int) -> None:
        object.__setattr__(self, "_asker", asker)
        object.__setattr__(self, "_number", number)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._asker.ask("call", self, positional, named)

    def __getattr__(self, name: str) -> Any:
        return self._asker.ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._asker.ask("assign", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._asker.ask("item", self, key)

    def __len__(self) -> int:
        return int(self._asker.ask("length", self))

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(self._asker.ask("text", self))

    def __repr__(self) -> str:
        return str(self._asker.ask("representation", self))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._asker.ask("iterate", self)
        return _items(iterator) if isinstance(iterator, Remote) else iter(iterator)

    def __next__(self) -> Any:
        return self._asker.ask("next", self)

    def __contains__(self, value: object) -> bool:
        raise TypeError("'in' on an object of the candidate's own class")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)


def _items(iterator: Remote) -> Iterator[Any]:
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item


class Asker:
    """Asks the candidate."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._gone: str | None = None

    def ask(self, operation: str, *arguments: Any) -> Any:
        """What the candidate answers; raises the built-in exception nearest to what it raised."""
        question = ASK + encode([operation, *arguments], self._refer)
        if self._gone is None:
            self._channel.send(question)
            answer = self._channel.receive()
            kind, content = answer[:1], answer[1:]
            if kind == VALUE:
                return self._value(content)
            if kind != GONE:
                raise exception(content)
            self._gone = content.decode()
        raise Gone(self._gone)

    def _value(self, content: bytes) -> Any:
        try:
            return decode(content, self._resolve)
        except (Exception, MemoryError) as error:
            raise CandidateError("an answer that is no value") from error

    def _refer(self, value: Any) -> int:
        if not isinstance(value, Remote):
            raise UnsupportedTest(f"a {type(value).__name__} cannot be given to the program, which is elsewhere")
        number: int = value._number
        return number

    def _resolve(self, number: int) -> Remote:
        return Remote(self, number)


def exception(content: bytes) -> Exception:
    """The exception of the candidate's, as the first built-in class among its classes that takes a text."""
    names, _, text = content.decode(errors="replace").partition("\n")
    for name in names.split(" "):
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            try:
                return kind(text)
            except TypeError:
                break
    return CandidateError(f"{names.partition(' ')[0]}: {text}")


class Results:
    """Which tests passed. A test that is met several times must pass every time."""

    def __init__(self, num_tests: int) -> None:
        self._num_tests = num_tests
        self._passed: set[int] = set()
        self._failed: set[int] = set()
        self.problem = ""

    def passed(self, number: int) -> None:
        self._passed.add(number)

    def failed(self, number: int, problem: str) -> None:
        self._failed.add(number)
        self.complain(problem)

    def complain(self, problem: str) -> None:
        self.problem = self.problem or problem

    def verdict(self) -> bytes:
        """The number of tests passed and the first problem. A test that was never met has passed if all is well."""
        num_passed = self._num_tests
        if self.problem:
            num_passed = min(len(self._passed - self._failed), self._num_tests - 1)
        return VERDICT + encode([num_passed, self.problem], id)


def check(channel: Channel) -> None:
    """Carry out one job and send the verdict, or an error that is the tests' own."""
    job: dict[str, Any] = decode(channel.receive(), int)
    asker, results = Asker(channel), Results(job["num_tests"])
    try:
        if "calls" in job:
            check_calls(job, asker, results)
        else:
            check_assertions(job, asker, results)
    except Gone as gone:
        results.complain(str(gone))
    except UnsupportedTest as unsupported:
        channel.send(ERROR + str(unsupported).encode())
        return
    channel.send(results.verdict())


def check_assertions(job: dict[str, Any], asker: Asker, results: Results) -> None:
    """Run the pieces of test code, whose assertions report to `__passed__` and `__failed__` by number."""
    namespace: dict[str, Any] = {
        "__name__": "tests",
        "__passed__": results.passed,
        "__failed__": lambda number, text, error: results.failed(number, f"{text}: {described(error)}"),
    }
    entry_point = job["entry_point"]
    for name in job["names"]:
        provide(name, asker, namespace)
    try:
        exec(job["setup"], namespace)
    except Exception as error:  # tests raise what they like
        results.complain(f"setup: {described(error)}")
        return
    if entry_point:
        namespace[entry_point] = missing(entry_point)
        provide(entry_point, asker, namespace)
    for number, test in enumerate(job["tests"]):
        try:
            exec(test, namespace)
        except Exception as error:  # that is how a test fails
            results.complain(f"test {number}: {described(error)}")


def check_calls(job: dict[str, Any], asker: Asker, results: Results) -> None:
    """Compare what the function returns for each call with what is expected."""
    namespace = {job["function"]: missing(job["function"])}
    provide(job["function"], asker, namespace)
    function = namespace[job["function"]]
    for number, (arguments, named, expected) in enumerate(job["calls"]):
        try:
            if is_same(function(*arguments, **named), expected, job["tolerance"]):
                results.passed(number)
            else:
                results.failed(number, f"call {number}: a wrong answer")
        except Exception as error:  # of the program under test
            results.failed(number, f"call {number}: {described(error)}")


def provide(name: str, asker: Asker, namespace: dict[str, Any]) -> None:
    try:
        namespace[name] = asker.ask("name", name)
    except Exception:  # the program may raise anything
        return  # the program does not define it; a test that uses it will say so


def missing(name: str) -> Callable[..., Any]:
    def call(*positional: Any, **named: Any) -> Any:
        raise NameError(f"the program does not define {name}")

    return call


def is_same(answer: Any, expected: Any, tolerance: float) -> bool:
    """Equality of data, in which a tuple is as good as a list and floats may differ by the tolerance."""
    if isinstance(expected, list):
        if not isinstance(answer, list | tuple) or len(answer) != len(expected):
            return False
        return all(is_same(one, other, tolerance) for one, other in zip(answer, expected, strict=True))
    if isinstance(expected, dict):
        if not isinstance(answer, dict) or answer.keys() != expected.keys():
            return False
        return all(is_same(answer[key], value, tolerance) for key, value in expected.items())
    if isinstance(answer, bool) != isinstance(expected, bool):
        return False
    if isinstance(expected, float) and isinstance(answer, float | int):
        return bool(answer == expected or abs(answer - expected) <= tolerance * max(1.0, abs(expected)))
    return bool(answer == expected)


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


if __name__ == "__main__":
    check(Channel())
