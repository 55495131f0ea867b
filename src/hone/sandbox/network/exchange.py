"""Bytes between a client of a proxy and a host: tunnels, requests and answers, counted and never waited for in vain."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from hone.sandbox.network.client_hello import UNRECOGNIZED_NAME, read_hello
from hone.sandbox.network.http1 import BadMessage, Body, Request, Response, parse_chunk_size, parse_response
from hone.schema.sandbox_network import Verdict, normal_host

HELLO_SECONDS = 10.0
CLOSE_SECONDS = 2.0
LINGER_SECONDS = 1.0
LINGER_BYTES = 1 << 20
CHUNK_BYTES = 64 << 10
MAX_LINE_BYTES = 1 << 10
MAX_TRAILERS = 32
MAX_INTERIM = 8
END_OF_HEAD = b"\r\n\r\n"


class Refused(Exception):
    """A request that is not carried out. status: of the answer. problem: for whoever runs the sandbox's programs."""

    def __init__(self, verdict: Verdict, status: int, problem: str) -> None:
        super().__init__(problem)
        self.verdict = verdict
        self.status = status
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection. address: what was connected to; empty for a client's."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    address: str = ""

    async def linger(self) -> None:
        """Let it read what it was sent: with something unread on this side, closing would take that away from it."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                self.writer.write_eof()
                left = LINGER_BYTES
                while left > 0 and (data := await self.reader.read(left)):
                    left -= len(data)

    async def hang_up(self) -> None:
        """Close it; one that does not take what was written is given up soon."""
        self.writer.close()
        try:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self.writer.wait_closed()
        finally:
            self.writer.transport.abort()


class Meter:
    """The bytes of one request: how many went up to the host and down, and that they move; an async context manager.

    After idle_seconds without any, what runs in it ends with `TimeoutError`. spend: is told of each piece before it goes;
    it returns when that may be, and raises `Refused` where it may not. is_answered: whether the client has had a part of
    its answer already.
    """

    def __init__(self, idle_seconds: float, spend: Callable[[int], Awaitable[None]]) -> None:
        self.num_up = 0
        self.num_down = 0
        self.is_answered = False
        self._idle_seconds = idle_seconds
        self._spend = spend
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        self._timeout = asyncio.timeout(self._idle_seconds)
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._timeout.__aexit__(kind, error, trace)

    async def up(self, host: Peer, data: bytes) -> None:
        """Send a piece to the host."""
        self.num_up += len(data)
        await self._move(host, data)

    async def down(self, client: Peer, data: bytes) -> None:
        """Send a piece to the client."""
        self.num_down += len(data)
        self.is_answered = True
        await self._move(client, data)

    async def _move(self, peer: Peer, data: bytes) -> None:
        await self._spend(len(data))
        if not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._idle_seconds)
        peer.writer.write(data)
        await peer.writer.drain()


async def tunnel(client: Peer, host: Peer, name: str, meter: Meter, *, is_tcp: bool) -> None:
    """Carry a tunnel to its end. is_tcp: whatever is in it; otherwise it is TLS for that host. Raises `Refused`."""
    meter.is_answered = True
    client.writer.write(b"HTTP/1.1 200 Connection established" + END_OF_HEAD)
    if not is_tcp:
        try:
            await meter.up(host, await _checked_hello(client, name))
        except Refused:
            client.writer.write(UNRECOGNIZED_NAME)
            raise
    await both(_pump(client, host, meter.up), _pump(host, client, meter.down))


async def exchange(request: Request, client: Peer, host: Peer, meter: Meter) -> bool:
    """Carry one request and its answer; whether the client's connection may have another one. Raises `Refused`."""
    loop = asyncio.get_running_loop()
    sending = loop.create_task(_send(request, client, host, meter))
    receiving = loop.create_task(_receive(request, client, host, meter))
    try:
        await asyncio.wait((sending, receiving), return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
        is_kept = await receiving
        return is_kept and sending.done() and sending.result()
    finally:
        for task in (sending, receiving):
            task.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)


async def both(first: Awaitable[None], second: Awaitable[None]) -> None:
    """Until both are done, or one fails."""
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _checked_hello(client: Peer, name: str) -> bytes:
    """The beginning of a tunnel, if it is a hello that asks for this host in the open."""
    data = b""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            while isinstance(hello := read_hello(data), int):
                data += await client.reader.readexactly(hello)
        if hello.is_hiding:
            raise ValueError("it hides the name of the host it asks for")
        if hello.name is not None and normal_host(hello.name) != name:
            raise ValueError(f"it asks for {hello.name[:100]!r}")
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("it hung up") from None
    except (ValueError, TimeoutError) as error:
        what = str(error) or f"nothing came within {HELLO_SECONDS:g} s"
        advice = "a rule with +tcp lets anything through"
        raise Refused(Verdict.BAD_NAME, 403, f"the tunnel has no TLS for {name}: {what}; {advice}") from None
    return data


async def _pump(source: Peer, target: Peer, move: Callable[[Peer, bytes], Awaitable[None]]) -> None:
    while data := await source.reader.read(CHUNK_BYTES):
        await move(target, data)
    if target.writer.can_write_eof():
        target.writer.write_eof()


async def _send(request: Request, client: Peer, host: Peer, meter: Meter) -> bool:
    """The request; whether the host took all of it. Where it did not, it may have answered all the same."""
    is_taken = await _is_taken(meter.up(host, request.encode()))
    async for piece in _pieces(client, request.body):
        if is_taken:
            is_taken = await _is_taken(meter.up(host, _framed(piece) if request.body.is_chunked else piece))
    return is_taken


async def _is_taken(sending: Awaitable[None]) -> bool:
    try:
        await sending
    except OSError:
        return False
    return True


async def _receive(request: Request, client: Peer, host: Peer, meter: Meter) -> bool:
    """The answer; whether the client knows where it ended without the connection's end."""
    response = await _response(request, client, host, meter)
    is_framed = response.body.is_chunked and request.minor == 1
    is_kept = request.is_kept and (is_framed or (response.body.num_bytes is not None))
    shown = replace(response, body=replace(response.body, is_chunked=is_framed))
    await meter.down(client, shown.encode(is_kept=is_kept))
    try:
        async for piece in _pieces(host, response.body):
            await meter.down(client, _framed(piece) if is_framed else piece)
    except BadMessage as error:
        raise Refused(Verdict.UNREACHABLE, 502, f"{request.host} answers with {error}") from None
    return is_kept


async def _response(request: Request, client: Peer, host: Peer, meter: Meter) -> Response:
    """The head of the final answer; those before it are handed on."""
    try:
        for _ in range(MAX_INTERIM):
            response = parse_response(await host.reader.readuntil(END_OF_HEAD), request.method)
            if not response.is_interim:
                return response
            if request.minor == 1:
                await meter.down(client, response.encode(is_kept=True))
        problem = "with too many answers before the one"
    except asyncio.IncompleteReadError as error:
        problem = "with half an answer" if error.partial else "by hanging up"
    except OSError as error:
        problem = f"by hanging up: {error}"
    except (BadMessage, asyncio.LimitOverrunError) as error:
        problem = f"with what is no HTTP: {error}"
    raise Refused(Verdict.UNREACHABLE, 502, f"{request.host} answers {problem}")


async def _pieces(peer: Peer, body: Body) -> AsyncIterator[bytes]:
    """A body, cut as it comes; of a chunked one the content, and an empty piece at the end. Raises `BadMessage`."""
    if body.is_chunked:
        async for piece in _chunks(peer.reader):
            yield piece
        return
    left = body.num_bytes
    while left != 0:
        data = await peer.reader.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
        if not data:
            if left is None:
                return
            raise BadMessage("half a body")
        if left is not None:
            left -= len(data)
        yield data


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while left := parse_chunk_size(await _line(reader)):
        while left:
            data = await reader.read(min(CHUNK_BYTES, left))
            if not data:
                raise BadMessage("half a chunk")
            left -= len(data)
            yield data
        if await _line(reader):
            raise BadMessage("a chunk longer than its size")
    for _ in range(MAX_TRAILERS):
        if not await _line(reader):
            yield b""
            return
    raise BadMessage("too many trailers")


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        line = await reader.readuntil(b"\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise BadMessage("half a chunk") from None
    if len(line) > MAX_LINE_BYTES:
        raise BadMessage("a long line in a chunked body")
    return line[:-2]


def _framed(piece: bytes) -> bytes:
    """As a chunk of its own; an empty piece is the end."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)
