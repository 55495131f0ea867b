"""The tools of MCP servers, over stdio or streamable HTTP, for environments that use tools (the extra `mcp`)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack
from weakref import WeakKeyDictionary

import msgspec

from hone.envs.failures import RolloutFailure, deadline, describe
from hone.envs.rollout import Rollout
from hone.envs.tools import MAX_CHARACTERS, TIMEOUT_SECONDS, OnError, Tool, ToolArgumentsError, ToolError
from hone.schema.messages import ToolSpec
from hone.schema.traces import FailureClass

if TYPE_CHECKING:  # the package takes half a second and comes with an extra
    import mcp

CONNECT_SECONDS = 30.0
CLOSE_SECONDS = 15.0
PROBE_SECONDS = 5.0

MakeClient = Callable[[], AbstractAsyncContextManager["mcp.Client"]]
"""Makes a client of the `mcp` package, connected while it is entered."""


class Settings(TypedDict, total=False):
    """What `McpServer` takes however the server is reached."""

    per_rollout: bool
    only: Sequence[str] | None
    prefix: str
    connect_seconds: float
    timeout_seconds: float
    on_error: OnError | None
    max_characters: int


class McpServer:
    """A server whose tools the policy can call: give it among the `tools` of a `ToolUse`.

    Example::

        McpServer.stdio(["python", "server.py"], env={"DATA": "/data"})
        McpServer.http("http://127.0.0.1:8000/mcp", headers={"Authorization": f"Bearer {token}"})

    The rollouts of a process share one connection, which is made by the first of them. A server that keeps what belongs
    to one conversation needs a connection, and over stdio a process, for each rollout: per_rollout=True.

    What the server reports as an error of a tool is one (`ToolError`), and a call that takes longer than
    `timeout_seconds` is late (`TimeoutError`). A server that does not come up within `connect_seconds`, hangs, dies, or
    breaks the connection is a failure of class tool for the rollouts under way; the next rollout connects anew.

    only: the names of the tools to show, all by default. prefix: put before their names, to tell servers apart.
    on_error, max_characters: of each tool, as in `tool`.
    """

    def __init__(
        self,
        name: str,
        make_client: MakeClient,
        *,
        per_rollout: bool = False,
        only: Sequence[str] | None = None,
        prefix: str = "",
        connect_seconds: float = CONNECT_SECONDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
        on_error: OnError | None = None,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        if connect_seconds <= 0 or timeout_seconds <= 0:
            raise ValueError(f"MCP server {name}: connect_seconds and timeout_seconds must be positive")
        self.name = name
        self._make_client = make_client
        self._per_rollout = per_rollout
        self._only = only
        self._prefix = prefix
        self._connect_seconds = connect_seconds
        self._timeout_seconds = timeout_seconds
        self._on_error: OnError = {} if on_error is None else on_error
        self._max_characters = max_characters
        self._shared: WeakKeyDictionary[asyncio.AbstractEventLoop, _Connection] = WeakKeyDictionary()

    @classmethod
    def stdio(
        cls,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        **settings: Unpack["Settings"],
    ) -> Self:
        """A server that is started as a process and spoken to over its standard input and output.

        env: added to the few variables that a server inherits (PATH, HOME and the like). settings: as `McpServer` has.
        """
        mcp = _package()
        if not command:
            raise ValueError("the command of an MCP server is empty")
        parameters = mcp.StdioServerParameters(
            command=command[0], args=list(command[1:]), env=dict(env) if env else None, cwd=cwd
        )
        return cls(" ".join(command), lambda: mcp.Client(parameters), **settings)

    @classmethod
    def http(cls, url: str, *, headers: Mapping[str, str] | None = None, **settings: Unpack["Settings"]) -> Self:
        """A server that is reached over streamable HTTP. headers: sent with every request."""
        _package()
        return cls(url, lambda: _http_client(url, dict(headers or {})), **settings)

    @contextlib.asynccontextmanager
    async def open(self, rollout: Rollout) -> AsyncIterator[Sequence[Tool]]:
        """The server's tools for one rollout."""
        if not self._per_rollout:
            yield self._tools(await self._shared_connection())
            return
        connection = _Connection(self.name, self._make_client)
        try:
            await connection.ready(self._connect_seconds)
            yield self._tools(connection)
        finally:
            await connection.close()

    async def close(self) -> None:
        """End the connection that the rollouts of this event loop share; the next rollout makes another."""
        connection = self._shared.pop(asyncio.get_running_loop(), None)
        while connection is not None:
            await connection.close()
            connection = connection.before

    async def _shared_connection(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        connection = self._shared.get(loop)
        if connection is None or connection.is_broken:
            connection = self._shared[loop] = _Connection(self.name, self._make_client, before=connection)
        await connection.ready(self._connect_seconds)
        return connection

    def _tools(self, connection: "_Connection") -> list[Tool]:
        wanted = connection.specs.keys() if self._only is None else self._only
        if missing := sorted(set(wanted) - connection.specs.keys()):
            known = ", ".join(connection.specs) or "none"
            raise LookupError(f"MCP server {self.name} has no tool {missing[0]!r}; it has {known}")
        return [
            Tool(
                spec=msgspec.structs.replace(spec, name=self._prefix + name),
                execute=_Call(connection, name, self._timeout_seconds),
                on_error=self._on_error,
                max_characters=self._max_characters,
            )
            for name, spec in connection.specs.items()
            if name in wanted
        ]


@dataclass(frozen=True, slots=True)
class _Call:
    """Executes one tool of a server."""

    connection: "_Connection"
    name: str
    timeout_seconds: float

    async def __call__(self, arguments: str, rollout: Rollout) -> str:
        try:
            given = msgspec.json.decode(arguments.strip() or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise ToolArgumentsError(f"the arguments do not fit: {error}") from error
        return await self.connection.call(self.name, given, self.timeout_seconds)


@dataclass(slots=True, eq=False)
class _Connection:
    """One session with a server, owned by a task of its own, whose troubles cannot cancel a rollout.

    specs: the server's tools by the names it gives them, once it is ready. before: the broken connection that this one
    takes the place of, as long as it is being closed.
    """

    server: str
    make_client: MakeClient
    before: "_Connection | None" = None
    specs: dict[str, ToolSpec] = field(default_factory=dict)
    is_broken: bool = False
    _client: "mcp.Client | None" = None
    _closing: asyncio.Event = field(default_factory=asyncio.Event)
    _is_ready: asyncio.Event = field(default_factory=asyncio.Event)
    _trouble: BaseException | None = None
    _owner: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        if self.before is not None and self.before._owner.done():
            self.before = self.before.before
        self._owner = asyncio.create_task(self._own(), name=f"MCP server {self.server}")

    async def ready(self, seconds: float) -> None:
        """Wait until the tools are known; a server that does not get there in time is given up."""
        try:
            async with deadline(seconds):
                await self._is_ready.wait()
        except TimeoutError as error:
            self._give_up(error)
        if self.is_broken:
            raise self._failure("connect")

    async def call(self, name: str, arguments: dict[str, Any], seconds: float) -> str:
        """What the server answers; `ToolError` for a tool's error, `TimeoutError` for a late one."""
        import mcp  # see TYPE_CHECKING
        from mcp_types import CONNECTION_CLOSED, INVALID_PARAMS, INVALID_REQUEST, REQUEST_TIMEOUT

        if self.is_broken or self._client is None:
            raise self._failure(name)
        try:
            async with deadline(seconds + PROBE_SECONDS):
                result = await self._client.call_tool(name, arguments, read_timeout_seconds=seconds)
        except mcp.MCPError as error:
            if error.code == INVALID_PARAMS:
                raise ToolError(error.message) from error
            if error.code == REQUEST_TIMEOUT and await self._answers(self._client):
                raise TimeoutError(f"took longer than {seconds:g} s") from error
            if error.code not in (CONNECTION_CLOSED, INVALID_REQUEST, REQUEST_TIMEOUT):  # of this call alone
                raise RolloutFailure(FailureClass.TOOL, f"MCP {name}", f"server {self.server}: {error}") from error
            self._give_up(error)
            raise self._failure(name) from error
        except Exception as error:  # of streams and HTTP clients: none of it is the tool's
            self._give_up(error)
            raise self._failure(name) from error
        if result.is_error:
            raise ToolError(_text(result))
        return _text(result)

    async def _answers(self, client: "mcp.Client") -> bool:
        """Whether the server does anything at all: a tool may be late, a server that hangs is no word on the policy."""
        try:
            async with deadline(PROBE_SECONDS):
                await client.list_tools(cache_mode="refresh")
        except Exception:  # whatever it is, the server gave no answer
            return False
        return True

    async def close(self) -> None:
        """End the session, and the process if there is one; both are bounded."""
        self._end()
        await asyncio.wait([self._owner], timeout=CLOSE_SECONDS)
        self._owner.cancel()

    async def _own(self) -> None:
        try:
            async with self.make_client() as client:
                self.specs = await _specs(client)
                self._client = client
                self._is_ready.set()
                await self._closing.wait()
        except Exception as error:  # told to whoever waits for the connection
            self._trouble = self._trouble or error
        finally:
            self.is_broken = True
            self._is_ready.set()

    def _give_up(self, error: BaseException) -> None:
        self._trouble = self._trouble or error
        self._end()

    def _end(self) -> None:
        """No further call is made; the owner closes what is left in its own time."""
        self.is_broken = True
        self._closing.set()
        if self._client is None:
            self._owner.cancel()

    def _failure(self, where: str) -> RolloutFailure:
        why = "the connection is closed" if self._trouble is None else describe(_first(self._trouble))
        return RolloutFailure(FailureClass.TOOL, f"MCP {where}", f"server {self.server}: {why}")


def _package() -> Any:
    try:
        import mcp  # see TYPE_CHECKING
    except ImportError as error:
        raise ValueError("MCP servers need the mcp package: pip install 'hone[mcp]'") from error
    return mcp


@contextlib.asynccontextmanager
async def _http_client(url: str, headers: dict[str, str]) -> "AsyncIterator[mcp.Client]":
    import httpx2  # see TYPE_CHECKING
    import mcp
    from mcp.client.streamable_http import streamable_http_client

    # Calls and connections have deadlines of their own; a read timeout here would be a hidden one.
    async with (
        httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(CONNECT_SECONDS, read=None)) as http,
        mcp.Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client


async def _specs(client: "mcp.Client") -> dict[str, ToolSpec]:
    specs: dict[str, ToolSpec] = {}
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            specs[tool.name] = ToolSpec(tool.name, tool.description or "", tool.input_schema)
        cursor = page.next_cursor
        if cursor is None:
            return specs


def _text(result: "mcp.types.CallToolResult") -> str:
    """What a policy can read of a result: its texts; what is no text is named."""
    if not result.content and result.structured_content is not None:
        return msgspec.json.encode(result.structured_content).decode()
    return "\n".join(_block_text(block) for block in result.content)


def _block_text(block: Any) -> str:
    match block.type:
        case "text":
            return str(block.text)
        case "resource" if hasattr(block.resource, "text"):
            return str(block.resource.text)
        case "resource":
            return f"[resource {block.resource.uri}]"
        case "resource_link":
            return f"[resource {block.uri}]"
    return f"[{block.type} {block.mime_type}]"


def _first(error: BaseException) -> BaseException:
    """What is inside groups of one."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
