"""`hone sandbox http`, and the same door in `hone sandbox serve --http`: SandboxFusion's API over sandboxes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hone.sandbox.node.node import Node

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
    tokens: Mapping[str, str] | None,
    *,
    node_token: str | None = None,
    image: str = "python",
    memory_mb: int = 512,
) -> AsyncIterator[str]:
    """Serve `/run_code` at host:port meanwhile, with sandboxes of a node; gives the URL.

    tokens: of those who are let in; None leaves it to the node, or lets everybody in. node_token: what the node is shown;
    None: what the request shows.
    """
    try:
        from hone.sandbox.bridges.http import code_app, serving
    except ImportError as error:
        raise ValueError("serving HTTP needs FastAPI and uvicorn: pip install 'hone[sandbox-http]'") from error
    from hone.sandbox.client import Sandbox, SandboxSpec

    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"the HTTP address {listen!r} is not host:port")

    def open_box(spec: SandboxSpec, token: str, owner: str) -> Sandbox:
        return Sandbox(spec=spec, node=where, token=token if node_token is None else node_token, owner=owner)

    app = code_app(open_box, tokens=tokens, spec=SandboxSpec(image=image, memory_mb=memory_mb))
    async with serving(app, host.strip("[]"), int(port)) as url:
        yield url


def require_tokens(listen: str, tokens: Mapping[str, str], *, is_open: bool) -> Mapping[str, str] | None:
    """The tokens of those who are let in; None if that is everybody, which somebody must have said."""
    if not tokens and not is_open:
        raise ValueError(
            f"{listen} would run code for everybody who can reach it; give --tokens, or say --without-token"
        )
    return None if is_open else tokens


def http(
    node: Annotated[
        str, typer.Option("--node", help="unix:/path, tcp://host:port or tls://host:port of a node or a gateway.")
    ],
    listen: Annotated[str, typer.Option(help="host:port.")] = "127.0.0.1:8080",
    tokens: Annotated[Path | None, typer.Option(help="A file with a line `name token` for each owner.")] = None,
    without_token: WithoutToken = False,
    image: Annotated[str, typer.Option(help="Of the sandboxes.")] = "python",
    memory_mb: Annotated[int, typer.Option(help="Of the sandboxes whose request does not say.")] = 512,
) -> None:
    """Serve SandboxFusion's /run_code with sandboxes of a node or a gateway, until it is interrupted.

    Without --tokens, a node at a tcp or tls address is shown the token of each request, and decides.
    """
    from hone.cli.sandbox import own_token, read_tokens, until_stopped

    is_handed_on = tokens is None and not without_token and not node.startswith("unix:")
    known = None
    if not is_handed_on:
        known = require_tokens(listen, read_tokens(tokens)[0] if tokens else {}, is_open=without_token)

    async def serve() -> None:
        stopped = until_stopped()
        node_token = None if is_handed_on else own_token()
        door = http_door(listen, node, known, node_token=node_token, image=image, memory_mb=memory_mb)
        async with door as url:
            typer.echo(f"/run_code is served at {url}")
            await stopped.wait()

    asyncio.run(serve())
