"""`hone sandbox`: run a program in one, serve a node, and see what this machine and a node are up to."""

import asyncio
import contextlib
import functools
import os
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hone.cli.sandbox_http import HttpListen, WithoutToken, http, http_door, require_tokens

if TYPE_CHECKING:
    from rich.table import Table

    from hone.sandbox.cells.host import Host
    from hone.sandbox.client import Process, Sandbox
    from hone.sandbox.wire.remote import RemoteNode
    from hone.sandbox.wire.serve import NodeServer
    from hone.schema.sandboxes import RuntimeName

NUM_HEAD_ROWS = 10
"""Lines of the live table that are not sandboxes."""

app = typer.Typer(help="Sandboxes: run programs nobody trusts, here or on a node.", no_args_is_help=True)
app.command()(http)

Address = Annotated[
    str,
    typer.Option(
        "--node", help="unix:/path, tcp://host:port or tls://host:port of a node; the token is in $HONE_SANDBOX_TOKEN."
    ),
]


@app.command()
def run(
    image: Annotated[
        str, typer.Argument(help='"python" is this machine\'s own programs; dir:, tar:, oci: or a registry.')
    ],
    command: Annotated[list[str], typer.Argument(help="The program and its arguments, after --.")],
    memory_mb: Annotated[int, typer.Option(help="Memory of its programs.")] = 512,
    cpus: Annotated[float, typer.Option(help="Cores.")] = 1.0,
    disk_mb: Annotated[int, typer.Option(help="What it may write.")] = 256,
    network: Annotated[str, typer.Option(help="none, off or host; allow comes with --allow.")] = "",
    allow: Annotated[
        list[str] | None,
        typer.Option(help="A host that it may reach, as pypi.org, *.example.org or example.org:8443; repeat it."),
    ] = None,
    runtime: Annotated[str, typer.Option(help="How it is isolated: cell, process, bwrap, oci or gvisor.")] = "cell",
    ttl_seconds: Annotated[float, typer.Option(help="When it is over in any case.")] = 3600.0,
    node: Address = "",
) -> None:
    """Run a program in a new sandbox: its streams are this command's, and so is its exit code."""
    from hone.sandbox.client import Sandbox

    sandbox = Sandbox(
        image,
        memory_mb=memory_mb,
        cpus=cpus,
        disk_mb=disk_mb,
        network=network or None,
        allow=allow or (),
        runtime=runtime,
        ttl_seconds=ttl_seconds,
        node=node or None,
        token=own_token(),
    )
    code = asyncio.run(_run(sandbox, command))
    raise typer.Exit(code if code >= 0 else 128 - code)


async def _run(sandbox: "Sandbox", command: list[str]) -> int:
    async with sandbox:
        process = await sandbox.spawn(command)
        try:
            threading.Thread(target=_feed, args=(process, asyncio.get_running_loop()), daemon=True).start()
            await asyncio.gather(_show(process, 1), _show(process, 2))
            return await process.wait()
        finally:
            await process.close()


def _feed(process: "Process", loop: asyncio.AbstractEventLoop) -> None:
    """Hand standard input on. Reading may wait for ever, which is why this runs in a thread that nobody waits for."""
    try:
        while data := os.read(0, 1 << 16):
            asyncio.run_coroutine_threadsafe(process.write(data), loop).result()
        loop.call_soon_threadsafe(process.end_input)
    except (OSError, RuntimeError, CancelledError):  # nobody reads any more, or all is over
        return


async def _show(process: "Process", stream: int) -> None:
    read, out = (process.read, sys.stdout.buffer) if stream == 1 else (process.read_error, sys.stderr.buffer)
    while data := await read():
        out.write(data)
        out.flush()


@app.command()
def serve(
    listen: Annotated[str, typer.Option(help="unix:/path, or with tokens tcp://host:port or tls://host:port.")] = "",
    name: Annotated[str, typer.Option(help="Of the node; its sandboxes' ids begin with it.")] = "local",
    folder: Annotated[Path | None, typer.Option(help="For its journal; default: in the user's cache.")] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="A file with a line `name token` for each owner, `name token gateway` for one that serves many."
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The certificate to show at a tls:// address.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    max_sandboxes: Annotated[int, typer.Option(help="At once.")] = 4096,
    max_warm: Annotated[int, typer.Option(help="Cells kept ready; which ones follows the demand.")] = 16,
    runtime: Annotated[list[str] | None, typer.Option(help="One that sandboxes may ask for; default: cell.")] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            help="What sandboxes may be made from besides python: a pattern of names, as 'debian:*' or 'dir:/srv/images/*'; "
            "repeat it. Default: public, all images in well-known public registries.",
        ),
    ] = None,
    preloads: Annotated[
        list[str] | None,
        typer.Option(
            "--preload", help="A module that Python of sandboxes finds imported; repeat it, trusted ones only."
        ),
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="For Prometheus: /metrics, and /health for probes.")] = None,
    metrics_host: Annotated[str, typer.Option(help="Who reaches them; 0.0.0.0 is everybody who can.")] = "127.0.0.1",
    spans: Annotated[Path | None, typer.Option(help="A file to tell each creation and call in, a line each.")] = None,
    maps: Annotated[
        list[str] | None,
        typer.Option(
            "--map", help="name=unix:/path or name=host:port: what a name on an allow-list means here; repeat it."
        ),
    ] = None,
    private_networks: Annotated[
        bool, typer.Option(help="Let sandboxes reach private networks and this machine: +private, --network host.")
    ] = False,
    drain_seconds: Annotated[
        float, typer.Option(help="At SIGTERM, how long sandboxes may live on while no new ones are taken.")
    ] = 10.0,
    http: HttpListen = "",
    without_token: WithoutToken = False,
) -> None:
    """Serve a node until SIGINT, which ends it at once as a second SIGTERM does; the first one drains it."""
    from hone.cli.sandbox_serve import Observation, serve_node
    from hone.sandbox.cache import cache_folder
    from hone.sandbox.images.policy import PUBLIC, ImagePolicy
    from hone.sandbox.network.egress import NetworkPolicy
    from hone.sandbox.node.lifecycle import Limits
    from hone.sandbox.node.node import Node

    place = folder or cache_folder(f"node-{name}")
    address = listen or f"unix:{place}/socket"
    known, gateways = read_tokens(tokens) if tokens is not None else ({}, set())

    def server_of(node: Node) -> "NodeServer":
        from hone.sandbox.wire.serve import NodeServer

        return NodeServer(node, address, tokens=known, gateways=gateways, certificate=tls_cert, key=tls_key)

    def http_of(node: Node) -> AbstractAsyncContextManager[str]:
        if not http:
            return contextlib.nullcontext("")
        return http_door(http, node, require_tokens(http, known, is_open=without_token))

    node_of = functools.partial(
        Node,
        folder=place,
        limits=Limits(max_sandboxes=max_sandboxes, max_warm=max_warm),
        network=NetworkPolicy(maps=_read_maps(maps or []), is_private_allowed=private_networks),
        runtimes=_runtimes(runtime or []),
        images_allowed=ImagePolicy(tuple(images or [PUBLIC]), is_private_allowed=private_networks),
        preloads=preloads or [],
    )
    observation = Observation(metrics_port, metrics_host, spans)
    asyncio.run(serve_node(name, node_of, server_of, http_of, observation, drain_seconds))


def _runtimes(names: list[str]) -> "tuple[RuntimeName, ...]":
    from hone.schema.sandboxes import DEFAULT_RUNTIMES, RUNTIMES

    if unknown := set(names) - set(RUNTIMES):
        raise ValueError(f"runtime {min(unknown)!r} is none of {', '.join(RUNTIMES)}")
    return tuple(one for one in RUNTIMES if one in names) or DEFAULT_RUNTIMES


def _read_maps(texts: list[str]) -> dict[str, str]:
    maps = {}
    for text in texts:
        name, equals, address = text.partition("=")
        if not equals:
            raise ValueError(f"--map {text!r} has no address; write name=unix:/path or name=host:port")
        maps[name] = address
    return maps


def until_stopped() -> asyncio.Event:
    """Set when this process is asked to end."""
    import signal  # only what serves is stopped by it

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


@app.command(name="ls")
def list_sandboxes(node: Address = "") -> None:
    """List the sandboxes of a node."""
    from hone.cli.listing import print_table

    print_table(asyncio.run(_listed(node)))


async def _listed(address: str) -> "Table":
    from hone.cli.sandbox_tables import sandboxes_table

    client = await connected(address)
    try:
        return sandboxes_table(await client.sandboxes())
    finally:
        await client.close()


@app.command()
def forward(
    sandbox_id: Annotated[str, typer.Argument(help="As `hone sandbox ls` shows it.")],
    port: Annotated[str, typer.Argument(help="PORT, or PORT:LOCAL for another one on this side; 0 is a free one.")],
    node: Address = "",
) -> None:
    """Let a port of this machine's loopback lead to one of a sandbox, until SIGINT or SIGTERM."""
    inner, colon, local = port.partition(":")
    if not inner.isdecimal() or (colon and not local.isdecimal()):
        raise ValueError(f"{port!r} is no port; write PORT or PORT:LOCAL")
    asyncio.run(_forward(node, sandbox_id, int(inner), int(local or inner)))


async def _forward(address: str, sandbox_id: str, port: int, local_port: int) -> None:
    from hone.sandbox.client import Busy, Connection, SandboxError
    from hone.sandbox.network.ports import Forwarding
    from hone.sandbox.wire.remote import RemoteSandbox

    stopped = until_stopped()
    client = await connected(address)
    problems: list[SandboxError] = []

    async def connect() -> Connection:
        try:
            return await box.connect(port, timeout_seconds=0)
        except Busy:
            raise
        except SandboxError as error:  # the sandbox, or its node, is gone: there will be no other connection
            problems.append(error)
            stopped.set()
            raise

    try:
        box = RemoteSandbox(client, sandbox_id)
        await box.ready()
        async with Forwarding(connect, local_port) as forwarding:
            typer.echo(f"127.0.0.1:{forwarding.port} leads to port {port} of {sandbox_id}")
            await stopped.wait()
    finally:
        await client.close()
    if problems:
        raise problems[0]


@app.command()
def stats(
    node: Address = "",
    watch: Annotated[bool, typer.Option(help="Show them again every second, until interrupted.")] = False,
) -> None:
    """Show the numbers of a node and what its sandboxes use."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_stats(node, watch))


async def _stats(address: str, watch: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from hone.cli.listing import print_table
    from hone.cli.sandbox_tables import Look, live_view, sandboxes_table, statistics_table

    client = await connected(address)
    try:
        before = Look(await client.statistics(), await client.sandboxes())
        if not watch:
            print_table(statistics_table(before.statistics))
            print_table(sandboxes_table(before.sandboxes))
            return
        with Live(live_view(before, None), console=Console(highlight=False), auto_refresh=False) as live:
            while True:
                await asyncio.sleep(1)
                now = Look(await client.statistics(), await client.sandboxes())
                live.update(live_view(now, before, max_rows=max(1, live.console.height - NUM_HEAD_ROWS)), refresh=True)
                before = now
    finally:
        await client.close()


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of nodes (`--folder` of serve), one or more.")],
    output: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("sandboxes.html"),
) -> None:
    """Write a page about the sandboxes that ended: who used what, how many at once, how they ended."""
    from hone.studio.sandboxes import write_sandboxes_page

    typer.echo(write_sandboxes_page(folders, output))


@app.command()
def doctor() -> None:
    """Say what this machine can do for sandboxes, what is lost where it cannot, and try each runtime."""
    from rich.table import Table
    from rich.text import Text

    from hone.cli.listing import print_table
    from hone.sandbox.cells.host import examine, look

    host = look()
    table = Table("", "what", "lost without it")
    for finding in examine(host):
        mark = Text("ok", "green") if finding.is_there else Text("no", "red")
        table.add_row(mark, finding.name, "" if finding.is_there else finding.lost)
    print_table(table)
    problems = asyncio.run(_try_all(host))
    table = Table("", "runtime", "what it needs here")
    for name, problem in problems.items():
        table.add_row(Text("no", "red") if problem else Text("ok", "green"), name, problem)
    print_table(table)
    if problems["cell"]:
        raise ValueError(f"a cell does not work here: {problems['cell']}")


async def _try_all(host: "Host") -> dict[str, str]:
    """What stands in the way of each runtime, the strongest first; nothing where a sandbox was made, used and ended."""
    from hone.sandbox.cells.runtimes.known import missing
    from hone.schema.sandboxes import RUNTIMES

    return {name: missing(name, host) or await _try(name) for name in reversed(RUNTIMES)}


async def _try(runtime: "RuntimeName") -> str:
    from hone.sandbox.cells.runtimes.known import features
    from hone.sandbox.cells.runtimes.runtime import Feature
    from hone.sandbox.client import Sandbox, SandboxError

    try:
        network = "none" if Feature.LOOPBACK in features(runtime) else "off"
        async with Sandbox(memory_mb=64, disk_mb=16, network=network, runtime=runtime) as box:
            result = await box.exec(["echo", "works"])
            return "" if result.stdout == "works\n" else f"a sandbox is made, but echo does not work in it: {result}"
    except SandboxError as error:
        return str(error)


@app.command()
def bench(rounds: Annotated[int, typer.Option(help="Sandboxes that are made.")] = 100) -> None:
    """Time creation, a program and the end, beside the same program without a sandbox."""
    from rich.table import Table

    from hone.cli.listing import print_table

    table = Table("what", "median")
    for what, seconds in asyncio.run(_bench(rounds)).items():
        table.add_row(what, f"{seconds * 1e3:.2f} ms")
    print_table(table)


async def _bench(rounds: int) -> dict[str, float]:
    import statistics
    import subprocess
    import time

    from hone.sandbox.client import Sandbox

    times: dict[str, list[float]] = {"program without": [], "create": [], "program": [], "end": []}

    def lap(what: str, since: float) -> float:
        now = time.perf_counter()
        times[what].append(now - since)
        return now

    for _ in range(rounds):
        then = time.perf_counter()
        subprocess.run(["/bin/true"], check=True)  # noqa: ASYNC221 - what is compared with
        then = lap("program without", then)
        async with Sandbox(memory_mb=64, disk_mb=16) as box:
            await box.ready()
            then = lap("create", then)
            await box.exec(["/bin/true"])
            then = lap("program", then)
        lap("end", then)
    return {what: statistics.median(values) for what, values in times.items()}


async def connected(address: str) -> "RemoteNode":
    from hone.sandbox.cache import cache_folder
    from hone.sandbox.client import SandboxError
    from hone.sandbox.wire.remote import RemoteNode

    client = RemoteNode(address or f"unix:{cache_folder('node-local')}/socket", own_token())
    try:
        await client.connected()
    except SandboxError as error:
        raise ValueError(f"{error}; `hone sandbox serve` starts a node") from error
    return client


def own_token() -> str:
    """What this user's commands show to nodes."""
    return os.environ.get("HONE_SANDBOX_TOKEN", "")


def read_tokens(path: Path) -> tuple[dict[str, str], set[str]]:
    """Owners by token, and which of them are gateways."""
    tokens, gateways = {}, set()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if len(words) not in (2, 3) or len(words[1]) < 16 or words[2:] not in ([], ["gateway"]):
            raise ValueError(
                f"{path}, line {number}: give a name and a token of 16 characters or more, and `gateway` for one"
            )
        tokens[words[1]] = words[0]
        if words[2:]:
            gateways.add(words[0])
    return tokens, gateways
