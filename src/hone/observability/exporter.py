"""Prometheus metrics and the health of a process, served by its own event loop."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

REQUEST_SECONDS = 5.0
MAX_REQUEST_BYTES = 16 << 10
MAX_CONNECTIONS = 32


class Exporter:
    """Serves `/metrics`, and `/health`: 200, or 503 with what is the trouble; an async context manager.

    It runs in the event loop whose numbers it tells, so that none of them is half changed when it is read.

    Example::

        async with Exporter([GatewayCollector(gateway)], 9300, trouble=lambda: "it stops" if gateway.stops else ""):
            ...

    port: 0 takes any that is free; `port` says which. trouble: why nobody should be sent here now; empty if they may.
    Raises `ValueError` where the address is taken.
    """

    def __init__(
        self,
        collectors: Sequence[Collector],
        port: int,
        *,
        host: str = "127.0.0.1",
        trouble: Callable[[], str] = lambda: "",
    ) -> None:
        self.host = host
        self.port = port
        self._trouble = trouble
        self._registry = CollectorRegistry()
        for collector in collectors:
            self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self._num_connections = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_server(self._answer, self.host, self.port, limit=MAX_REQUEST_BYTES)
        except OSError as error:
            raise ValueError(
                f"cannot serve metrics on {self.host}:{self.port} ({error.strerror}); choose another port"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                if self._num_connections <= MAX_CONNECTIONS:
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._response(head))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked is slow, gone, or speaks no HTTP
        finally:
            self._num_connections -= 1
            with contextlib.suppress(OSError):
                writer.close()

    def _response(self, head: bytes) -> bytes:
        method, _, rest = head.decode("latin-1").partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            status, kind, body = HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"GET it\n"
        elif path == "/metrics":
            status, kind, body = HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        elif path == "/health":
            problem = self._trouble()
            status = HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK
            kind, body = "text/plain", f"{problem or 'fine'}\n".encode()
        else:
            status, kind, body = HTTPStatus.NOT_FOUND, "text/plain", b"there are /metrics and /health\n"
        lines = (
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else body)
