"""Requests to the proxy: what can be read in one way only is read, all else is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.sandbox.network.http1 import BadMessage, Body, parse_chunk_size, parse_request, parse_response, refusal


def head(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def test_a_request_is_rewritten_for_its_host():
    request = parse_request(
        head(
            "POST http://API.example.org./v1?a=b HTTP/1.1",
            "Host: api.example.org:80",
            "Proxy-Connection: keep-alive",
            "Connection: keep-alive, X-Hop",
            "X-Hop: 1",
            "TE: trailers",
            "Proxy-Authorization: Basic x",
            "Upgrade: h2c",
            "Content-Length: 3",
            "X: y",
        )
    )
    assert (request.host, request.port, request.is_kept, request.body) == ("api.example.org", 80, True, Body(3))
    assert request.encode() == head(
        "POST /v1?a=b HTTP/1.1", "Host: api.example.org", "Content-Length: 3", "X: y", "Connection: close"
    )


@pytest.mark.parametrize(
    ("target", "path"),
    [("http://a.b", "/"), ("http://a.b?x", "/?x"), ("http://a.b:8080/x?y", "/x?y"), ("HTTP://a.b/", "/")],
)
def test_paths_are_found(target, path):
    port = ":8080" if "8080" in target else ""
    assert parse_request(head(f"GET {target} HTTP/1.1", f"Host: a.b{port}")).target == path


def test_a_tunnel_is_asked_for():
    request = parse_request(head("CONNECT Pypi.org:443 HTTP/1.0"))
    assert (request.is_tunnel, request.host, request.port) == (True, "pypi.org", 443)
    assert parse_request(head("CONNECT [::1]:443 HTTP/1.1", "Host: x")).host == "::1"


BAD = [
    (["GET / HTTP/1.1", "Host: a.b"], "this is a proxy"),
    (["GET http://a.b/ HTTP/1.1"], "0 Host"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b", "Host: a.b"], "2 Host"),
    (["GET http://a.b/ HTTP/1.1", "Host: c.d"], "another host"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b:81"], "another host"),
    (["GET http://a.b@c.d/ HTTP/1.1", "Host: c.d"], "neither a name"),
    (["GET http://a.b#@c.d/ HTTP/1.1", "Host: a.b"], "proxy"),
    (["GET http://a.b\\@c.d/ HTTP/1.1", "Host: a.b"], "neither a name"),
    (["GET https://a.b/ HTTP/1.1", "Host: a.b"], "CONNECT"),
    (["G" * 33 + " http://a.b/ HTTP/1.1", "Host: a.b"], "a method of more than 32"),
    (["GET http://a.b/ x HTTP/1.1", "Host: a.b"], "not a request"),
    (["GET http://a.b/ HTTP/1.1 ", "Host: a.b"], "not a request"),
    (["GET  http://a.b/ HTTP/1.1", "Host: a.b"], "not a request"),
    (["GET http://a.b/ HTTP/2.0", "Host: a.b"], "neither HTTP"),
    (["GET http://a.b/\xe4 HTTP/1.1", "Host: a.b"], "not a request"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Content-Length: 1", "Content-Length: 1"], "length"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Content-Length: 1, 1"], "length"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Content-Length: +1"], "length"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Content-Length: 0x1"], "length"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Content-Length:"], "length"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Content-Length: 1", "Transfer-Encoding: chunked"], "transfer coding"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Transfer-Encoding: gzip, chunked"], "chunked alone"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Transfer-Encoding: chunked", "Transfer-Encoding: x"], "chunked alone"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Transfer-Encoding: \x0bchunked"], "malformed"),
    (["POST http://a.b/ HTTP/1.0", "Host: a.b", "Transfer-Encoding: chunked"], "chunked alone"),
    (["POST http://a.b/ HTTP/1.1", "Host: a.b", "Content-Length : 1"], "malformed"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b", " folded: x"], "malformed"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b", "X: a\rY: b"], "malformed"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b", "X: a\nY: b"], "malformed"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b", "X: a\0"], "malformed"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b", "no colon"], "malformed"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b", "Connection: host"], "Connection names"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b", "Connection: close, Content-Length"], "Connection names"),
    (["GET http://a.b/ HTTP/1.1", "Host: a.b", *["X: y"] * 200], "more than"),
    (["CONNECT a.b HTTP/1.1"], "without a port"),
    (["CONNECT http://a.b:443 HTTP/1.1"], "neither a name"),
    (["CONNECT 2130706433:80 HTTP/1.1"], "usual spelling"),
    (["CONNECT 0x7f.1:80 HTTP/1.1"], "usual spelling"),
    (["CONNECT a.b:443 HTTP/1.1", "Content-Length: 5"], "with a body"),
    (["CONNECT a.b:443 HTTP/1.1", "Transfer-Encoding: chunked"], "with a body"),
    (["\x16\x03\x01"], "not a request"),
]


@pytest.mark.parametrize(("lines", "problem"), BAD)
def test_what_could_be_read_in_two_ways_is_refused(lines, problem):
    with pytest.raises(BadMessage, match=problem):
        parse_request(head(*lines))


@given(st.binary(max_size=300))
def test_bytes_are_a_request_or_bad(data):
    for text in (data, data + b"\r\n\r\n", b"GET http://a.b/ HTTP/1.1\r\nHost: a.b\r\n" + data + b"\r\n\r\n"):
        try:
            request = parse_request(text)
        except BadMessage:
            continue
        again = request.encode().replace(b" /", b" http://a.b/", 1)
        assert request.is_tunnel or parse_request(again).body == request.body


@given(
    st.lists(
        st.sampled_from(
            [
                "Content-Length: 5",
                "Transfer-Encoding: chunked",
                "Connection: close",
                "Connection: x-a",
                "X-a: b",
                "TE: x",
            ]
        ),
        max_size=5,
    )
)
def test_no_request_is_handed_on_with_two_framings(fields):
    try:
        request = parse_request(head("POST http://a.b/ HTTP/1.1", "Host: a.b", *fields))
    except BadMessage:
        return
    sent = request.encode().lower()
    framings = sent.count(b"\r\ncontent-length:") + sent.count(b"\r\ntransfer-encoding:")
    assert framings == (not request.body.is_empty)
    assert sent.count(b"\r\nhost:") == 1
    assert sent.count(b"\r\nconnection: close\r\n") == 1


def test_answers_say_how_long_they_are():
    assert parse_response(head("HTTP/1.1 200 OK", "Content-Length: 5"), "GET").body == Body(5)
    assert parse_response(head("HTTP/1.1 200 OK", "Content-Length: 5"), "HEAD").body == Body()
    assert parse_response(head("HTTP/1.0 200"), "GET").body == Body(None)
    assert parse_response(head("HTTP/1.1 304 Not Modified", "Content-Length: 5"), "GET").body == Body()
    both = parse_response(head("HTTP/1.1 200 OK", "Content-Length: 5", "Transfer-Encoding: chunked"), "GET")
    assert both.body.is_chunked
    assert b"ontent-Length" not in both.encode(is_kept=True)
    assert parse_response(head("HTTP/1.1 100 Continue"), "POST").is_interim


@pytest.mark.parametrize("line", ["HTTP/1.1 101 Switching Protocols", "HTTP/2 200", "ICY 200 OK", "HTTP/1.1 20 OK", ""])
def test_what_is_no_answer_is_refused(line):
    with pytest.raises(BadMessage):
        parse_response(head(line), "GET")


@given(st.binary(max_size=30))
def test_sizes_of_chunks_are_hexadecimal_numbers(line):
    try:
        size = parse_chunk_size(line)
    except BadMessage:
        return
    assert int(line.split(b";")[0].strip(), 16) == size


@pytest.mark.parametrize("line", [b"", b"-1", b"+1", b"0x5", b"5\n", b" 5", b"5;a\nb", b"f" * 17, b"ffffffffffff"])
def test_odd_sizes_of_chunks_are_refused(line):
    with pytest.raises(BadMessage):
        parse_chunk_size(line)


def test_a_refusal_reads_well():
    assert refusal(403, "no rule", "no way") == (
        b"HTTP/1.1 403 no way\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 8\r\n"
        b"X-Hone-Proxy: refused\r\nConnection: close\r\n\r\nno rule\n"
    )
