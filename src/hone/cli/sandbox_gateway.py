"""`hone sandbox gateway` and `drain`: many nodes behind one address, and taking one of them away in peace."""

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hone.cli.sandbox import Address, connected, until_stopped
from hone.cli.sandbox_metrics import metrics_served

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from hone.sandbox.gateway.gateway import Gateway

DRAINED_SECONDS = 1.0  # between two looks at what a node has left


def register(app: typer.Typer) -> None:
    """Add the commands to `hone sandbox`."""
    for command in (gateway, drain, token):
        app.command()(command)


def gateway(
    nodes: Annotated[
        str,
        typer.Option(
            help="Where the nodes are, with commas between: tcp://host:port, tls://host:port, unix:/path, "
            "dns:NAME:PORT or dns+tls:NAME:PORT for all addresses of a name, file:PATH for a file with one a line."
        ),
    ],
    listen: Annotated[str, typer.Option(help="unix:/path, or with tenants tcp://host:port or tls://host:port.")],
    tenants: Annotated[Path | None, typer.Option(help="A TOML file: who may come in, for what, how much.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The certificate to show at a tls:// address.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    nodes_ca: Annotated[
        Path | None, typer.Option(help="Authorities for nodes at tls addresses; default: $HONE_SANDBOX_CA.")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="For Prometheus: /metrics, and /health for probes.")] = None,
    metrics_host: Annotated[str, typer.Option(help="Who reaches them; 0.0.0.0 is everybody who can.")] = "127.0.0.1",
) -> None:
    """Serve many nodes behind one address. What the nodes let it in with is in $HONE_SANDBOX_TOKEN."""
    from hone.sandbox.gateway.discovery import parse_source
    from hone.sandbox.gateway.gateway import Gateway
    from hone.sandbox.gateway.tenants import read_tenants

    sources = [parse_source(one.strip()) for one in nodes.split(",") if one.strip()]
    serving = Gateway(
        sources,
        listen,
        tenants=read_tenants(tenants) if tenants is not None else None,
        token=os.environ.get("HONE_SANDBOX_TOKEN", ""),
        ca_file=str(nodes_ca or ""),
        certificate=tls_cert,
        key=tls_key,
    )
    asyncio.run(_serve(serving, metrics_port, metrics_host))


async def _serve(gateway: "Gateway", metrics_port: int | None, metrics_host: str) -> None:
    stopped = until_stopped()
    async with gateway, _metrics(gateway, metrics_port, metrics_host) as metrics:
        typer.echo(f"gateway at {gateway.address}, nodes: {len(gateway.nodes)}{metrics}")
        await stopped.wait()


@contextlib.asynccontextmanager
async def _metrics(gateway: "Gateway", port: int | None, host: str) -> AsyncIterator[str]:
    def collectors() -> "Sequence[Collector]":
        from hone.sandbox.gateway.metrics import GatewayCollector  # prometheus_client belongs to an extra

        return [GatewayCollector(gateway)]

    async with metrics_served(
        port, host, collectors, lambda: "" if gateway.nodes else "none of its nodes is there"
    ) as where:
        yield where


def drain(
    name: Annotated[str, typer.Argument(help="The node, by its name or by the beginning of its sandboxes' ids.")],
    node: Address = "",
    undo: Annotated[bool, typer.Option("--undo", help="Let it take new sandboxes again.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when none of its sandboxes is left.")] = False,
) -> None:
    """Have a node take no new sandboxes; those that it has go on. --node is a gateway, or the node itself."""
    left = asyncio.run(_drain(name, node, is_draining=not undo, is_patient=wait and not undo))
    typer.echo(f"{name} takes {'new sandboxes again' if undo else 'no new sandboxes'}; it has {left}")


async def _drain(name: str, address: str, *, is_draining: bool, is_patient: bool) -> int:
    from hone.schema.sandbox_calls import Drain

    client = await connected(address)
    try:
        while True:
            left = await client.call(Drain(client.number(), name, is_draining), int)
            if not (is_patient and left):
                return left
            await asyncio.sleep(DRAINED_SECONDS)
    finally:
        await client.close()


def token() -> None:
    """Make a token for a client, and what goes into the tenants' file for it."""
    from hone.sandbox.gateway.tenants import digest_of

    made = secrets.token_urlsafe(32)
    typer.echo(f'token: {made}\nsha256 = "{digest_of(made).hex()}"')
