"""Keeps an event loop with thousands of rollouts from standing still: turns for what is ready, rare garbage collections.

A loop runs everything that is ready before it looks at timers and sockets again. Two thousand rollouts whose answers
arrive together would keep it from heartbeats and from other answers for as long as all of them take.
"""

import asyncio
import gc
from collections import deque
from weakref import WeakKeyDictionary

PER_TICK = 8
"""Rollouts that go on in one tick; each may then compute for milliseconds before anybody notices."""

COLLECT_AFTER = (10_000, 100, 100)
"""As for `gc.set_threshold`. A rollout leaves no cycles behind, but a collection visits what all of them have made since
the one before: 10,000 objects in some 5 ms."""


def spare_collector() -> None:
    """For the main function of a process that runs rollouts: what is loaded by now is never visited again, the rest rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


async def take_turn() -> None:
    """Go on in this tick of the event loop, or in a later one when enough others do; first come, first served."""
    await _turnstile().enter()


class Turnstile:
    """Lets `PER_TICK` tasks go on in each tick of one event loop."""

    __slots__ = ("_is_ticking", "_left", "_loop", "_queue")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._left = PER_TICK
        self._queue: deque[asyncio.Future[None]] = deque()
        self._is_ticking = False

    async def enter(self) -> None:
        if not self._is_ticking:
            self._is_ticking = True
            self._loop.call_soon(self._tick)
        if self._left and not self._queue:
            self._left -= 1
            return
        turn = self._loop.create_future()
        self._queue.append(turn)
        await turn

    def _tick(self) -> None:
        self._left = PER_TICK
        while self._queue and self._left:
            turn = self._queue.popleft()
            if not turn.done():  # its task was cancelled
                turn.set_result(None)
                self._left -= 1
        self._is_ticking = self._left < PER_TICK
        if self._is_ticking:
            self._loop.call_soon(self._tick)


_turnstiles: WeakKeyDictionary[asyncio.AbstractEventLoop, Turnstile] = WeakKeyDictionary()


def _turnstile() -> Turnstile:
    loop = asyncio.get_running_loop()
    turnstile = _turnstiles.get(loop)
    if turnstile is None:
        turnstile = _turnstiles[loop] = Turnstile(loop)
    return turnstile
