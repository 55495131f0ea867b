"""Starts everything that serves a model: the engine's thread, the HTTP servers, the token channel."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from hone.config.recipe import EngineSection, Recipe
from hone.inference.engine.engine import Engine
from hone.inference.server import errors
from hone.inference.server.admin import admin_router
from hone.inference.server.api import Service, api_app
from hone.inference.server.frontend import Frontend
from hone.inference.server.loop import EngineLoop
from hone.inference.server.tokens import AddressInUseError
from hone.model import ops
from hone.model.checkpoint import CheckpointError, load_model
from hone.observability.disk import is_disk_trouble
from hone.observability.logs import fields
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 2
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# The engine shares the interpreter with HTTP; the default of 5 ms would let one request hold up several steps.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host and a port."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Serving:
    """What to serve and where.

    tokenizer_folder: default the model's. admin: an address of their own for the admin routes; admin_token: what they
    want as bearer token. tokens: ZeroMQ address of the token channel. dtype: of the weights as they are loaded. strict:
    compute through the native kernels alone, as a trainer does whose logprobs must be the same; `ValueError` without.
    """

    model_folder: Path
    name: str
    engine: EngineSection
    api: Endpoint
    version: int = 0
    tokenizer_folder: Path | None = None
    admin: Endpoint | None = None
    admin_token: str | None = None
    tokens: str | None = None
    dtype: torch.dtype = torch.float32
    device: str = "auto"
    strict: bool = False
    report: Callable[[Engine], None] | None = None
    started: Callable[[str], None] = field(default=lambda _: None)


def serve(
    model_folder: Path,
    recipe: Recipe | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    started: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve a model folder until interrupted, with the engine, numbers and admin routes of a recipe if there is one.

    started: gets the address. `ValueError` for what cannot be served.
    """
    try:
        run(serving_alone(model_folder, recipe, Endpoint(host, port), name, started))
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def serving_alone(
    model_folder: Path,
    recipe: Recipe | None,
    api: Endpoint,
    name: str | None = None,
    started: Callable[[str], None] = lambda _: None,
) -> Serving:
    """A model outside of a run."""
    plain = Serving(model_folder, name or model_folder.resolve().name, EngineSection(), api, started=started)
    if recipe is None:
        return plain
    server = recipe.server
    return replace(
        plain,
        name=name or recipe.run.name,
        engine=recipe.engine,
        admin=None if server.admin_port is None else Endpoint(server.admin_host or api.host, server.admin_port),
        admin_token=secret(server.admin_token_variable),
        dtype=getattr(torch, recipe.model.dtype),
        device=recipe.device,
        strict=recipe.trainer.numerics == "strict",
    )


def secret(variable: str | None) -> str | None:
    """The value of the environment variable that server.admin_token_variable names."""
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"server.admin_token_variable names {variable}, which is not set; export it")
    return value


def run(serving: Serving) -> None:
    """Serve until SIGINT or SIGTERM; when the engine dies `RuntimeError`, or the `OSError` of a full disk."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(bind(serving.api))]
        if serving.admin is not None:
            sockets.append(held.enter_context(bind(serving.admin)))
        engine, service, frontend = load(serving)
        sys.setswitchinterval(SWITCH_SECONDS)
        asyncio.run(_serve(serving, engine, service, frontend, sockets))


def load(serving: Serving) -> tuple[Engine, Service, Frontend]:
    """The engine with its weights, and the text side of the model."""
    if serving.strict:
        ops.set_backend("native")
    tokenizer = Tokenizer.load(serving.tokenizer_folder or serving.model_folder)
    if serving.engine.threads is not None:
        torch.set_num_threads(serving.engine.threads)
    dtype = torch.bfloat16 if serving.engine.dtype == "bfloat16" else serving.dtype
    model = load_model(serving.model_folder, dtype, choose_device(serving.device))
    ends = {*tokenizer.eos_token_ids, *model.config.eos_token_ids}
    engine = Engine(model, ends, serving.engine, decode=tokenizer.decode, version=serving.version)
    renderer = Renderer(tokenizer) if tokenizer.chat_template is not None else None
    frontend = Frontend()
    logger.info(
        "model loaded",
        extra=fields(folder=serving.model_folder, version=serving.version, context=engine.max_context, dtype=dtype),
    )
    return engine, Service(frontend, tokenizer, renderer, serving.name, engine.max_context), frontend


def choose_device(wish: str) -> torch.device:
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wish)


def bind(endpoint: Endpoint) -> socket.socket:
    """A listening socket, before anything slow is done; `AddressInUseError` when the port is taken."""
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((endpoint.host, endpoint.port))
    except OSError as error:
        listener.close()
        raise AddressInUseError(
            f"cannot bind {endpoint.host}:{endpoint.port} ({os.strerror(error.errno or 0)}); choose another port, or"
            " stop what uses it"
        ) from error
    return listener


async def _serve(
    serving: Serving, engine: Engine, service: Service, frontend: Frontend, sockets: list[socket.socket]
) -> None:
    event_loop = asyncio.get_running_loop()
    servers: list[uvicorn.Server] = []

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    def died() -> None:
        event_loop.call_soon_threadsafe(stop)

    engine_loop = EngineLoop(
        engine,
        tokens_address=serving.tokens,
        deliver=frontend.deliver,
        report=serving.report,
        died=died,
    )
    with engine_loop:
        frontend.attach(engine_loop)
        apps = applications(service, engine_loop, serving)
        servers.extend(_Server(_settings(app)) for app in apps)
        for number in (signal.SIGINT, signal.SIGTERM):
            event_loop.add_signal_handler(number, stop)
        address, port = sockets[0].getsockname()[:2]
        serving.started(f"http://{address}:{port}")
        logger.info("serving", extra=fields(api=f"http://{address}:{port}", tokens=serving.tokens))
        await asyncio.gather(*(server.serve([sock]) for server, sock in zip(servers, sockets, strict=True)))
    if engine_loop.failure is not None:
        if is_disk_trouble(engine_loop.failure):
            raise engine_loop.failure
        raise RuntimeError(f"the engine failed: {engine_loop.failure!r}") from engine_loop.failure


def applications(service: Service, engine_loop: EngineLoop, serving: Serving) -> list[FastAPI]:
    """The API, and the admin routes in it or beside it."""
    api = api_app(service)
    controls = serving.admin_token is not None or (serving.admin or serving.api).host in LOOPBACK
    if not controls:
        logger.warning(
            "the admin routes are left out: they would be open to the network; give server.admin_token_variable, or"
            " server.admin_host = '127.0.0.1' with server.admin_port = 0"
        )
    routes = admin_router(engine_loop, serving.admin_token, controls=controls)
    if serving.admin is None:
        api.include_router(routes)
        return [api]
    admin = FastAPI(title="hone admin", docs_url=None, redoc_url=None)
    errors.install(admin)
    admin.include_router(routes)
    return [api, admin]


def _settings(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=SHUTDOWN_SECONDS
    )


class _Server(uvicorn.Server):
    """Leaves the signals to us: two servers share the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
