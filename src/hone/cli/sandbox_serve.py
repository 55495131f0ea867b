"""`hone sandbox serve`: a node from its start to its end, which signals decide."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hone.cli.sandbox_metrics import metrics_served
from hone.observability.spans import Spans
from hone.sandbox.node.node import Node
from hone.sandbox.wire.serve import NodeServer

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

ANSWER_SECONDS = 1.0  # for those who have just closed the last sandbox to hear of it


@dataclass(frozen=True, slots=True)
class Observation:
    """How a node is watched. port: of its metrics, None for none. spans: the file of its pieces of work."""

    port: int | None
    host: str
    spans: Path | None


async def serve_node(
    name: str,
    node_of: Callable[..., Node],
    server_of: Callable[[Node], NodeServer],
    http_of: Callable[[Node], contextlib.AbstractAsyncContextManager[str]],
    observation: Observation,
    drain_seconds: float,
) -> None:
    """Serve until SIGINT or SIGTERM. The first SIGTERM lets the sandboxes that are there live on for `drain_seconds`."""
    stops = _Stops()
    with _spans(observation.spans, name) as spans:
        async with (
            node_of(name, spans=spans) as node,
            _node_metrics(node, observation) as metrics,
            server_of(node) as server,
            http_of(node) as url,
        ):
            lost = f"; {len(node.lost)} sandboxes were lost with the node before" if node.lost else ""
            http = f", /run_code at {url}" if url else ""
            typer.echo(f"node {name} serves at {server.address}{http}{metrics}{lost}")
            if await stops.first() is signal.SIGTERM:
                await _drain(node, drain_seconds, stops)
                await server.until_answered(ANSWER_SECONDS)


class _Stops:
    """The signals that end this process, one after another."""

    def __init__(self) -> None:
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signals.put_nowait, number)

    async def first(self) -> signal.Signals:
        return await self._signals.get()


async def _drain(node: Node, seconds: float, stops: _Stops) -> None:
    draining = asyncio.create_task(node.until_empty(seconds))
    again = asyncio.create_task(stops.first())
    try:
        await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (draining, again):
            task.cancel()
        await asyncio.wait([draining, again])


@contextlib.contextmanager
def _spans(path: Path | None, name: str) -> Iterator[Spans | None]:
    if path is None:
        yield None
        return
    spans = Spans(path, f"node-{name}")
    try:
        yield spans
    finally:
        spans.close()


@contextlib.asynccontextmanager
async def _node_metrics(node: Node, observation: Observation) -> AsyncIterator[str]:
    def collectors() -> "Sequence[Collector]":
        from hone.sandbox.node.metrics import NodeCollector  # prometheus_client belongs to an extra

        return [NodeCollector(node)]

    def trouble() -> str:
        return "it takes no new sandboxes" if node.is_draining else ""

    async with metrics_served(observation.port, observation.host, collectors, trouble) as where:
        yield where
