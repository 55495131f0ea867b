"""Cheap rollouts: CPU time, throughput, stalls of the event loop and memory of rollouts against a mock chat server.

The server is a process of its own and answers every request after 50 ms. Our side is what `hone eval --base-url` runs:
an evaluation with the OpenAI-compatible sampler. CPU time is that of the process that runs the rollouts, from the first
request to the last reward. A stall is how late a timer of the same event loop fires.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import harness

HERE = Path(__file__).parent
PEER = "verifiers==0.3.1"
PEER_RUNS = 1
PEER_SHARE = 0.2
"""It takes ten times as long, and no longer for a rollout when there are fewer of them."""
LATENCY_SECONDS = 0.05
MEMORY_LATENCY_SECONDS = 3.0
TICK_SECONDS = 0.005
SETTINGS = {
    "single_512": {"concurrent": 512, "rollouts": 5120, "turns": 1},
    "single_2048": {"concurrent": 2048, "rollouts": 10240, "turns": 1},
    "four_turns_512": {"concurrent": 512, "rollouts": 2560, "turns": 4},
}
BARS = {
    "single_512": {"cpu_seconds_per_1k": 1.0, "rollouts_per_second": 900.0},
    "single_2048": {"max_stall_ms": 50.0},
    "four_turns_512": {"cpu_seconds_per_1k": 3.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the rollouts, for a quick look")
    parser.add_argument("--peer", action="store_true", help=f"measure {PEER} too, in a virtual environment of its own")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Every live rollout is an open connection.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))
    if arguments.one:
        print(json.dumps(one(json.loads(arguments.one))))
        return
    sides = {"hone": Side([sys.executable, __file__, "--one"], arguments.runs, arguments.share)}
    if arguments.peer:
        command = [str(peer_python()), str(HERE / "rollouts_verifiers.py")]
        sides["verifiers"] = Side(command, PEER_RUNS, PEER_SHARE * arguments.share)
    report(measure(sides))


@dataclass(frozen=True)
class Side:
    """What to start for a measurement, how often, and for which share of the rollouts."""

    command: list[str]
    runs: int
    share: float


def measure(sides: Mapping[str, Side]) -> dict[str, dict[str, dict[str, object]]]:
    """Every setting in fresh processes, the sides in turns; medians with least and greatest, by side and setting."""
    figures: dict[str, dict[str, dict[str, object]]] = {name: {} for name in sides}
    for setting_name, setting in SETTINGS.items():
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        with chat_server(LATENCY_SECONDS) as url:
            for turn in range(max(side.runs for side in sides.values())):
                for name, side in sides.items():
                    if turn < side.runs:
                        count = max(setting["concurrent"], int(setting["rollouts"] * side.share))
                        found[name].append(run([*side.command, json.dumps({**setting, "rollouts": count, "url": url})]))
        for name, runs in found.items():
            figures[name][setting_name] = {key: harness.summary([one[key] for one in runs]) for key in runs[0]}
    for name, side in sides.items():
        with chat_server(MEMORY_LATENCY_SECONDS) as url:
            setting = {"concurrent": 2048, "rollouts": 2048, "turns": 1, "url": url}
            figures[name]["memory_2048"] = run([*side.command, json.dumps(setting)])
    return figures


def run(command: list[str]) -> dict[str, float]:
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


@contextlib.contextmanager
def chat_server(latency: float):
    """The mock server's address, while it runs."""
    server = subprocess.Popen(
        [sys.executable, str(HERE / "chat_server.py"), str(latency)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
    finally:
        server.terminate()
        server.wait()


def one(setting: dict[str, object]) -> dict[str, float]:
    """One measurement of our side."""
    return asyncio.run(rollouts(setting))


async def rollouts(setting: dict[str, object]) -> dict[str, float]:
    from hone.envs import Limits, MultiTurn, Rubric, Task, reward, user
    from hone.envs.pacing import spare_collector
    from hone.evals.evaluate import evaluate
    from hone.inference.client import ChatSampler
    from hone.schema.sampling import SamplingParameters

    @reward
    def exact(answer: str, reference: str) -> float:
        return float(reference in answer)

    class Chat(MultiTurn):
        async def reply(self, rollout):
            return None if rollout.num_turns == setting["turns"] else [user("Are you sure? Answer again.")]

    count = setting["rollouts"]
    tasks = [Task(prompt=(user(f"What is {index} times 6?"),), reference="42") for index in range(count)]
    assert (
        len({task.key for task in tasks}) == count
    )  # hashed before the clock starts, as the peer's data set is loaded
    environment = Chat(name="chat", rubric=Rubric([exact]), train=[], held_out=tasks)
    async with ChatSampler(setting["url"], "mock") as sampler:
        # A first rollout pays for imports; then what the worker and `hone eval` do before the others.
        await evaluate(environment, sampler, num_tasks=1)
        spare_collector()
        async with measured(setting) as found:
            result = await evaluate(
                environment,
                sampler,
                num_tasks=count,
                max_concurrent=setting["concurrent"],
                sampling=SamplingParameters(max_tokens=64),
                limits=Limits(deadline_seconds=120.0),
            )
    assert result.num_rollouts == count
    assert not result.failures, result.failures
    return found


@contextlib.asynccontextmanager
async def measured(setting: dict[str, object]):
    """The figures of the body, complete when it has ended."""
    found: dict[str, float] = {}
    gc.collect()
    resident = resident_bytes()
    watch = asyncio.create_task(watch_stalls(found))
    await asyncio.sleep(0)
    began, cpu = time.perf_counter(), time.process_time()
    yield found
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    watch.cancel()
    found["cpu_seconds_per_1k"] = 1000 * cpu_seconds / setting["rollouts"]
    found["rollouts_per_second"] = setting["rollouts"] / seconds
    found["bytes_per_live_rollout"] = (found.pop("resident_max") - resident) / setting["concurrent"]


async def watch_stalls(found: dict[str, float]) -> None:
    """On a machine that others use too, a stall may be theirs: what this thread computed meanwhile is shown beside it."""
    found |= {"max_stall_ms": 0.0, "max_stall_cpu_ms": 0.0, "resident_max": 0.0}
    while True:
        due, cpu_due = time.perf_counter() + TICK_SECONDS, time.thread_time() + TICK_SECONDS
        await asyncio.sleep(TICK_SECONDS)
        found["max_stall_ms"] = max(found["max_stall_ms"], 1000 * (time.perf_counter() - due))
        found["max_stall_cpu_ms"] = max(found["max_stall_cpu_ms"], 1000 * (time.thread_time() - cpu_due))
        found["resident_max"] = max(found["resident_max"], resident_bytes())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peer_python() -> Path:
    """The interpreter of the peer's virtual environment: its dependencies do not go with ours."""
    folder = HERE / "peers" / "verifiers"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER], check=True)
    return python


def report(sides: dict[str, dict[str, dict[str, object]]]) -> None:
    columns = [
        "cpu_seconds_per_1k",
        "rollouts_per_second",
        "max_stall_ms",
        "max_stall_cpu_ms",
        "bytes_per_live_rollout",
    ]
    rows = [
        (side, name, *(value["median"] if isinstance(value := figures[column], dict) else value for column in columns))
        for side, settings in sides.items()
        for name, figures in settings.items()
    ]
    harness.show_table("rollouts against a chat server with 50 ms latency", ["side", "setting", *columns], rows)
    ours = sides["hone"]
    medians = {
        column: {name: ours[name][column]["median"] for name in SETTINGS}
        for column in ("cpu_seconds_per_1k", "rollouts_per_second", "max_stall_ms", "max_stall_cpu_ms")
    }
    harness.finish(
        "rollouts",
        {
            "claim": "single turn: at most 1 CPU-second per 1,000 rollouts and at least 900 rollouts/s at 512 concurrent;"
            " no stall above 50 ms at 2,048; 4 turns: at most 3 CPU-seconds per 1,000",
            "ratio": BARS["single_512"]["cpu_seconds_per_1k"] / medians["cpu_seconds_per_1k"]["single_512"],
            **medians,
            "bytes_per_live_rollout": ours["memory_2048"]["bytes_per_live_rollout"],
            "bars": BARS,
            "sides": sides,
        },
        "aiohttp",
        "msgspec",
    )


if __name__ == "__main__":
    main()
