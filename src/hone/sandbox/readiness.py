"""Waiting for descriptors in the event loop."""

import asyncio
from collections.abc import Callable


async def until_ready(descriptor: int, watch: Callable[..., None], unwatch: Callable[[int], bool]) -> None:
    """Wait with a pair of the loop's add_reader and remove_reader, or of its writers."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    watch(descriptor, _settle, ready)
    try:
        await ready
    finally:
        unwatch(descriptor)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
