"""What passes between a program and its tests: messages behind four bytes of length, and values as plain data.

A message is one byte that says what it is, then a value or a text. These files start once or twice per verified
program, so they import nothing that takes long.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_MESSAGE_BYTES = 4 << 20

ASK, GONE, VALUE, ERROR, VERDICT = b"?", b"-", b"=", b"!", b"."
"""A question of the checker's; what the verifier says when nobody answers; the two kinds of answers; the end."""


class Channel:
    """Messages over what were the process's stdin and stdout; what else is printed goes nowhere."""

    def __init__(self) -> None:
        self._incoming, self._outgoing = os.dup(0), os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        os.close(nowhere)

    def receive(self) -> bytes:
        """The next message; ends the process when there is none."""
        return self._read(int.from_bytes(self._read(4), "big"))

    def send(self, message: bytes) -> None:
        """Send a message; `ValueError` when it is longer than the verifier reads."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a value of {len(message)} bytes; at most {MAX_MESSAGE_BYTES} can be looked at")
        message = len(message).to_bytes(4, "big") + message
        while message:
            message = message[os.write(self._outgoing, message) :]

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = os.read(self._incoming, size - len(data))
            if not piece:
                os._exit(0)
            data += piece
        return data


def encode(value: Any, refer: Callable[[Any], int]) -> bytes:
    """Data of built-in types, subclasses included, by content; `refer` gives a number that stands for anything else.

    The content is read with the methods of the built-in type, so that a subclass cannot lie about it.
    """
    if value is None:
        return _piece(b"N")
    if value is True or value is False:
        return _piece(b"B", b"1" if value else b"")
    if isinstance(value, int):
        return _piece(b"I", b"%x" % int.__index__(value))
    if isinstance(value, float):
        return _piece(b"F", float.hex(value).encode())
    if isinstance(value, str):
        return _piece(b"S", str.encode(value, "utf-8", "surrogatepass"))
    if isinstance(value, bytes | bytearray):
        return _piece(b"Y" if isinstance(value, bytes) else b"y", bytes(memoryview(value)))
    if isinstance(value, complex):
        return _piece(b"C", encode(value.real, refer), encode(value.imag, refer))
    if isinstance(value, dict):
        return _piece(b"D", *(encode(part, refer) for item in dict.items(value) for part in item))
    for tag, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return _piece(tag, *(encode(part, refer) for part in kind.__iter__(value)))
    if isinstance(value, range):
        return _piece(b"R", *(encode(part, refer) for part in (value.start, value.stop, value.step)))
    if isinstance(value, type) and (name := getattr(value, "__name__", None)) in TYPES and TYPES[name] is value:
        return _piece(b"T", str.encode(name))
    kind = type(value)
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return encode(value.item(), refer)
    if parts := LIBRARY.get(f"{kind.__module__}.{kind.__name__}"):
        return _piece(b"L", encode(f"{kind.__module__}.{kind.__name__}", refer), encode(parts(value), refer))
    return _piece(b"O", b"%x" % refer(value))


def decode(data: bytes, resolve: Callable[[int], Any]) -> Any:
    """The inverse of `encode`; raises whatever it likes for what `encode` cannot have written."""
    tag, content = data[:1], data[5:]
    if int.from_bytes(data[1:5], "big") != len(content):
        raise ValueError("a value that is cut off")
    if tag == b"N":
        return None
    if tag == b"B":
        return content == b"1"
    if tag == b"I":
        return int(content, 16)
    if tag == b"F":
        return float.fromhex(content.decode())
    if tag == b"S":
        return content.decode("utf-8", "surrogatepass")
    if tag == b"Y":
        return content
    if tag == b"y":
        return bytearray(content)
    if tag == b"T":
        return TYPES[content.decode()]
    if tag == b"O":
        return resolve(int(content, 16))
    parts = [decode(piece, resolve) for piece in _pieces(content)]
    if tag == b"D":
        return dict(zip(parts[::2], parts[1::2], strict=True))
    if tag == b"C":
        return complex(*parts)
    if tag == b"R":
        return range(*parts)
    if tag == b"L":
        name, arguments = parts
        if name not in LIBRARY:
            raise ValueError(f"{name} is no data")
        module, _, kind = name.rpartition(".")
        return getattr(__import__(module), kind)(*arguments)
    return CONTAINERS[tag](parts)


CONTAINERS: dict[bytes, Any] = {b"l": list, b"t": tuple, b"s": set, b"f": frozenset}

TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        list,
        tuple,
        set,
        frozenset,
        dict,
        object,
        type(None),
    )
}
"""Types that count as data."""

LIBRARY: dict[str, Callable[[Any], list[Any]]] = {
    "collections.deque": lambda value: [list(value)],
    "decimal.Decimal": lambda value: [str(value)],
    "fractions.Fraction": lambda value: [value.numerator, value.denominator],
    "datetime.date": lambda value: [value.year, value.month, value.day],
    "datetime.time": lambda value: [value.hour, value.minute, value.second, value.microsecond],
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
    "datetime.datetime": lambda value: [*value.timetuple()[:6], value.microsecond],
}
"""Classes of the standard library that count as data, and what they are made from."""


def _piece(tag: bytes, *contents: bytes) -> bytes:
    content = b"".join(contents)
    return tag + len(content).to_bytes(4, "big") + content


def _pieces(content: bytes) -> list[bytes]:
    pieces, start = [], 0
    while start < len(content):
        end = start + 5 + int.from_bytes(content[start + 1 : start + 5], "big")
        pieces.append(content[start:end])
        start = end
    return pieces


def encode_error(error: BaseException) -> bytes:
    """The names of an exception's classes, the nearest first, and its text."""
    try:
        text = str(error)[:1000]
    except Exception:  # the text is the program's own code
        text = ""
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    return f"{names}\n{text}".encode(errors="replace")
