"""The candidate of a code test: runs the program and answers what the tests ask of it."""

from __future__ import annotations

import sys

from hone.envs.guests.channel import ERROR, VALUE, Channel, decode, encode, encode_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

Module = type(sys)


class Candidate:
    """The program's module, and the objects of it that the tests have seen."""

    def __init__(self) -> None:
        self.module = Module("solution")
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def serve(self, channel: Channel) -> None:
        """Answer for ever. The first message is the program's text, the others are encoded lists: what, arguments."""
        channel.send(VALUE)  # ready
        answers: Callable[[bytes], Any] = self.load
        while True:
            message = channel.receive()
            try:
                channel.send(VALUE + encode(answers(message), self.refer))
            except BaseException as error:  # SystemExit and KeyboardInterrupt are answers too
                channel.send(ERROR + encode_error(error))
            answers = self.answer

    def load(self, program: bytes) -> None:
        sys.modules["solution"] = self.module
        exec(compile(program.decode("utf-8", "surrogatepass"), "solution.py", "exec"), self.module.__dict__)

    def answer(self, message: bytes) -> Any:
        operation, *arguments = decode(message, self.objects.__getitem__)
        if operation == "name":
            return self.module.__dict__[arguments[0]]
        if operation == "call":
            function, positional, named = arguments
            return function(*positional, **named)
        return OPERATIONS[operation](*arguments)

    def refer(self, value: Any) -> int:
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return number


OPERATIONS: dict[str, Callable[..., Any]] = {
    "attribute": getattr,
    "assign": setattr,
    "item": lambda held, key: held[key],
    "length": len,
    "iterate": iter,
    "next": next,
    "text": str,
    "representation": repr,
}

if __name__ == "__main__":
    Candidate().serve(Channel())
