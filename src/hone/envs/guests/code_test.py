"""The two ends of a code test: the candidate, which runs the program, and the checker, which runs the tests on it.

    python -I -c SOURCE candidate|checker

They are separate processes in separate sandboxes; all that passes between them goes through the verifier. The checker
asks (for a name, a call, an attribute, ...), the candidate answers with plain data or with references to objects that
stay with it. So no code of the program ever runs where the verdict is made, and no expected value ever reaches the
program. Messages are JSON behind four bytes of length, on descriptors 0 and 1.
"""

import ast
import builtins
import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

MAX_MESSAGE_BYTES = 4 << 20
MAX_INT_BITS = 12_000  # of an integer written in decimal; longer ones take quadratic time and go as hexadecimal

Json = Any


class Channel:
    """Messages over two descriptors."""

    def __init__(self) -> None:
        """Take the process's stdin and stdout for itself; what the program prints goes nowhere."""
        self.incoming, self.outgoing = os.dup(0), os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        os.close(nowhere)

    def receive(self) -> Json:
        return json.loads(self.read(int.from_bytes(self.read(4), "big")))

    def send(self, message: Json) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a value of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} can be looked at")
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(self.outgoing, data) :]

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = os.read(self.incoming, size - len(data))
            if not piece:
                os._exit(0)
            data += piece
        return data


def encode(value: Any, refer: Callable[[Any], Json]) -> Json:
    """Data of built-in types, their subclasses included, by content; `refer` says what stands for anything else.

    The content is read with the methods of the built-in type, so that a subclass cannot lie about it.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if number.bit_length() < MAX_INT_BITS else {"int": hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": bytes.hex(value)}
    if isinstance(value, bytearray):
        return {"bytearray": bytearray.hex(value)}
    if isinstance(value, dict):
        return {"dict": [[encode(key, refer), encode(held, refer)] for key, held in dict.items(value)]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(held, refer) for held in kind.__iter__(value)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return encode(value.item(), refer)
    kind = type(value)
    if parts := LIBRARY_PARTS.get((kind.__module__, kind.__name__)):
        return {"library": [kind.__module__, kind.__name__, [encode(part, refer) for part in parts(value)]]}
    return refer(value)


LIBRARY_PARTS: dict[tuple[str, str], Callable[[Any], list[Any]]] = {
    ("collections", "deque"): lambda value: [list(value)],
    ("decimal", "Decimal"): lambda value: [str(value)],
    ("fractions", "Fraction"): lambda value: [value.numerator, value.denominator],
    ("datetime", "date"): lambda value: [value.year, value.month, value.day],
    ("datetime", "time"): lambda value: [value.hour, value.minute, value.second, value.microsecond],
    ("datetime", "timedelta"): lambda value: [value.days, value.seconds, value.microseconds],
    ("datetime", "datetime"): lambda value: [*value.timetuple()[:6], value.microsecond],
}
"""Classes of the standard library that count as data, and what they are made from."""


def decode(data: Json, resolve: Callable[[Json], Any]) -> Any:
    """The inverse of `encode`."""
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "dict":
        return {decode(key, resolve): decode(held, resolve) for key, held in content}
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)([decode(held, resolve) for held in content])
    if kind == "int":
        return int(content, 16)
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(content)
    if kind in ("complex", "range"):
        return getattr(builtins, kind)(*content)
    if kind == "library":
        module, name, parts = content
        if (module, name) not in LIBRARY_PARTS:
            raise ValueError(f"{module}.{name} is no data")
        return getattr(importlib.import_module(module), name)(*(decode(part, resolve) for part in parts))
    return resolve(content)


# --- the candidate -------------------------------------------------------------------------------------------------


class Candidate:
    """Runs the program and answers what the checker asks."""

    def __init__(self) -> None:
        self.module = types.ModuleType("solution")
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def serve(self, channel: Channel) -> None:
        channel.send("ready")
        while True:
            request = channel.receive()
            try:
                answer = {"value": encode(self.answer(request), self.refer)}
                channel.send(answer)
            except BaseException as error:  # SystemExit and KeyboardInterrupt are answers too
                channel.send({"error": [[kind.__name__ for kind in type(error).__mro__], message_of(error)]})

    def answer(self, request: Json) -> Any:
        operation, *arguments = request
        if operation == "load":
            sys.modules["solution"] = self.module
            exec(compile(arguments[0], "solution.py", "exec"), self.module.__dict__)
            return None
        if operation == "name":
            return self.module.__dict__[arguments[0]]
        target, *rest = (decode(argument, self.objects.__getitem__) for argument in arguments)
        if operation == "call":
            return target(*rest[0], **rest[1])
        operations: dict[str, Callable[..., Any]] = {
            "attribute": getattr,
            "assign": setattr,
            "item": lambda held, key: held[key],
            "length": len,
            "iterate": iter,
            "next": next,
            "text": str,
            "representation": repr,
        }
        return operations[operation](target, *rest)

    def refer(self, value: Any) -> Json:
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return {"object": number}


def message_of(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return ""


# --- the checker ---------------------------------------------------------------------------------------------------


class Gone(BaseException):
    """The candidate answers no more."""


class UnsupportedTest(BaseException):
    """The test asks for what cannot be asked over a channel."""


class CandidateError(Exception):
    """What the candidate raised, when it is no built-in exception."""


class Remote:
    """An object of the candidate's, as the tests see it.

    It can be called, iterated, measured and indexed, and it has attributes. It compares by identity: an `__eq__` of the
    candidate's would decide about itself. For the same reason it has no arithmetic, no order and no `in`.
    """

    __slots__ = ("_asker", "_number")

    def __init__(self, asker: "Asker", number: int) -> None:
        object.__setattr__(self, "_asker", asker)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._asker.ask("call", self, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        return self._asker.ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._asker.ask("assign", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._asker.ask("item", self, key)

    def __len__(self) -> int:
        length = self._asker.ask("length", self)
        if not isinstance(length, int):
            raise TypeError(f"a length of type {type(length).__name__}")
        return length

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(self._asker.ask("text", self))

    def __repr__(self) -> str:
        return str(self._asker.ask("representation", self))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._asker.ask("iterate", self)
        return iter(iterator) if not isinstance(iterator, Remote) else _items(iterator)

    def __next__(self) -> Any:
        return self._asker.ask("next", self)

    def __contains__(self, value: Any) -> bool:
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
    """Asks the candidate through the verifier."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.gone: str | None = None

    def ask(self, operation: str, *arguments: Any) -> Any:
        return self.request([operation, *(encode(argument, self.refer) for argument in arguments)])

    def request(self, request: Json) -> Any:
        if self.gone is None:
            self.channel.send({"ask": request})
            answer = self.channel.receive()
            self.gone = answer.get("gone")
        if self.gone is not None:
            raise Gone(self.gone)
        try:
            if "error" in answer:
                names, message = answer["error"]
                raise exception(names)(message)
            return decode(answer["value"], self.resolve)
        except (ValueError, KeyError, LookupError, AttributeError, RecursionError, MemoryError) as error:
            if "error" in answer:
                raise
            raise CandidateError("an answer that is no value") from error

    def refer(self, value: Any) -> Json:
        if not isinstance(value, Remote):
            raise UnsupportedTest(f"a {type(value).__name__} cannot be given to the candidate, which is elsewhere")
        return {"object": value._number}

    def resolve(self, number: Json) -> Remote:
        if not isinstance(number, int):
            raise ValueError("a reference that is no number")
        return Remote(self, number)


def exception(names: Any) -> type[Exception]:
    """The first built-in exception among the names of an exception's classes."""
    for name in names if isinstance(names, list) else []:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            return CandidateError if kind in (Exception, *NEEDS_ARGUMENTS) else kind
    return CandidateError


NEEDS_ARGUMENTS = (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError, BaseExceptionGroup, ExceptionGroup)


class Results:
    """Which assertions held. An assertion that is run several times must hold every time."""

    def __init__(self) -> None:
        self.num_assertions = 0
        self.held: set[int] = set()
        self.failed: set[int] = set()
        self.problem = ""

    def hold(self, number: int) -> None:
        self.held.add(number)

    def fail(self, number: int, problem: str) -> None:
        self.failed.add(number)
        self.problem = self.problem or problem

    def verdict(self) -> Json:
        total = self.num_assertions
        is_whole = not self.problem and not self.failed
        num_passed = total if is_whole else min(len(self.held - self.failed), total - 1)
        return {"verdict": [num_passed, total, self.problem]}


class Assertions(ast.NodeTransformer):
    """Numbers each assertion and lets the test go on after one that fails, except where the test handles it itself."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.num_before = results.num_assertions

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        number = self.results.num_assertions
        self.results.num_assertions += 1
        text = ast.unparse(node)[:200]
        wrapped = ast.parse(
            f"try:\n  pass\nexcept Exception as __problem__:\n  __fail__({number}, {text!r}, __problem__)\n"
            f"else:\n  __hold__({number})"
        ).body[0]
        assert isinstance(wrapped, ast.Try)
        wrapped.body = [node]
        return ast.fix_missing_locations(ast.copy_location(wrapped, node))

    def visit_Try(self, node: ast.Try) -> ast.AST:
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            self.generic_visit(part)
        return node


def check(channel: Channel) -> None:
    """Run the tests that the verifier sends, and tell it the verdict."""
    job = channel.receive()
    asker, results = Asker(channel), Results()
    try:
        if "cases" in job:
            check_cases(job, asker, results)
        else:
            check_assertions(job, asker, results)
    except Gone as gone:
        results.problem = results.problem or str(gone)
    except UnsupportedTest as error:
        channel.send({"invalid": str(error)})
        return
    except SyntaxError as error:
        channel.send({"invalid": f"the tests are no Python: {error}"})
        return
    channel.send(results.verdict())


def check_assertions(job: Json, asker: Asker, results: Results) -> None:
    setup = ast.parse(job["setup"])
    trees = [ast.parse(test) for test in job["tests"]]
    wanted = free_names([setup, *trees])
    codes = [(number, compiled(tree, results)) for number, tree in enumerate(trees)]
    namespace: dict[str, Any] = {
        "__name__": "tests",
        "__hold__": results.hold,
        "__fail__": lambda number, text, error: results.fail(number, f"{text}: {described(error)}"),
    }
    entry_point = job["entry_point"]
    provide(wanted - {entry_point}, asker, namespace)
    try:
        exec(compile(setup, "setup", "exec"), namespace)
    except Exception as error:
        results.problem = f"setup: {described(error)}"
        return
    if entry_point:
        namespace[entry_point] = missing(entry_point)
        provide({entry_point}, asker, namespace)
    for number, code in codes:
        try:
            exec(code, namespace)
        except Exception as error:
            results.problem = results.problem or f"test {number}: {described(error)}"


def compiled(tree: ast.Module, results: Results) -> types.CodeType:
    """The test with its assertions numbered; a test without any counts as one."""
    rewriting = Assertions(results)
    rewriting.visit(tree)
    if results.num_assertions == rewriting.num_before:
        number = results.num_assertions
        results.num_assertions += 1
        tree.body += ast.parse(f"__hold__({number})").body
    return compile(tree, "tests", "exec")


def free_names(trees: list[ast.Module]) -> set[str]:
    """What the tests use and neither they nor Python define. A built-in of Python is never the candidate's to define."""
    used: set[str] = set()
    bound = set(dir(builtins))
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return used - bound


def provide(names: set[str], asker: Asker, namespace: dict[str, Any]) -> None:
    for name in sorted(names):
        try:
            namespace[name] = asker.request(["name", name])
        except Exception:
            continue  # the program does not define it; a test that uses it will say so


def missing(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        raise NameError(f"the program does not define {name}")

    return call


def check_cases(job: Json, asker: Asker, results: Results) -> None:
    results.num_assertions = len(job["cases"])
    namespace = {job["function"]: missing(job["function"])}
    provide({job["function"]}, asker, namespace)
    function = namespace[job["function"]]
    for number, (arguments, named, expected) in enumerate(job["cases"]):
        try:
            answer = function(*arguments, **named)
            if is_same(answer, expected, job["tolerance"]):
                results.hold(number)
            else:
                results.fail(number, f"case {number}: a wrong answer")
        except Exception as error:
            results.fail(number, f"case {number}: {described(error)}")


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
    if isinstance(expected, float) and isinstance(answer, float | int) and not isinstance(answer, bool):
        return bool(answer == expected or abs(answer - expected) <= tolerance * max(1.0, abs(expected)))
    return isinstance(answer, bool) == isinstance(expected, bool) and bool(answer == expected)


def described(error: BaseException) -> str:
    text = message_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    if sys.argv[1] == "candidate":
        Candidate().serve(Channel())
    else:
        check(Channel())
