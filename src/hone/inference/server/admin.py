"""Admin routes: pause, resume, load weights; health and metrics."""

import asyncio
import hmac
from collections.abc import Iterator
from pathlib import Path

import msgspec
from fastapi import APIRouter, Depends, Header, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hone.inference.client import Health
from hone.inference.engine.engine import Engine
from hone.inference.server.bodies import LoadBody
from hone.inference.server.errors import ApiError, json_response
from hone.inference.server.loop import EngineLoop
from hone.model.checkpoint import CheckpointError, load_model


def admin_router(loop: EngineLoop, token: str | None, *, controls: bool = True) -> APIRouter:
    """The routes; those under /admin want `Authorization: Bearer <token>` when a token is given.

    controls: without them there are health and metrics alone.
    """
    router = APIRouter()
    registry = CollectorRegistry()
    registry.register(EngineCollector(loop))
    loading = asyncio.Lock()

    async def authorised(authorization: str = Header(default="")) -> None:
        if token is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise ApiError(401, "the admin routes want a bearer token", kind="authentication_error")

    @router.get("/health")
    async def health_route() -> Response:
        found = health(loop)
        return json_response(msgspec.to_builtins(found), 200 if found.ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    if not controls:
        return router

    @router.post("/admin/pause", dependencies=[Depends(authorised)])
    async def pause() -> Response:
        await asyncio.to_thread(loop.pause)
        return json_response({"paused": True})

    @router.post("/admin/resume", dependencies=[Depends(authorised)])
    async def resume() -> Response:
        await asyncio.to_thread(loop.resume)
        return json_response({"paused": False})

    @router.post("/admin/load", dependencies=[Depends(authorised)])
    async def load(body: LoadBody) -> Response:
        async with loading:
            await load_weights(loop, Path(body.folder), body.version)
        return json_response({"version": body.version})

    return router


def health(loop: EngineLoop) -> Health:
    engine = loop.engine
    return Health(
        ready=loop.failure is None,
        version=engine.version,
        running=engine.num_running,
        waiting=engine.num_waiting,
        kv_usage=round(engine.kv_usage, 4),
        paused=loop.paused,
    )


async def load_weights(loop: EngineLoop, folder: Path, version: int) -> None:
    """Read beside the running engine, switch between two of its steps."""
    dtype = loop.engine.model.embedding.dtype
    try:
        model = await asyncio.to_thread(load_model, folder, dtype)
        state = model.state_dict()
        await asyncio.wrap_future(loop.call(lambda engine: engine.load_weights(state, version)))
    except (CheckpointError, ValueError) as error:
        raise ApiError(400, f"cannot load version {version}: {error}", param="folder") from error


class EngineCollector(Collector):
    """The engine's numbers at the moment of a scrape."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        engine = self._loop.engine
        yield GaugeMetricFamily("hone_engine_running_requests", "Requests that run", engine.num_running)
        yield GaugeMetricFamily("hone_engine_waiting_requests", "Requests that wait", engine.num_waiting)
        yield GaugeMetricFamily("hone_engine_kv_usage_ratio", "Share of KV blocks in use", engine.kv_usage)
        yield GaugeMetricFamily("hone_engine_policy_version", "Policy version of the weights", engine.version)
        yield GaugeMetricFamily("hone_engine_paused", "1 while paused", int(self._loop.paused))
        yield CounterMetricFamily("hone_engine_sampled_tokens", "Tokens sampled", engine.num_sampled)
        yield CounterMetricFamily(
            "hone_engine_computed_tokens", "Tokens computed, prefill included", engine.num_computed
        )
        yield CounterMetricFamily("hone_engine_preemptions", "Requests preempted", engine.num_preemptions)


def describe(engine: Engine) -> dict[str, float]:
    """The engine's state as metrics of the run."""
    return {
        "engine/running_requests": engine.num_running,
        "engine/waiting_requests": engine.num_waiting,
        "engine/kv_usage": engine.kv_usage,
        "engine/policy_version": engine.version,
        "engine/sampled_tokens": engine.num_sampled,
        "engine/computed_tokens": engine.num_computed,
        "engine/preemptions": engine.num_preemptions,
    }
