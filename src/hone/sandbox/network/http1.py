"""Heads of HTTP/1 messages, read strictly: what two programs could read in two ways is refused."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from hone.schema.sandbox_network import normal_host, split_authority

MAX_HEAD_BYTES = 32 << 10
MAX_FIELDS = 128
MAX_METHOD_CHARACTERS = 32
MAX_CHUNK = 1 << 40

# About one connection and not about the message (RFC 9110, 7.6.1); never handed on.
HOP_BY_HOP = frozenset(
    {
        *("connection", "proxy-connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"),
        *("proxy-authorization", "proxy-authenticate"),
    }
)
FRAMING = frozenset(
    {"host", "content-length", "transfer-encoding", "content-encoding", "content-type", "authorization"}
)

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(rb"[\x21-\x7e]+")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?")
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})( [\t\x20-\x7e\x80-\xff]*)?")
_URL = re.compile(r"http://([^/?#]*)(/[^#]*|\?[^#]*)?", re.IGNORECASE)

Fields = tuple[tuple[str, str], ...]


class BadMessage(ValueError):
    """It is not understood, or could be understood in more than one way. status: what to answer with."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Body:
    """How a message's body is cut: chunked, so many bytes, or with None for them until the connection ends."""

    num_bytes: int | None = 0
    is_chunked: bool = False

    @property
    def is_empty(self) -> bool:
        return self.num_bytes == 0 and not self.is_chunked


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks of a proxy. target: for the host; empty for a tunnel. fields: to hand on, without Host."""

    method: str
    host: str
    port: int
    target: str
    minor: int
    fields: Fields
    body: Body
    is_kept: bool

    @property
    def is_tunnel(self) -> bool:
        return self.method == "CONNECT"

    def encode(self) -> bytes:
        """As the host itself is asked, once."""
        authority = f"[{self.host}]" if ":" in self.host else self.host
        if self.port != 80:
            authority += f":{self.port}"
        head = [f"{self.method} {self.target} HTTP/1.{self.minor}", f"Host: {authority}"]
        return _encode(head, self.fields, is_chunked=self.body.is_chunked, is_kept=False)


@dataclass(frozen=True, slots=True)
class Response:
    """What a host answers. fields: to hand on."""

    status: int
    reason: str
    fields: Fields
    body: Body

    @property
    def is_interim(self) -> bool:
        """Whether another one follows."""
        return self.status < 200

    def encode(self, *, is_kept: bool) -> bytes:
        """As the client hears it."""
        head = [f"HTTP/1.1 {self.status} {self.reason}"]
        if self.is_interim:
            return _encode(head, self.fields, is_chunked=False, is_kept=True)
        return _encode(head, self.fields, is_chunked=self.body.is_chunked, is_kept=is_kept)


def parse_request(head: bytes) -> Request:
    """A request to a proxy, up to and with its empty line. Raises `BadMessage`."""
    first, fields = _parse(head)
    words = first.split(b" ")
    if len(words) != 3 or not _TOKEN.fullmatch(words[0]) or not _TARGET.fullmatch(words[1]):
        raise BadMessage("not a request")
    if len(words[0]) > MAX_METHOD_CHARACTERS:
        raise BadMessage(f"a method of more than {MAX_METHOD_CHARACTERS} characters", 501)
    if words[2] not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise BadMessage("neither HTTP/1.0 nor HTTP/1.1", 505)
    method, target, minor = words[0].decode(), words[1].decode(), int(words[2][-1:])
    if method == "CONNECT":
        return _tunnel(target, minor, fields)
    host, port, path = _absolute(method, target)
    _check_host(fields, host, port, is_required=minor == 1)
    body = _request_body(fields, minor)
    kept = minor == 1 and "close" not in _tokens(fields, "connection") | _tokens(fields, "proxy-connection")
    own = tuple(field for field in _without_hops(fields) if field[0].lower() != "host")
    return Request(method, host, port, path, minor, own, body, kept)


def parse_response(head: bytes, method: str) -> Response:
    """An answer to a request of this method, up to and with its empty line. Raises `BadMessage`."""
    first, fields = _parse(head)
    found = _STATUS.fullmatch(first)
    if found is None:
        raise BadMessage("not an answer")
    status = int(found[2])
    if status == 101:
        raise BadMessage("it changes to another protocol, which was not asked for")
    body = Body() if status < 200 or status in (204, 304) or method == "HEAD" else _response_body(fields)
    own = _without_hops(fields)
    if body.is_chunked:
        own = tuple(field for field in own if field[0].lower() != "content-length")
    return Response(status, (found[3] or b"").decode("latin-1").strip(), own, body)


def parse_chunk_size(line: bytes) -> int:
    """How long the next piece of a chunked body is, from its line without the end; 0 is the last."""
    found = _CHUNK.fullmatch(line)
    if found is None or (size := int(found[1], 16)) > MAX_CHUNK:
        raise BadMessage("no size of a chunk")
    return size


def refusal(status: int, problem: str, reason: str = "") -> bytes:
    """An answer of the proxy's own, after which it hangs up. reason: in place of the status's usual words."""
    content = f"{problem}\n".encode()
    return (
        f"HTTP/1.1 {status} {reason or HTTPStatus(status).phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(content)}\r\nX-Hone-Proxy: refused\r\nConnection: close\r\n\r\n"
    ).encode("latin-1", errors="replace") + content


def _parse(head: bytes) -> tuple[bytes, Fields]:
    """The first line and the fields."""
    if not head.endswith(b"\r\n\r\n"):
        raise BadMessage("it ends too early")
    lines = head[:-4].split(b"\r\n")
    if len(lines) - 1 > MAX_FIELDS:
        raise BadMessage(f"more than {MAX_FIELDS} header fields", 431)
    fields = []
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadMessage("a malformed header field")
        fields.append((name.decode(), value.strip(b" \t").decode("latin-1")))
    return lines[0], tuple(fields)


def _tunnel(target: str, minor: int, fields: Fields) -> Request:
    host, port = _authority(target)
    if port is None:
        raise BadMessage("CONNECT without a port")
    if not _request_body(fields, 1).is_empty:
        raise BadMessage("CONNECT with a body")
    return Request("CONNECT", host, port, "", minor, (), Body(), is_kept=False)


def _absolute(method: str, target: str) -> tuple[str, int, str]:
    """Host, port and path with query of an http URL."""
    found = _URL.fullmatch(target)
    if found is None:
        if target.lower().startswith("https:"):
            raise BadMessage("https goes through a tunnel; ask with CONNECT")
        raise BadMessage("this is a proxy: ask for http://HOST/PATH, or with CONNECT for HOST:PORT")
    host, port = _authority(found[1])
    path = found[2] or ("*" if method == "OPTIONS" else "/")
    return host, port or 80, path if path[0] != "?" else "/" + path


def _authority(text: str) -> tuple[str, int | None]:
    """Host and port. What is wrong with them is not repeated: a password may stand there."""
    try:
        name, port = split_authority(text)
        return normal_host(name), port
    except ValueError:
        raise BadMessage("the host is neither a name nor an address in the usual spelling") from None


def _check_host(fields: Fields, host: str, port: int, *, is_required: bool) -> None:
    values = _values(fields, "host")
    if len(values) > 1 or (is_required and not values):
        raise BadMessage(f"{len(values)} Host fields")
    for value in values:
        try:
            name, its_port = split_authority(value)
            is_same = (normal_host(name), its_port or 80) == (host, port)
        except ValueError:
            is_same = False
        if not is_same:
            raise BadMessage("the Host field names another host than the request")


def _request_body(fields: Fields, minor: int) -> Body:
    lengths, codings = _values(fields, "content-length"), _values(fields, "transfer-encoding")
    if codings:
        if lengths:
            raise BadMessage("a length and a transfer coding")
        if [coding.lower() for coding in codings] != ["chunked"] or minor == 0:
            raise BadMessage("a transfer coding that is not chunked alone", 501)
        return Body(None, is_chunked=True)
    return Body(_length(lengths) if lengths else 0)


def _response_body(fields: Fields) -> Body:
    codings = _values(fields, "transfer-encoding")
    if codings:
        if [coding.lower() for coding in codings] != ["chunked"]:
            raise BadMessage("a transfer coding that is not chunked alone")
        return Body(None, is_chunked=True)
    lengths = _values(fields, "content-length")
    return Body(_length(lengths)) if lengths else Body(None)


def _length(values: Sequence[str]) -> int:
    if len(values) != 1 or not _LENGTH.fullmatch(values[0].encode("latin-1")):
        raise BadMessage("a length that is no number")
    return int(values[0])


def _values(fields: Fields, name: str) -> list[str]:
    return [value for key, value in fields if key.lower() == name]


def _tokens(fields: Fields, name: str) -> set[str]:
    return {word.strip(" \t").lower() for value in _values(fields, name) for word in value.split(",")}


def _without_hops(fields: Fields) -> Fields:
    named = _tokens(fields, "connection")
    if not FRAMING.isdisjoint(named):
        raise BadMessage("Connection names a field that is not about the connection")
    return tuple(field for field in fields if field[0].lower() not in HOP_BY_HOP | named)


def _encode(head: Iterable[str], fields: Fields, *, is_chunked: bool, is_kept: bool) -> bytes:
    lines = [*head, *(f"{name}: {value}" for name, value in fields)]
    if is_chunked:
        lines.append("Transfer-Encoding: chunked")
    if not is_kept:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
