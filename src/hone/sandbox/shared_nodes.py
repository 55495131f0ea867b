"""The nodes that all sandboxes of an event loop share: the one inside this process, and one session with each address."""

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from hone.sandbox.errors import SandboxError
from hone.sandbox.node.node import Node
from hone.sandbox.wire.remote import RemoteNode
from hone.schema.sandboxes import RUNTIMES


async def embedded_node() -> Node:
    """The node inside this process: one for each event loop, begun at first use and ended with the loop."""
    loop = asyncio.get_running_loop()
    if (embedded := _embedded.get(loop)) is None:
        embedded = _embedded[loop] = _Embedded()
    return await embedded.node()


class _Embedded:
    """A node that an event loop ends when it shuts down, as it does with every generator that is not at its end."""

    def __init__(self) -> None:
        self._generator: AsyncGenerator[Node] | None = None
        self._begun: asyncio.Task[Node] | None = None

    async def node(self) -> Node:
        if self._begun is not None and self._begun.done() and (self._begun.cancelled() or self._begun.exception()):
            self._begun = None
        if self._begun is None:
            self._begun = asyncio.get_running_loop().create_task(self._begin())
        return await asyncio.shield(self._begun)

    async def _begin(self) -> Node:
        self._generator = _running_node()
        return await anext(self._generator)


async def _running_node() -> AsyncGenerator[Node]:
    loop = asyncio.get_running_loop()
    try:
        async with Node(runtimes=RUNTIMES) as node:
            yield node
    finally:
        _embedded.pop(loop, None)


_embedded: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Embedded] = weakref.WeakKeyDictionary()


async def remote_node(address: str, token: str | None, reconnect_seconds: float | None) -> RemoteNode:
    """One session for all sandboxes of an event loop at one address, which the loop closes when it shuts down.

    token: None is that in $HONE_SANDBOX_TOKEN; an empty one is none.
    """
    if token is None:
        token = os.environ.get("HONE_SANDBOX_TOKEN", "")
    links = _remote.setdefault(asyncio.get_running_loop(), {})
    key = (address, token, reconnect_seconds)
    link = links.get(key)
    if link is None or link.node.is_lost:
        lost = link
        node = RemoteNode(address, token, reconnect_seconds=reconnect_seconds)
        link = links[key] = _Link(node, _connection(node))  # at once: others come while the lost one is closed
        await anext(link.generator)
        if lost is not None:
            await lost.generator.aclose()
    try:
        await link.node.connected()
    except (SandboxError, ValueError):
        if link.node.is_lost and links.get(key) is link:  # or every token that is refused would be remembered
            del links[key]
            await link.generator.aclose()
        raise
    return link.node


async def _connection(node: RemoteNode) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await node.close()


@dataclass(frozen=True, slots=True)
class _Link:
    node: RemoteNode
    generator: AsyncGenerator[None]


_remote: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str, float | None], _Link]] = (
    weakref.WeakKeyDictionary()
)
