"""Keeps the inference server at the wanted policy version and tells the decisions what it serves."""

import asyncio
import logging
import time
from collections.abc import Callable

from hone.inference.client import AdminClient, EngineError, EngineRefused
from hone.observability.logs import fields
from hone.observability.spans import Spans
from hone.orchestrator.events import EngineLost, EngineServes
from hone.transport.folders import RunFolder

logger = logging.getLogger("hone.orchestrator.engine")

HEALTH_SECONDS = 10.0
POLL_SECONDS = 2.0
RETRY_SECONDS = 0.3
REMIND_SECONDS = 30.0
MAX_REFUSALS = 5


class WeightsRefusedError(RuntimeError):
    """The inference server answers, but will not load a policy version."""


class EngineDriver:
    """One conversation with the server at a time: load what is wanted, else look whether it is still there."""

    def __init__(
        self, client: AdminClient, folder: RunFolder, post: Callable[[EngineServes | EngineLost], None], spans: Spans
    ) -> None:
        self._client = client
        self._folder = folder
        self._post = post
        self._spans = spans
        self._wanted: int | None = None
        self._served: int | None = None
        self._num_refusals: dict[int, int] = {}
        self._changed = asyncio.Event()

    def want(self, version: int) -> None:
        """Load this version as soon as possible; its `EngineServes` follows."""
        self._wanted = version
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled; raises `WeightsRefusedError` when a version is refused again and again."""
        silent_since: float | None = None
        while True:
            try:
                if self._served is not None and self._wanted is not None:
                    await self._load(self._wanted)
                else:
                    await self._look()
                silent_since = None
            except EngineRefused as error:
                self._count_refusal(error)
                await asyncio.sleep(RETRY_SECONDS)
            except (EngineError, TimeoutError) as error:
                self._lose(error)
                now = time.monotonic()
                silent_since = silent_since or now
                if now - silent_since >= REMIND_SECONDS:
                    logger.warning("the inference server does not answer: %s", error)
                    silent_since = now
                await asyncio.sleep(RETRY_SECONDS)  # the server has its own reasons to be away; do not spin
            else:
                await self._rest()

    def _count_refusal(self, error: EngineRefused) -> None:
        version = self._wanted or 0
        count = self._num_refusals.get(version, 0) + 1
        self._num_refusals = {version: count}
        logger.warning("the inference server refuses version %d: %s", version, error)
        if count >= MAX_REFUSALS:
            raise WeightsRefusedError(
                f"the inference server refused version {version} {count} times: {error}"
            ) from error

    async def _rest(self) -> None:
        if self._wanted is not None:
            return
        self._changed.clear()
        try:
            async with asyncio.timeout(POLL_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _look(self) -> None:
        async with asyncio.timeout(HEALTH_SECONDS):
            health = await self._client.health()
        if not health.ready:
            raise EngineError("its engine has failed")
        if health.version != self._served:
            logger.info("inference server found", extra=fields(version=health.version))
            self._serve(health.version)

    async def _load(self, version: int) -> None:
        folder = self._folder.weights_of(version)
        if not folder.exists():  # pruned, because newer ones are there
            version, folder = self._folder.newest_weights()
        with self._spans.span("broadcast", version=version):
            await self._client.load(version, str(folder.absolute()))
        if self._wanted is not None and self._wanted <= version:
            self._wanted = None
        self._serve(version)

    def _serve(self, version: int) -> None:
        self._served = version
        self._post(EngineServes(version))

    def _lose(self, error: Exception) -> None:
        # What is wanted is asked for again when the server is back: it may come back with that very version.
        self._wanted = None
        if self._served is not None:
            logger.warning("lost the inference server: %s", error)
            self._served = None
            self._post(EngineLost())
