"""The floor of the machine, F, and measurements taken in turn with it, so that ratios are of the same minutes."""

import asyncio
import statistics
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

FLOOR = "f"
SOURCE = r"""
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

Measure = Callable[[], Awaitable[float | list[float]]]


class Floor:
    """Measures F once for each call: a fork, exec of /bin/true and wait by a small C program."""

    def __init__(self, folder: Path) -> None:
        (folder / "floor.c").write_text(SOURCE)
        subprocess.run(["cc", "-O2", "-o", folder / "floor", folder / "floor.c"], check=True)
        self._process = subprocess.Popen([folder / "floor"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    async def __call__(self) -> float:
        self._process.stdin.write(b"x")
        return struct.unpack("q", self._process.stdout.read(8))[0] / 1e9

    def close(self) -> None:
        """End the program."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds by measure, in the order of the rounds."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def milliseconds(self, name: str) -> float:
        """The median."""
        return statistics.median(self.seconds[name]) * 1000

    def ratio(self, name: str, to: str = FLOOR) -> float:
        """Of the medians."""
        return statistics.median(self.seconds[name]) / statistics.median(self.seconds[to])

    def spread(self, name: str, to: str = FLOOR) -> tuple[float, float]:
        """The quartiles of one measure in units of the other's median."""
        unit = statistics.median(self.seconds[to])
        low, _, high = statistics.quantiles(self.seconds[name], n=4)
        return low / unit, high / unit


async def take_turns(rounds: int, measures: Mapping[str, Measure], *, pause_seconds: float = 0.0) -> Taken:
    """Every measure once in each round. pause_seconds: between two, for what the kernel ends behind one's back."""
    taken = Taken({name: [] for name in measures})
    for _ in range(rounds):
        for name, measure in measures.items():
            seconds = await measure()
            taken.seconds[name] += seconds if isinstance(seconds, list) else [seconds]
            if pause_seconds:
                await asyncio.sleep(pause_seconds)
    return taken


async def timed(work: Awaitable[object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    await work
    return time.perf_counter() - started
