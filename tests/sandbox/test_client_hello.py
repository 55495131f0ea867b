"""The server name in a client's hello, as a real client writes it and as nobody should."""

import contextlib
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.sandbox.network.client_hello import MAX_RECORDS, Hello, read_hello


def real_hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def records(message: bytes, size: int) -> bytes:
    pieces = [message[begin : begin + size] for begin in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


def block(data: bytes, size: int = 2) -> bytes:
    return len(data).to_bytes(size, "big") + data


def hello(*extensions: tuple[int, bytes], rest: bytes = b"") -> bytes:
    """A whole message, in one record."""
    written = b"".join(kind.to_bytes(2, "big") + block(content) for kind, content in extensions)
    body = b"\x03\x03" + bytes(32) + block(b"", 1) + block(b"\x13\x01") + block(b"\0", 1) + block(written) + rest
    return records(b"\x01" + block(body, 3), 1 << 14)


def server_name(name: bytes) -> tuple[int, bytes]:
    return 0, block(b"\0" + block(name))


@pytest.mark.parametrize("size", [1 << 14, 100, 33])
def test_a_real_hello_says_its_name_however_it_is_cut(size):
    data = real_hello("example.org")
    assert read_hello(data) == Hello("example.org", is_hiding=False)
    assert read_hello(records(data[5:], size)) == Hello("example.org", is_hiding=False)
    assert read_hello(real_hello(None)) == Hello(None, is_hiding=False)


@given(st.data())
def test_a_part_of_a_hello_asks_for_more_and_never_for_too_much(data):
    whole = records(real_hello("example.org")[5:], data.draw(st.sampled_from([50, 300, 1 << 14])))
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    wanted = read_hello(part)
    assert isinstance(wanted, int)
    assert 0 < wanted <= len(whole) - len(part)


@given(st.binary(max_size=400))
def test_bytes_are_a_hello_a_part_of_one_or_none(data):
    for text in (data, b"\x16\x03\x01" + data, records(b"\x01" + block(data, 3), 100), hello((0, data))):
        with contextlib.suppress(ValueError):
            read_hello(text)


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_damaged_hello_does_no_harm(position, damage):
    whole = bytearray(real_hello("example.org"))
    position %= len(whole)
    whole[position : position + len(damage)] = damage
    with contextlib.suppress(ValueError):
        read_hello(bytes(whole))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"GET / HTTP/1.1\r\n", "no TLS"),
        (b"\x16\x02", "no TLS"),
        (b"\x80", "no TLS"),
        (b"\x16\x03\x01\0\0", "a record of 0"),
        (b"\x16\x03\x01\xff\xff", "a record of 65535"),
        (b"\x16\x03\x01\0\x01\x02", "not a hello"),
        (records(b"\x01\xff\xff\xff", 9), "a hello of 16777215"),
        (records(b"\x01" + block(bytes(2000), 3), 1), f"more than {MAX_RECORDS}"),
        (hello(server_name(b"a.b"), server_name(b"c.d")), "extension 0 twice"),
        (hello((0, block(b"\0" + block(b"a.b") + b"\0" + block(b"c.d")))), "more than one"),
        (hello((0, block(b"\1" + block(b"a.b")))), "unknown kind"),
        (hello((0, b"")), "too early"),
        (hello(server_name(b"a.b"), rest=b"x"), "behind"),
    ],
)
def test_what_is_no_hello_is_said(data, problem):
    with pytest.raises(ValueError, match=problem):
        read_hello(data)


def test_names_that_are_hidden_are_noticed():
    assert read_hello(hello(server_name(b"a.b"), (0xFE0D, b"\0"))) == Hello("a.b", is_hiding=True)
    with pytest.raises(ValueError, match="ascii"):
        read_hello(hello(server_name(b"\xff.b")))
