"""Real code in cells: the canonical solutions of HumanEval and MBPP, and stubs of them, run against their tests.

Three sides run the same programs at the same concurrency, in turns, a chunk of programs each: `plain`, a `python -c` of this
machine without a sandbox; `exec`, the same command in a fresh cell for each program; and `snippet`, a fork of a warm
interpreter in a fresh cell. A program is a solution with its tests below it; it passed when its exit code is 0. CPU-seconds
are those of the programs and of what makes and ends the cells: this process, its spawner and its zygotes.
"""

import argparse
import ast
import asyncio
import contextlib
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import harness

from hone.sandbox.client import Outcome, Sandbox, SandboxSpec
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node

DATA = Path(os.environ.get("HONE_DATA") or Path(__file__).parents[2] / "shared" / "data")
SPEC = SandboxSpec(memory_mb=1024, disk_mb=32, max_processes=64, ttl_seconds=600)
CHUNK = 64
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Program:
    """A solution and its tests, and the same tests with a stub in the solution's place."""

    name: str
    right: str
    stub: str


@dataclass
class Tally:
    """What a side's runs came to."""

    passed: set[str] = field(default_factory=set)
    not_passed: set[str] = field(default_factory=set)
    undecided: set[str] = field(default_factory=set)
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ran:
    """One program's end. cpu_seconds: of its sandbox in all, which this process's own accounts do not show."""

    is_passed: bool
    is_decided: bool = True
    cpu_seconds: float = 0.0


Run = Callable[[str], Awaitable[Ran]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=DATA, help="the folder with humaneval and mbpp; by default $HONE_DATA"
    )
    parser.add_argument("--every", type=int, default=1, help="take every so-manieth program only")
    parser.add_argument("--concurrency", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for each program")
    arguments = parser.parse_args()
    programs = [*humaneval(arguments.data), *mbpp(arguments.data)][:: arguments.every]
    measured = asyncio.run(measure(programs, arguments.concurrency, arguments.timeout))
    print(json.dumps(measured, indent=2))
    if arguments.every == 1:
        harness.finish("sandbox_real_code", {"claim": "public solutions pass in cells and stubs fail", **measured})


def humaneval(data: Path) -> Iterator[Program]:
    with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        for row in map(json.loads, lines):
            tests = f"{row['test']}\ncheck({row['entry_point']})\n"
            yield program(row["task_id"], row["prompt"] + row["canonical_solution"], tests)


def mbpp(data: Path) -> Iterator[Program]:
    with (data / "mbpp" / "mbpp.jsonl").open() as lines:
        for row in map(json.loads, lines):
            tests = "\n".join([row["test_setup_code"], *row["test_list"], *row["challenge_test_list"]])
            yield program(f"MBPP/{row['task_id']}", row["code"], tests)


def program(name: str, solution: str, tests: str) -> Program:
    solution = solution.replace("\r\n", "\n")
    tree = ast.parse(solution)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
    return Program(name, f"{solution}\n\n{tests}", f"{ast.unparse(tree)}\n\n{tests}")


async def measure(programs: list[Program], concurrency: int, timeout_seconds: float) -> dict[str, object]:
    """All sides over all programs: solutions, then stubs, in chunks that the sides take in turns."""
    async with Node(limits=Limits(max_warm=2 * concurrency)) as node:
        sides = {
            "plain": lambda code: plain(code, timeout_seconds),
            "exec": lambda code: in_cell(node, code, timeout_seconds, is_warm=False),
            "snippet": lambda code: in_cell(node, code, timeout_seconds, is_warm=True),
        }
        tallies = {name: {"right": Tally(), "stub": Tally()} for name in sides}
        for run in sides.values():  # the first of a side starts what the others find
            await run("pass")
        for kind in ("right", "stub"):
            for start in range(0, len(programs), CHUNK):
                chunk = programs[start : start + CHUNK]
                for name, run in sides.items():
                    await one_chunk(run, chunk, kind, concurrency, tallies[name][kind])
    return report(tallies, len(programs), concurrency)


async def one_chunk(run: Run, chunk: list[Program], kind: str, concurrency: int, tally: Tally) -> None:
    free = asyncio.Semaphore(concurrency)

    async def one(given: Program) -> float:
        async with free:
            ran = await run(given.right if kind == "right" else given.stub)
        where = tally.undecided if not ran.is_decided else tally.passed if ran.is_passed else tally.not_passed
        where.add(given.name)
        return ran.cpu_seconds

    cpu, began = own_cpu_seconds(), time.perf_counter()
    seconds = await asyncio.gather(*(one(given) for given in chunk))
    tally.wall_seconds.append((time.perf_counter() - began) / len(chunk))
    tally.cpu_seconds.append((own_cpu_seconds() - cpu + sum(seconds)) / len(chunk))


async def plain(code: str, timeout_seconds: float) -> Ran:
    """What a grader without sandboxes does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", code, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            return Ran(await process.wait() == 0)
    except TimeoutError:
        process.kill()
        await process.wait()
        return Ran(False)


async def in_cell(node: Node, code: str, timeout_seconds: float, *, is_warm: bool) -> Ran:
    async with Sandbox(spec=SPEC, node=node) as box:
        if is_warm:
            result = await box.snippet(code, timeout_seconds=timeout_seconds)
        else:
            result = await box.exec(["python3", "-I", "-c", code], timeout_seconds=timeout_seconds)
        used = await box.usage()
    is_decided = result.outcome in (Outcome.EXITED, Outcome.TIMEOUT, Outcome.SIGNALLED)
    return Ran(result.is_success, is_decided, used.cpu_seconds)


def own_cpu_seconds() -> float:
    """Of this process, its children that have ended, and its children that live: the spawner and the zygotes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = 0
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):
                user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
                ticks += int(user) + int(system)
    return sum(one.ru_utime + one.ru_stime for one in used) + ticks / TICKS


def report(tallies: dict[str, dict[str, Tally]], num_programs: int, concurrency: int) -> dict[str, object]:
    figures: dict[str, object] = {"num_programs": num_programs, "concurrency": concurrency, "chunk": CHUNK}
    reference = tallies["plain"]["right"]
    for name, kinds in tallies.items():
        right, stub = kinds["right"], kinds["stub"]
        figures[name] = {
            "solutions_passed": len(right.passed),
            "solutions_not_passed": sorted(right.not_passed | right.undecided),
            "stubs_failed": len(stub.not_passed),
            "stubs_not_failed": sorted(stub.passed | stub.undecided),
            "cpu_ms_per_test": spread([1e3 * one for one in right.cpu_seconds]),
            "wall_ms_per_test": spread([1e3 * one for one in right.wall_seconds]),
            "cpu_ratio_to_plain": spread(ratios(right.cpu_seconds, reference.cpu_seconds)),
            "wall_ratio_to_plain": spread(ratios(right.wall_seconds, reference.wall_seconds)),
        }
    return figures


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Chunk by chunk: the sides ran each in turns."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
