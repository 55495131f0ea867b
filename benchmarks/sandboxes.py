"""Cells beside the floor of the machine, F: a fork, exec of /bin/true and wait by a small C program, measured in turn.

Creation, execution, a burst of 512 and sustained turnover through the Python API in this process; then what bubblewrap,
crun and runc take for the same, from their start to the exit of `true`, where they are installed. Ratios are of medians,
with F taken in the same round.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness

from hone.sandbox.cells import Cell, Cells
from hone.schema.sandboxes import SandboxSpec

SMALL = SandboxSpec(memory_mb=256, disk_mb=64, max_processes=64)
OFF = SandboxSpec(memory_mb=256, disk_mb=64, max_processes=64, network="off")
BARS = {
    "create_f": 1.8,
    "create_net_f": 3.0,
    "exec_f": 1.25,
    "burst_512_seconds": 1.5,
    "idle_kb": 400,
    "sustained_per_core": 200,
}
FLOOR = r"""
#include <stdint.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
int main(void)
{
    char byte;
    while (read(0, &byte, 1) == 1) {
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        pid_t pid = fork();
        if (!pid) {
            execl("/bin/true", "true", (char *)0);
            _exit(1);
        }
        waitpid(pid, 0, 0);
        clock_gettime(CLOCK_MONOTONIC, &to);
        int64_t nanoseconds = (to.tv_sec - from.tv_sec) * 1000000000LL + to.tv_nsec - from.tv_nsec;
        write(1, &nanoseconds, 8);
    }
}
"""


class Floor:
    """Measures F, once for each call."""

    def __init__(self, folder: Path) -> None:
        (folder / "floor.c").write_text(FLOOR)
        subprocess.run(["cc", "-O2", "-o", folder / "floor", folder / "floor.c"], check=True)
        self._process = subprocess.Popen([folder / "floor"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def __call__(self) -> float:
        self._process.stdin.write(b"x")
        return struct.unpack("q", self._process.stdout.read(8))[0] / 1e9

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--burst", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0, help="of sustained turnover")
    parser.add_argument("--peer-runs", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        floor = Floor(Path(folder))
        figures = asyncio.run(measure(floor, arguments))
        peers = {name: peer(floor, run, arguments.peer_runs) for name, run in commands(Path(folder)).items()}
        floor.close()
    rows = [(name, figures[name], bar, "yes" if meets(name, figures[name]) else "NO") for name, bar in BARS.items()]
    harness.show_table("cells", ["figure", "measured", "bar", "kept"], rows)
    rows = [("cell", figures["create_net_f"] + figures["exec_f"])] + [
        (name, value.get("create_f", value.get("reason"))) for name, value in peers.items()
    ]
    harness.show_table("create with network, run true, in F", ["what", "F"], rows)
    harness.finish(
        "sandboxes",
        {
            "claim": "create <= 1.8 F, with a network <= 3 F; exec <= 1.25 F; 512 at once within 1.5 s; >= 200/s per core",
            "ratio": BARS["exec_f"] / figures["exec_f"],
            **figures,
            "peers": peers,
            "bars": BARS,
        },
        "msgspec",
    )


def meets(name: str, value: float) -> bool:
    return value >= BARS[name] if name == "sustained_per_core" else value <= BARS[name]


async def measure(floor: Floor, arguments: argparse.Namespace) -> dict[str, float]:
    floors, off, none, ended, exec_floors, execs = [], [], [], [], [], []
    async with Cells() as cells:
        running = await cells.create(SMALL)
        await running.exec(["/bin/true"])
        for _ in range(arguments.runs):
            floors.append(floor())
            for spec, taken in ((OFF, off), (SMALL, none)):
                started = time.perf_counter()
                cell = await cells.create(spec)
                taken.append(time.perf_counter() - started)
                started = time.perf_counter()
                await cell.destroy()
                ended.append(time.perf_counter() - started)
        # Apart from the creations: the kernel takes a cell's network down long after the cell is gone.
        for _ in range(arguments.runs):
            exec_floors.append(floor())
            started = time.perf_counter()
            assert (await running.exec(["/bin/true"])).is_success
            execs.append(time.perf_counter() - started)
    f = statistics.median(floors)
    return {
        "f_milliseconds": f * 1000,
        "create_f": statistics.median(off) / f,
        "create_net_f": statistics.median(none) / f,
        "destroy_f": statistics.median(ended) / f,
        "exec_f": statistics.median(execs) / statistics.median(exec_floors),
        "create_min_f": min(off) / min(floors),
        "create_net_min_f": min(none) / min(floors),
        "exec_min_f": min(execs) / min(exec_floors),
        **await burst(arguments.burst),
        "sustained_per_core": await sustained(arguments.seconds),
    }


async def burst(number: int) -> dict[str, float]:
    """All at once until all are ready; what each then costs the machine, idle; exec in all of them at once."""
    async with Cells() as cells:
        await cells.create(OFF)
        before = available_kb()
        started = time.perf_counter()
        made = await asyncio.gather(*(cells.create(OFF) for _ in range(number)))
        ready = time.perf_counter() - started
        counted = [used for cell in made if (used := cell.usage_bytes()) is not None]
        # What the kernel charges to a cell, page tables and files included; without a cgroup, what the machine lost.
        idle = statistics.mean(counted) / 1024 if counted else (before - available_kb()) / number
        started = time.perf_counter()
        results = await asyncio.gather(*(cell.exec(["/bin/true"]) for cell in made))
        executed = time.perf_counter() - started
        assert all(result.is_success for result in results)
    return {f"burst_{number}_seconds": ready, "idle_kb": idle, "exec_all_per_second": number / executed}


async def sustained(seconds: float) -> float:
    """Create, exec and destroy, over and over, in as many tasks as keep the cores busy; cells per second and core."""
    cores = len(os.sched_getaffinity(0))
    counts = [0] * (2 * cores)

    async def turn_over(cells: Cells, number: int) -> None:
        while time.perf_counter() < end:
            cell: Cell = await cells.create(OFF)
            assert (await cell.exec(["/bin/true"])).is_success
            await cell.destroy()
            counts[number] += 1

    async with Cells() as cells:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(turn_over(cells, number) for number in range(len(counts))))
    return sum(counts) / seconds / cores


def available_kb() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def peer(floor: Floor, run: Callable[[], None] | str, runs: int) -> dict[str, float | str]:
    if isinstance(run, str):
        return {"reason": run}
    floors, taken = [], []
    try:
        for _ in range(runs):
            floors.append(floor())
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    except subprocess.CalledProcessError as error:
        return {"reason": f"fails: {error.stderr.decode(errors='replace').strip()[-200:]}"}
    return {
        "create_f": statistics.median(taken) / statistics.median(floors),
        "milliseconds": statistics.median(taken) * 1000,
    }


def commands(folder: Path) -> dict[str, Callable[[], None] | str]:
    """How each peer runs `true` behind namespaces of its own; or why it does not."""
    links = [name for name in ("/bin", "/lib", "/lib64", "/sbin") if Path(name).is_symlink()]
    symlinks = [part for name in links for part in ("--symlink", f"usr{name}", name)]
    bubblewrap = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/usr", "/usr", *symlinks,
                  "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "true"]  # fmt: skip
    found: dict[str, Callable[[], None] | str] = {"bwrap": lambda: run_quietly(bubblewrap)}
    for name in ("crun", "runc"):
        if shutil.which(name):
            make_bundle(folder / name, links)
            bundle = [name, "--root", str(folder / f"{name}-state"), "run", "--bundle", str(folder / name)]
            found[name] = lambda bundle=bundle: run_quietly([*bundle, f"bench-{time.monotonic_ns()}"])
    return {name: run if shutil.which(name) else "not installed" for name, run in found.items()}


def make_bundle(folder: Path, links: list[str]) -> None:
    (folder / "rootfs").mkdir(parents=True)
    for name in ("usr", "proc", "dev"):
        (folder / "rootfs" / name).mkdir()
    for name in links:
        (folder / "rootfs" / name[1:]).symlink_to(f"usr{name}")
    config = {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "env": ["PATH=/usr/bin"], "cwd": "/", "noNewPrivileges": True},
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def run_quietly(command: list[str]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)


if __name__ == "__main__":
    main()
