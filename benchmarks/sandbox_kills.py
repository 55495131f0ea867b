"""Kill clients and nodes of sandboxes at random moments, sweep, and count what is left. All of it has to be 0.

Clients create sandboxes, one by one and in bursts, and run programs with daemons, sessions of Python, files and pauses in
them, in a node of their own process or at one in another process, with a warm pool. They die by SIGKILL, also while they
start; so do the nodes. What is left is counted after the next node of the same folder has started and ended in order.
"""

import argparse
import asyncio
import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from sandbox_measures.victim import MARK

from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.cgroups import PREFIX
from hone.sandbox.cells.host import FIRST_ID, LAST_ID
from hone.sandbox.node.node import Node
from hone.sandbox.wire.serve import NodeServer

VICTIM = Path(__file__).parent / "sandbox_measures" / "victim.py"
LANES = ("embedded", "served")
MOST_SECONDS = 0.5  # that a victim is at work
START_SECONDS = 60.0
DYING_SECONDS = 20.0
PR_SET_CHILD_SUBREAPER = 36
KEPT = {"journal.jsonl", "sandboxes.jsonl", "lock"}  # what a node keeps in its folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="of each kind, at once")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whatever outlives its parent is seen here
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # and the kernel reaps it
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(run(arguments, Path(folder)))
    harness.finish("sandbox_kills", {"claim": "nothing is left", "seed": arguments.seed, **result})
    sys.exit(1 if any(result["left"].values()) or result["complaints"] else 0)


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    started = time.monotonic()
    mounts, others = mounted(), cgroups()
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "VICTIM_COMPLAINTS": str(folder / "complaints")}
    kinds = [kind for kind in LANES for _ in range(arguments.lanes)]
    lanes = [
        Lane(kind, folder / f"node-{number}", environment, random.Random(f"{arguments.seed}/{number}"))
        for number, kind in enumerate(kinds)
    ]
    shares = [arguments.kills // len(lanes) + (number < arguments.kills % len(lanes)) for number in range(len(lanes))]
    await asyncio.gather(*(lane.kill(share) for lane, share in zip(lanes, shares, strict=True)))
    leases = 0
    for lane in lanes:
        leases += await sweep(lane.folder)
    async with Cells():  # whoever comes next sweeps, too
        pass
    pids = {pid for lane in lanes for pid in lane.pids}
    complaints = folder / "complaints"
    folders = [path for lane in lanes for path in lane.folder.glob("*") if path.name not in KEPT]
    folders += temporary.iterdir()
    for path in folders:
        print(f"left: {path}", file=sys.stderr)
    return {
        "kills": {
            kind: sum(lane.num_kills[kind] for lane in lanes) for kind in ("client", "node", "client while it starts")
        },
        "left": {
            **await left_processes(),
            "mounts": len(mounted() - mounts),
            "cgroups": len({path for path in cgroups() - others if owner(path) in pids}),
            "leases": leases,
            "sockets": sum(path.is_socket() for path in folders),
            "folders": len(folders),
        },
        "complaints": complaints.read_text() if complaints.exists() else "",
        "seconds": round(time.monotonic() - started),
    }


class Lane:
    """One client after another, and with `served` one node after another, killed by chance."""

    def __init__(self, kind: str, folder: Path, environment: dict[str, str], chance: random.Random) -> None:
        self.folder = folder
        self.pids: list[int] = []
        self.num_kills = dict.fromkeys(("client", "node", "client while it starts"), 0)
        self._is_served = kind == "served"
        self._environment = environment
        self._chance = chance
        self._client: subprocess.Popen[bytes] | None = None
        self._node: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    async def kill(self, number: int) -> None:
        """So many of them."""
        try:
            for _ in range(number):
                await self._kill_one()
        finally:
            for process in (self._client, self._node):
                if process is not None:
                    await end(process)

    async def _kill_one(self) -> None:
        if self._is_served and self._node is None:
            self._node = self._start("node", str(self.folder))
            await until_at_work(self._node)
        if self._client is None:
            self._client = self._start(
                *(("client", f"unix:{self.folder}/socket") if self._is_served else ("embedded",))
            )
            if self._chance.random() < 0.2:
                await asyncio.sleep(self._chance.uniform(0, MOST_SECONDS))
                await self._end_client("client while it starts")
                return
            await until_at_work(self._client)
        await asyncio.sleep(self._chance.uniform(0, MOST_SECONDS))
        if self._node is not None and self._chance.random() < 0.5:
            await end(self._node)
            self._node = None
            self.num_kills["node"] += 1
            await asyncio.sleep(0.05)  # the client hears of it
            await end(self._client)
            self._client = None
        else:
            await self._end_client("client")

    async def _end_client(self, kind: str) -> None:
        await end(self._client)
        self._client = None
        self.num_kills[kind] += 1

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, str(VICTIM), *arguments], stdout=subprocess.PIPE, env=self._environment
        )
        self.pids.append(process.pid)
        return process


async def until_at_work(process: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(START_SECONDS):
        line = await asyncio.to_thread(process.stdout.readline)
    if line != b"at work\n":
        raise RuntimeError(f"a victim does not start: {line!r}")


async def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    await asyncio.to_thread(process.wait)
    process.stdout.close()


async def sweep(folder: Path) -> int:
    """Start and end a node of the folder, twice; how many leases the second still knows of."""
    for _ in range(2):
        async with Node("victim", folder=folder) as node, NodeServer(node, f"unix:{folder}/socket"):
            left = len(node.lost) + int(node.statistics()["sandbox/leases"])
    return left


async def left_processes() -> dict[str, int]:
    """Processes that are still there after a while, their namespaces, and the ids of cells they have."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DYING_SECONDS):
            while descendants():  # noqa: ASYNC110 - the ends of other processes' children are no events
                await asyncio.sleep(0.05)
    left = descendants()
    for pid in left:
        print(f"left: {pid} {command_of(pid)}", file=sys.stderr)
    ids = {uid for pid in left if FIRST_ID <= (uid := owner_of(pid)) < LAST_ID}
    return {"processes": len(left), "namespaces": len(namespaces(left)), "ids": len(ids)}


def descendants() -> set[int]:
    """Of this process; and whatever else carries the mark of the victims' programs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                parents[int(path.parent.name)] = int(fields[1])
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in found | {os.getpid()}} - found:
        found |= more
    return found | {pid for pid in parents if MARK in command_of(pid)}


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def owner_of(pid: int) -> int:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return 0


def namespaces(pids: set[int]) -> set[str]:
    """Those of some processes that this one is not in itself."""
    found: set[str] = set()
    for pid in [*pids, os.getpid()]:
        with contextlib.suppress(OSError):
            links = {str(path.readlink()) for path in Path(f"/proc/{pid}/ns").iterdir()}
            found = found | links if pid != os.getpid() else found - links
    return found


def mounted() -> set[str]:
    return set(Path("/proc/self/mountinfo").read_text().splitlines())


def cgroups() -> set[str]:
    """The folders of all processes that make cells."""
    return {path for path, _, _ in os.walk("/sys/fs/cgroup") if path.rpartition("/")[2].startswith(PREFIX)}


def owner(path: str) -> int:
    """The number of the process that such a folder is named after; another one may have had it before."""
    return int(path.rpartition(PREFIX)[2].split("-")[0])


if __name__ == "__main__":
    main()
