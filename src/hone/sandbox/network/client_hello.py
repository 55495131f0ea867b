"""The server name in the first message of a TLS client, read with bounds."""

from dataclasses import dataclass

MAX_HELLO_BYTES = 32 << 10
MAX_RECORD_BYTES = 1 << 14
MAX_RECORDS = 64
HANDSHAKE, CLIENT_HELLO = 22, 1
SERVER_NAME = 0
ENCRYPTED_HELLO = frozenset({0xFE0D, 0xFFCE})  # ECH, and ESNI before it
UNRECOGNIZED_NAME = bytes([21, 3, 1, 0, 2, 2, 112])  # a fatal alert


@dataclass(frozen=True, slots=True)
class Hello:
    """name: the server that is asked for, as it stands there; None without one. is_hiding: another name may be encrypted."""

    name: str | None
    is_hiding: bool


def read_hello(data: bytes) -> Hello | int:
    """The hello at the beginning of a stream, or how many bytes have to come at least. `ValueError`: it is none."""
    message = _message(data)
    if isinstance(message, int):
        return message
    reader = _Reader(message)
    reader.take(2 + 32)  # version and random
    reader.take_block(1)  # session
    if len(reader.take_block(2)) % 2:
        raise ValueError("cipher suites of odd length")
    reader.take_block(1)  # compression
    if reader.is_empty():
        return Hello(None, is_hiding=False)
    extensions = _extensions(_Reader(reader.take_block(2)))
    if not reader.is_empty():
        raise ValueError("something behind the extensions")
    name = _server_name(_Reader(extensions[SERVER_NAME])) if SERVER_NAME in extensions else None
    return Hello(name, is_hiding=not ENCRYPTED_HELLO.isdisjoint(extensions))


def _message(data: bytes) -> bytes | int:
    """The body of the handshake message, put together from the records that it is cut into."""
    message, begin = bytearray(), 0
    for _ in range(MAX_RECORDS):
        head = data[begin : begin + 5]
        if head and (head[0] != HANDSHAKE or head[1:2] not in (b"", b"\x03")):
            raise ValueError("no TLS")
        if len(head) < 5:
            return 5 - len(head) if head else 1  # whoever waits for the other side to begin is seen at its first byte
        size = int.from_bytes(head[3:], "big")
        if not 0 < size <= MAX_RECORD_BYTES:
            raise ValueError(f"a record of {size} bytes")
        begin += 5 + size
        if len(data) < begin:
            return begin - len(data)
        message += data[begin - size : begin]
        if message[0] != CLIENT_HELLO:
            raise ValueError("not a hello of a client")
        if len(message) >= 4:
            wanted = int.from_bytes(message[1:4], "big")
            if wanted > MAX_HELLO_BYTES:
                raise ValueError(f"a hello of {wanted} bytes")
            if len(message) >= 4 + wanted:
                return bytes(message[4 : 4 + wanted])
    raise ValueError(f"a hello in more than {MAX_RECORDS} records")


def _extensions(reader: "_Reader") -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while not reader.is_empty():
        kind = reader.take_number(2)
        if kind in found:
            raise ValueError(f"extension {kind} twice")
        found[kind] = reader.take_block(2)
    return found


def _server_name(extension: "_Reader") -> str:
    names = _Reader(extension.take_block(2))
    if names.take_number(1) != 0:
        raise ValueError("a server name of an unknown kind")
    name = names.take_block(2)
    if not names.is_empty() or not extension.is_empty():
        raise ValueError("more than one server name")
    return name.decode("ascii", errors="strict")


class _Reader:
    """Numbers and blocks of bytes, one after the other; `ValueError` where they go beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def is_empty(self) -> bool:
        return self._position == len(self._data)

    def take(self, size: int) -> bytes:
        begin, self._position = self._position, self._position + size
        if self._position > len(self._data):
            raise ValueError("it ends too early")
        return self._data[begin : self._position]

    def take_number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take_block(self, size: int) -> bytes:
        """A block behind its length, which has so many bytes."""
        return self.take(self.take_number(size))
