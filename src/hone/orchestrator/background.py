"""Tasks beside the loop, whose errors surface in it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Self


class Background:
    """Tasks that run until the body ends; an error in one of them surfaces in `check`."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    def check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()
                raise AssertionError(f"{task.get_name()} ended by itself")

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
