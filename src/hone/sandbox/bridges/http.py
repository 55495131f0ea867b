"""SandboxFusion's HTTP API over our sandboxes: every request has a fresh one of its own."""

import asyncio
import contextlib
import hmac
import logging
import math
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response

from hone.sandbox.bridges.fusion import RunCodeRequest, RunCodeResponse, answer, language_of, no_answer
from hone.sandbox.client import Busy, LimitExceeded, Sandbox, SandboxError, SandboxSpec, run_code
from hone.sandbox.languages import find_language

BODY_SECONDS = 60.0
READY_SECONDS = 60.0
FILES_SECONDS = 60.0
SHUTDOWN_SECONDS = 10
BUSY_SECONDS = 1.0
BACKLOG = 2048
T = TypeVar("T")
MakeSandbox = Callable[[SandboxSpec, str, str], Sandbox]

logger = logging.getLogger("hone.sandbox.bridges.http")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a request may ask for, and how many there may be.

    max_requests: at once; more are told to come again. max_body_bytes: of a request, and of the files that it fetches.
    kept_bytes: of each of stdout and stderr, half from the beginning and half from the end. max_timeout_seconds: for the
    compiler and for the program. max_memory_mb: for the program.
    """

    max_requests: int = 1024
    max_body_bytes: int = 32 << 20
    kept_bytes: int = 2 << 20
    max_timeout_seconds: float = 600.0
    max_memory_mb: int = 8192


class Refused(Exception):
    """A request that is not served."""

    def __init__(self, code: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.headers = dict(headers or {})


def code_app(
    open_box: MakeSandbox,
    *,
    tokens: Mapping[str, str] | None = None,
    spec: SandboxSpec = SandboxSpec(),
    limits: HttpLimits = HttpLimits(),
) -> FastAPI:
    """The application: `POST /run_code`, and `GET /v1/ping`.

    open_box: makes the sandbox of a spec, not yet opened, for whoever shows a bearer token, and of which owner that is,
    empty where `tokens` does not say. tokens: names of owners by token; None leaves it to `open_box` whom to let in.
    spec: of the sandboxes; a request can change the memory.
    """
    app = FastAPI(title="hone sandboxes", docs_url=None, redoc_url=None, openapi_url=None)
    places = asyncio.Semaphore(limits.max_requests)

    @app.get("/v1/ping")
    async def ping() -> str:
        return "pong"

    @app.post("/run_code")
    async def run(request: Request) -> Response:
        try:
            token = _token(request, tokens)
            owner = (tokens or {}).get(token, "")
            if places.locked():
                raise _come_again(f"{limits.max_requests} requests are under way already", BUSY_SECONDS)
            async with places:
                asked = _decoded(await _body(request, limits.max_body_bytes), limits)
                reply = await _while_connected(
                    request, _answered(open_box(_spec(asked, spec, limits), token, owner), asked, limits)
                )
        except Refused as refused:
            content = msgspec.json.encode({"detail": str(refused)})
            return Response(content, refused.code, refused.headers, "application/json")
        return Response(msgspec.json.encode(reply), media_type="application/json")

    return app


@contextlib.asynccontextmanager
async def serving(app: FastAPI, host: str, port: int) -> AsyncIterator[str]:
    """Serve an application at an address meanwhile; gives the URL. port: 0 takes a free one."""
    with _listener(host, port) as listener:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        server = _Server(config)
        task = asyncio.get_running_loop().create_task(server.serve([listener]))
        try:
            shown = f"[{host}]" if ":" in host else host
            yield f"http://{shown}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


async def _answered(box: Sandbox, asked: RunCodeRequest, limits: HttpLimits) -> RunCodeResponse:
    """Run the code in a sandbox that nobody had before and nobody gets afterwards."""
    sandbox_id = ""
    try:
        async with asyncio.timeout(READY_SECONDS + asked.compile_timeout + asked.run_timeout + FILES_SECONDS):
            await _opened(box)
            sandbox_id = box.sandbox_id
            result = await run_code(
                box,
                asked.code,
                language=language_of(asked),
                stdin=(asked.stdin or "").encode("utf-8", "surrogatepass"),
                files={path: data for path, data in asked.files.items() if data is not None},
                compile_timeout_seconds=asked.compile_timeout,
                run_timeout_seconds=asked.run_timeout,
                kept_bytes=limits.kept_bytes,
            )
            fetched, problems = await _fetched(box, asked.fetch_files, limits.max_body_bytes)
            return answer(result, sandbox_id, fetched, problems)
    except Busy as busy:
        raise _come_again(str(busy), busy.retry_after_seconds) from busy
    except SandboxError as error:
        logger.warning("%s: %s (%s)", sandbox_id or "no sandbox", error, error.outcome)
        return no_answer(f"{error} ({error.outcome})", sandbox_id)
    except TimeoutError:
        logger.warning("%s: no answer within its time", sandbox_id or "no sandbox")
        return no_answer("the sandbox did not answer within its time", sandbox_id)
    except (OSError, ValueError) as error:  # of the files of the request
        raise Refused(422, f"the request cannot be carried out: {error}") from error
    finally:
        with contextlib.suppress(SandboxError):  # it is gone already
            await box.close()


async def _opened(box: Sandbox) -> None:
    try:
        await box.open()
    except ValueError as error:  # it does not know the token, or does not give what the spec says
        raise Refused(403, f"refused where the sandboxes are: {error}") from error


async def _fetched(box: Sandbox, paths: list[str], max_bytes: int) -> tuple[dict[str, bytes], list[str]]:
    """The files that there are, and what became of the others."""
    found: dict[str, bytes] = {}
    problems = []
    for path in paths:
        try:
            found[path] = await box.read(path, max_bytes=max_bytes)
            max_bytes -= len(found[path])
        except LimitExceeded:
            problems.append(f"{path}: the files to fetch are too large; left out")
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}")
    return found, problems


def _spec(asked: RunCodeRequest, spec: SandboxSpec, limits: HttpLimits) -> SandboxSpec:
    """The lease outlasts the request's own deadline, and is the same for all, so that they share a warm pool."""
    memory_mb = math.ceil(asked.memory_limit_MB) if asked.memory_limit_MB > 0 else spec.memory_mb
    seconds = READY_SECONDS + 2 * limits.max_timeout_seconds + FILES_SECONDS
    return msgspec.structs.replace(spec, memory_mb=memory_mb, ttl_seconds=max(seconds, spec.ttl_seconds))


def _token(request: Request, tokens: Mapping[str, str] | None) -> str:
    """The token that a request shows, if it is one of those that are known, where any are."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if tokens is None:
        return given
    is_known = [hmac.compare_digest(token.encode(), given.encode()) for token in tokens]  # all of them: no early answer
    if not any(is_known):
        raise Refused(
            401, "give a token that this server knows: Authorization: Bearer ...", {"www-authenticate": "Bearer"}
        )
    return given


async def _body(request: Request, max_bytes: int) -> bytes:
    too_large = Refused(413, f"a request has at most {max_bytes} bytes")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the request was not complete within {BODY_SECONDS:g} s") from None
    return bytes(body)


def _decoded(body: bytes, limits: HttpLimits) -> RunCodeRequest:
    try:
        asked = msgspec.json.decode(body, type=RunCodeRequest)
        find_language(language_of(asked))
    except (msgspec.MsgspecError, ValueError) as error:
        raise Refused(422, str(error)) from error
    longest = max(asked.compile_timeout, asked.run_timeout)
    if longest > limits.max_timeout_seconds:
        raise Refused(422, f"a timeout of {longest:g} s; at most {limits.max_timeout_seconds:g} s are given here")
    if asked.memory_limit_MB > limits.max_memory_mb:
        raise Refused(422, f"memory_limit_MB {asked.memory_limit_MB:g}; at most {limits.max_memory_mb} are given here")
    return asked


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, and give it up when nobody waits for it any more."""
    loop = asyncio.get_running_loop()
    working, leaving = loop.create_task(work), loop.create_task(_left(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
        await asyncio.wait([working, leaving])
    if working.cancelled():
        raise Refused(499, "the client has left")
    return working.result()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _come_again(message: str, seconds: float) -> Refused:
    return Refused(503, message, {"retry-after": str(math.ceil(seconds))})


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)  # whoever comes before the server has begun waits for it
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen at {host}:{port} ({error.strerror}); choose another address") from error
    return listener


class _Server(uvicorn.Server):
    """Leaves the signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
