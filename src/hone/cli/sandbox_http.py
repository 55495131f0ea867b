"""`hone sandbox http`, and the same door in `hone sandbox serve --http`: SandboxFusion's API over sandboxes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hone.sandbox.node import Node

HttpListen = Annotated[
    str, typer.Option("--http", help="host:port at which SandboxFusion's /run_code is served, too; needs tokens.")
]
WithoutToken = Annotated[
    bool, typer.Option("--without-token", help="Let everybody run code who can reach the HTTP address.")
]


@contextlib.asynccontextmanager
async def http_door(
    listen: str,
    where: "Node | str",
    tokens: Mapping[str, str],
    *,
    node_token: str = "",
    is_open: bool = False,
    image: str = "python",
    memory_mb: int = 512,
) -> AsyncIterator[str]:
    """Serve `/run_code` at host:port meanwhile, with sandboxes of a node; gives the URL."""
    try:
        from hone.sandbox.http import code_app, serving
    except ImportError as error:
        raise ValueError("serving HTTP needs FastAPI and uvicorn: pip install 'hone[sandbox-http]'") from error
    from hone.sandbox.client import Sandbox, SandboxSpec

    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"the HTTP address {listen!r} is not host:port")
    if not tokens and not is_open:
        raise ValueError(
            f"{listen} would run code for everybody who can reach it; give --tokens, or say --without-token"
        )

    def open_box(spec: SandboxSpec) -> Sandbox:
        return Sandbox(spec=spec, node=where, token=node_token)

    app = code_app(open_box, tokens=None if is_open else tokens, spec=SandboxSpec(image=image, memory_mb=memory_mb))
    async with serving(app, host.strip("[]"), int(port)) as url:
        yield url


def http(
    node: Annotated[str, typer.Option("--node", help="unix:/path or tcp://host:port of a node or a gateway.")],
    listen: Annotated[str, typer.Option(help="host:port.")] = "127.0.0.1:8080",
    tokens: Annotated[Path | None, typer.Option(help="A file with a line `name token` for each owner.")] = None,
    without_token: WithoutToken = False,
    image: Annotated[str, typer.Option(help="Of the sandboxes.")] = "python",
    memory_mb: Annotated[int, typer.Option(help="Of the sandboxes whose request does not say.")] = 512,
) -> None:
    """Serve SandboxFusion's /run_code with sandboxes of a node or a gateway, until it is interrupted."""
    from hone.cli.sandbox import own_token, read_tokens, until_stopped

    known, _ = read_tokens(tokens) if tokens is not None else ({}, set())

    async def serve() -> None:
        stopped = until_stopped()
        door = http_door(
            listen, node, known, node_token=own_token(), is_open=without_token, image=image, memory_mb=memory_mb
        )
        async with door as url:
            typer.echo(f"/run_code is served at {url}")
            await stopped.wait()

    asyncio.run(serve())
