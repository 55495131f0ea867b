"""The same program through an address: a node of its own process behind TCP, and that node behind a gateway's process."""

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from hone.sandbox.client import Sandbox
from sandbox_measures.cells import NETWORK
from sandbox_measures.rounds import FLOOR, Floor, Taken, take_turns, timed

START_SECONDS = 30.0
ADDRESS = re.compile(rb"(tcp://\S+?)[;,]?\s")


async def addresses(floor: Floor, folder: Path, rounds: int) -> Taken:
    """`exec_node` and `exec_gateway`: from the call to the result, over loopback."""
    token = secrets.token_hex(16)
    tokens, tenants = folder / "tokens", folder / "tenants.toml"
    tokens.write_text(f"bench {token} gateway\n")
    tokens.chmod(0o600)
    tenants.write_text(f'[[tenants.bench.tokens]]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n')
    serve = ("serve", "--listen", "tcp://127.0.0.1:0", "--folder", str(folder / "node"), "--tokens", str(tokens))
    async with contextlib.AsyncExitStack() as stack:
        node = await stack.enter_async_context(_serving(*serve))
        relay = ("gateway", "--nodes", node, "--listen", "tcp://127.0.0.1:0", "--tenants", str(tenants))
        gateway = await stack.enter_async_context(_serving(*relay, token=token))
        near = await stack.enter_async_context(Sandbox(spec=NETWORK, node=node, token=token))
        far = await stack.enter_async_context(Sandbox(spec=NETWORK, node=gateway, token=token))
        measures = {
            FLOOR: floor,
            "exec_node": lambda: timed(near.exec(["/bin/true"])),
            "exec_gateway": lambda: timed(far.exec(["/bin/true"])),
        }
        for box in (near, far):
            await box.exec(["/bin/true"])
        return await take_turns(rounds, measures)


@contextlib.asynccontextmanager
async def _serving(*arguments: str, token: str = "") -> AsyncIterator[str]:
    """`hone sandbox ...` until the end of the block; its address. token: that it shows to others."""
    program = "from hone.cli.main import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, "sandbox", *arguments,
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "HONE_SANDBOX_TOKEN": token},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await process.stdout.readline()
        found = ADDRESS.search(line)
        if found is None:
            raise RuntimeError(f"`hone sandbox {arguments[0]}` says {line!r} instead of its address")
        yield found[1].decode()
    finally:
        process.terminate()
        await process.wait()
