"""A node among four is lost: how soon all its sandboxes are told so, and whether those of the others notice.

Each node is in a network namespace of its own, which takes root; a gateway and the clients are outside. `kill` sends the
node SIGKILL. `cut` takes its link down, so that every connection to it stays as it was and nothing comes any more. Every
sandbox has a program under way all the time and is asked for short ones in turn, whose answers have to be its own.
"""

import argparse
import asyncio
import contextlib
import hashlib
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import harness

from hone.sandbox.errors import SandboxError
from hone.sandbox.wire.remote import RemoteNode, RemoteSandbox
from hone.schema.sandboxes import Outcome, SandboxSpec

NUM_NODES = 4
NUM_CLIENTS = 8
NUM_PROBES = 4
MAX_CREATING = 64
START_SECONDS = 60.0
LIMIT_SECONDS = 2.0
HONE = [sys.executable, "-c", "from hone.cli.main import main; main()", "sandbox"]


@dataclass
class Network:
    """A namespace with a link to the outside."""

    name: str
    link: str
    address: str

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told."""
        _ip("link", "set", self.link, "down")


@dataclass
class Seen:
    """What the clients saw."""

    lost_after: list[float] = field(default_factory=list)
    later_after: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--how", choices=["kill", "cut"], default="kill")
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of watching, before and after")
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="the figures, in results/")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("network namespaces for the nodes take root")
    with tempfile.TemporaryDirectory() as folder, _networks() as networks:
        result = asyncio.run(measure(arguments, Path(folder), networks))
    columns = ["cells lost", "told after, median s", "max s", "wrong", "others' exec ms before", "during"]
    names = ["num_lost", "detection_seconds_median", "detection_seconds_max", "num_wrong"]
    row = [result[name] for name in names] + [result["others_exec_ms_before"], result["others_exec_ms_during"]]
    harness.show_table(f"{arguments.cells} cells on {NUM_NODES} nodes, one lost ({arguments.how})", columns, [row])
    if arguments.keep:
        harness.finish(f"sandbox_node_loss_{arguments.how}", result, "msgspec")
    else:
        print(harness.json.dumps(result))


async def measure(arguments: argparse.Namespace, folder: Path, networks: list[Network]) -> dict[str, object]:
    """Start everything, fill it, take a node away."""
    token = secrets.token_hex(16)
    (folder / "tokens").write_text(f"gateway {token} gateway\n")
    digest = hashlib.sha256(token.encode()).hexdigest()
    (folder / "tenants.toml").write_text(f'[[tenants.bench.tokens]]\nsha256 = "{digest}"\n')
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for number, network in enumerate(networks):
            words = ["serve", "--name", f"n{number}", "--listen", f"tcp://{network.address}:7300", "--tokens",
                     f"{folder}/tokens", "--folder", f"{folder}/node-{number}", "--max-warm", "0",
                     "--drain-seconds", "0"]  # fmt: skip
            inside = ["nsenter", f"--net=/run/netns/{network.name}"]
            nodes.append(await stack.enter_async_context(_serving([*inside, *HONE, *words], token)))
        addresses = ",".join(f"tcp://{one.address}:7300" for one in networks)
        words = [
            "gateway",
            "--nodes",
            addresses,
            "--listen",
            "tcp://127.0.0.1:0",
            "--tenants",
            f"{folder}/tenants.toml",
        ]
        gateway = await stack.enter_async_context(_serving([*HONE, *words], token))
        address = gateway.line.split()[2].rstrip(",")
        clients = [RemoteNode(address, token) for _ in range(NUM_CLIENTS)]
        for client in clients:
            await client.connected()
            stack.push_async_callback(client.close)
        boxes = await _fill(clients, arguments.cells)
        victim = random.choice(boxes).sandbox_id.partition(".")[0]
        number = int(victim[1:])

        def strike() -> None:
            if arguments.how == "kill":
                nodes[number].process.kill()
            else:
                networks[number].cut()

        seen = await _watch(boxes, f"{victim}.", strike, arguments.seconds)
    num_at_victim = sum(box.sandbox_id.startswith(f"{victim}.") for box in boxes)
    return {
        "claim": "every sandbox of a lost node is told within 2 s, no answer is wrong, others go on",
        "ratio": LIMIT_SECONDS / max(seen.lost_after),
        "how": arguments.how,
        "num_cells": len(boxes),
        "num_at_lost_node": num_at_victim,
        "num_lost": len(seen.lost_after),
        "detection_seconds_median": statistics.median(seen.lost_after),
        "detection_seconds_max": max(seen.lost_after),
        "later_call_seconds_max": max(seen.later_after),
        "num_wrong": len(seen.wrong),
        "wrong": seen.wrong[:10],
        "others_exec_ms_before": statistics.median(seen.before) * 1e3,
        "others_exec_ms_during": statistics.median(seen.during) * 1e3,
        "others_exec_ms_max_during": max(seen.during) * 1e3,
        "num_others_exec": len(seen.before) + len(seen.during),
    }


async def _fill(clients: list[RemoteNode], number: int) -> list[RemoteSandbox]:
    spec = SandboxSpec(memory_mb=64, disk_mb=16, max_processes=32, network="off", ttl_seconds=3600.0)
    gate = asyncio.Semaphore(MAX_CREATING)

    async def make(index: int) -> RemoteSandbox:
        async with gate:
            box = await clients[index % len(clients)].create(spec, key=f"cell {index}")
            await box.ready()
            await box.write("name", box.sandbox_id.encode())
            return box

    return list(await asyncio.gather(*(make(index) for index in range(number))))


async def _watch(boxes: list[RemoteSandbox], lost_prefix: str, strike, seconds: float) -> Seen:
    """Programs under way in all sandboxes, short ones in those that stay; what becomes of both."""
    loop, seen = asyncio.get_running_loop(), Seen()
    struck = 0.0

    async def sleep_long(box: RemoteSandbox) -> None:
        is_lost = box.sandbox_id.startswith(lost_prefix)
        try:
            result = await box.exec(["sleep", "600"], timeout_seconds=600)
        except SandboxError as error:
            if not is_lost or not struck or error.outcome is not Outcome.NODE_LOST:
                seen.wrong.append(f"{box.sandbox_id}: {error.outcome} {error}")
                return
            seen.lost_after.append(loop.time() - struck)
            began = loop.time()
            try:
                seen.wrong.append(f"{box.sandbox_id}: later {await box.exec(['true'])}")
            except SandboxError as later:
                if later.outcome is not Outcome.NODE_LOST:
                    seen.wrong.append(f"{box.sandbox_id}: later {later}")
                seen.later_after.append(loop.time() - began)
        else:
            seen.wrong.append(f"{box.sandbox_id}: {result}")

    async def probe() -> None:
        others = [box for box in boxes if not box.sandbox_id.startswith(lost_prefix)]
        while True:
            box = random.choice(others)
            began = time.perf_counter()
            try:
                result = await box.exec(["cat", "name"])
            except SandboxError as error:
                seen.wrong.append(f"{box.sandbox_id}: another's loss became its own: {error}")
                continue
            (seen.during if struck else seen.before).append(time.perf_counter() - began)
            if result.stdout != box.sandbox_id:
                seen.wrong.append(f"{box.sandbox_id} answers {result.stdout!r}")
            await asyncio.sleep(0.01)

    sleeping = [loop.create_task(sleep_long(box)) for box in boxes]
    await asyncio.sleep(1.0)
    probing = [loop.create_task(probe()) for _ in range(NUM_PROBES)]
    await asyncio.sleep(seconds)
    struck = loop.time()
    strike()
    await asyncio.sleep(max(seconds, 2 * LIMIT_SECONDS))
    for task in (*sleeping, *probing):
        task.cancel()
    await asyncio.wait([*sleeping, *probing])
    return seen


@dataclass
class Serving:
    """A process, and the line by which it said that it serves."""

    process: asyncio.subprocess.Process
    line: str


@contextlib.asynccontextmanager
async def _serving(command: list[str], token: str) -> AsyncIterator[Serving]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env={**os.environ, "HONE_SANDBOX_TOKEN": token}
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = (await process.stdout.readline()).decode()
        if not line:
            raise RuntimeError(f"{' '.join(command)} does not serve")
        yield Serving(process, line)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await process.wait()


@contextlib.contextmanager
def _networks() -> Iterator[list[Network]]:
    """Namespaces that see the outside and not one another."""
    made: list[Network] = []
    try:
        for number in range(NUM_NODES):
            mark = f"{os.getpid()}-{number}"
            base = f"198.18.{os.getpid() % 256}"
            one = Network(f"hone-loss-{mark}", f"hl{mark}", f"{base}.{4 * number + 2}")
            _ip("netns", "add", one.name)
            made.append(one)
            _ip("link", "add", one.link, "type", "veth", "peer", "name", "outside", "netns", one.name)
            _ip("address", "add", f"{base}.{4 * number + 1}/30", "dev", one.link)
            _ip("link", "set", one.link, "up")
            for words in (
                ("address", "add", f"{one.address}/30", "dev", "outside"),
                ("link", "set", "outside", "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", one.name, *words)
        yield made
    finally:
        for one in made:
            subprocess.run(["ip", "netns", "delete", one.name], check=False)
            subprocess.run(["ip", "link", "delete", one.link], check=False, stderr=subprocess.DEVNULL)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


if __name__ == "__main__":
    main()
