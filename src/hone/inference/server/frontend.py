"""The HTTP side of the engine's thread: submits requests, hands every open one its tokens, cancels what is left."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from hone.inference.engine.engine import Engine, Finished, NewToken, RequestTooLong, StepResult
from hone.inference.server.errors import ApiError
from hone.inference.server.loop import EngineLoop
from hone.schema.sampling import Generate

MAX_WAITING = 2048


@dataclass(frozen=True, slots=True)
class Arrival:
    """Something that the engine said about one of several requests."""

    index: int
    event: NewToken | Finished


class Frontend:
    """Belongs to the event loop of the HTTP servers; only `deliver` is called in the engine's thread."""

    def __init__(self) -> None:
        self._queues: dict[str, tuple[int, asyncio.Queue[Arrival]]] = {}
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._engine_loop: EngineLoop | None = None

    def attach(self, engine_loop: EngineLoop) -> None:
        """Serve the running event loop with this engine."""
        self._event_loop = asyncio.get_running_loop()
        self._engine_loop = engine_loop

    @property
    def engine_loop(self) -> EngineLoop:
        assert self._engine_loop is not None, "attach() comes first"
        return self._engine_loop

    def deliver(self, result: StepResult) -> None:
        """Take what one step brought: one wake-up of the event loop, however many requests it concerns."""
        if self._event_loop is not None:
            with contextlib.suppress(RuntimeError):  # the event loop closed while the engine finished its step
                self._event_loop.call_soon_threadsafe(self._hand_out, result)

    @contextlib.asynccontextmanager
    async def submit(self, requests: Sequence[Generate], *, streams: bool) -> AsyncIterator[AsyncIterator[Arrival]]:
        """What the engine says about these requests, until all are finished; leaving early cancels them."""
        queue: asyncio.Queue[Arrival] = asyncio.Queue()
        for index, request in enumerate(requests):
            self._queues[request.request_id] = (index, queue)
        try:
            await self._add(requests, streams)
            yield self._arrivals(queue, len(requests))
        finally:
            abandoned = [r.request_id for r in requests if self._queues.pop(r.request_id, None) is not None]
            if abandoned:
                self.engine_loop.call(lambda engine: [engine.cancel(request_id) for request_id in abandoned])

    async def _add(self, requests: Sequence[Generate], streams: bool) -> None:
        def add(engine: Engine) -> None:
            if engine.num_waiting >= MAX_WAITING:
                raise ApiError(
                    503, f"overloaded: {engine.num_waiting} requests wait; try again later", kind="overloaded_error"
                )
            for request in requests:
                engine.add(request, streams=streams)

        try:
            await asyncio.wrap_future(self.engine_loop.call(add))
        except RequestTooLong as error:
            raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except RuntimeError as error:
            raise ApiError(503, str(error), kind="server_error") from error

    async def _arrivals(self, queue: asyncio.Queue[Arrival], count: int) -> AsyncIterator[Arrival]:
        while count:
            arrival = await queue.get()
            count -= isinstance(arrival.event, Finished)
            yield arrival

    def _hand_out(self, result: StepResult) -> None:
        for token in result.new_tokens:
            found = self._queues.get(token.request_id)
            if found is not None:
                found[1].put_nowait(Arrival(found[0], token))
        for finished in result.finished:
            found = self._queues.pop(finished.generated.request_id, None)
            if found is not None:
                found[1].put_nowait(Arrival(found[0], finished))
