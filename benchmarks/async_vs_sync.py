"""Overlap pays: the same RL run with in-flight weight updates on and off, where a few rollouts take long.

The environment waits before it replies, most rollouts briefly and some long (a tool call, a test suite). With updates
in flight, unfinished rollouts go on under new weights; without, every update waits for the last rollout. Whole runs
(trainer, inference server, orchestrator, env worker as processes), interleaved; the step time is the mean time between
two optimizer steps after the first few (without, steps come in bursts).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/tiny/reverse.toml"
WARMUP_STEPS = 4

ENVIRONMENT = '''
"""Reverse a few letters, after a wait with a long tail."""

import asyncio
import random

from hone.envs import MultiTurn, load_environment as load


def load_environment(short_seconds: float = 0.05, long_seconds: float = 2.5, long_share: float = 0.02) -> "Waiting":
    return Waiting(load("reverse_text", prompt="{text}", max_length=6), short_seconds, long_seconds, long_share)


class Waiting(MultiTurn):
    def __init__(self, inner, short_seconds, long_seconds, long_share):
        super().__init__(
            name="waiting", rubric=inner.rubric, train=inner._train, held_out=inner._held_out, gold=inner.gold
        )
        self._inner = inner
        self._waits = short_seconds, long_seconds, long_share

    async def reply(self, rollout):
        short, long, share = self._waits
        draw = random.Random(f"{rollout.task.key}-{rollout.attempt}")
        await asyncio.sleep(long if draw.random() < share else short * draw.random())
        return None
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_environment(folder)
        step_seconds: dict[bool, list[float]] = {True: [], False: []}
        for index in range(arguments.runs):
            for in_flight in (True, False):
                step_seconds[in_flight].append(mean_step(folder, index, in_flight, arguments.steps))
    on, off = harness.summary(step_seconds[True]), harness.summary(step_seconds[False])
    rows = [(name, side["median"], side["min"], side["max"]) for name, side in (("in flight", on), ("waiting", off))]
    harness.show_table("seconds per optimizer step", ["weight updates", "median", "min", "max"], rows)
    harness.finish(
        "async_vs_sync",
        {
            "claim": "with long-tailed rollouts a step without in-flight updates takes > 2 x as long",
            "ratio": off["median"] / on["median"],
            "bar": 2.0,
            "in_flight_step_seconds": on,
            "waiting_step_seconds": off,
        },
        "torch",
    )


def write_environment(folder: Path) -> None:
    """An installed environment, as far as the import system can tell: a module and the metadata of a distribution."""
    (folder / "waiting_environment.py").write_text(ENVIRONMENT)
    metadata = folder / "waiting_environment-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: waiting-environment\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[hone.environments]\nwaiting = waiting_environment:load_environment\n")


def mean_step(folder: Path, index: int, in_flight: bool, num_steps: int) -> float:
    """Run RL once and return the mean time between its optimizer steps."""
    name = f"{'on' if in_flight else 'off'}-{index}"
    command = [
        str(Path(sys.executable).with_name("hone")), "rl", str(RECIPE), f"--run.folder={folder}", f"--run.name={name}",
        "--environments.0.name=waiting", "--environments.0.arguments={}", f"--rl.num_steps={num_steps}", "--rl.batch_size=128", "--rl.max_staleness=8", "--rl.max_concurrent=256",
        f"--rl.in_flight_updates={str(in_flight).lower()}", "--rl.filter_without_signal=false", "--rl.optimizer.warmup_steps=0",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(folder)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (folder / name / "metrics.jsonl").open())
    times = [line["time"] for line in lines if "train/loss" in line]
    return (times[-1] - times[WARMUP_STEPS]) / (len(times) - 1 - WARMUP_STEPS)


if __name__ == "__main__":
    main()
