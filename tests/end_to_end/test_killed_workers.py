"""An env worker that is killed among rollouts of several turns with tools: nothing is lost, trained twice or too stale."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from hone.orchestrator.audit import audit
from hone.transport.folders import RunFolder
from hone.transport.traces import read_traces

RECIPE = Path(__file__).parents[2] / "recipes/tiny/calculator.toml"
HONE = Path(sys.executable).with_name("hone")
NUM_KILLS = 4
DEADLINE_SECONDS = 600.0


@pytest.mark.slow
def test_rollouts_with_tools_survive_their_worker(tmp_path: Path) -> None:
    changes = [
        f"--run.folder={tmp_path}", "--run.name=run", "--run.max_restarts=100", "--sft.num_conversations=1024",
        "--rl.num_steps=25", "--rl.batch_size=64", "--rl.optimizer.warmup_steps=2",
    ]  # fmt: skip
    subprocess.run([HONE, "sft", RECIPE, *changes], check=True)
    run = RunFolder(tmp_path / "run")
    launcher = subprocess.Popen([HONE, "rl", RECIPE, *changes])
    try:
        killed = kill_workers(run, launcher)
        assert launcher.wait(DEADLINE_SECONDS) == 0
    finally:
        launcher.kill()
    assert killed == NUM_KILLS
    result = audit(run.path)
    assert result.is_clean, result
    assert result.num_trained == 25 * 64
    tools = Counter(
        any(message.role == "tool" for message in found.trace.messages)
        for _, found in read_traces(run.traces)
        if not found.trace.failure
    )
    assert tools[True] > tools[False]


def kill_workers(run: RunFolder, launcher: subprocess.Popen[bytes]) -> int:
    """SIGKILL the worker at random moments, each time while training goes on; returns how often."""
    draw, killed, deadline = random.Random(0), 0, time.monotonic() + DEADLINE_SECONDS
    while killed < NUM_KILLS and launcher.poll() is None:
        assert time.monotonic() < deadline, f"training did not get far enough within {DEADLINE_SECONDS:.0f} s"
        time.sleep(draw.uniform(0.3, 2.0))
        if num_trained_steps(run) <= 3 * killed:  # it has to have done something since the last one
            continue
        pid = json.loads((run.path / "processes.json").read_text()).get("worker-0")
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def num_trained_steps(run: RunFolder) -> int:
    metrics = run.path / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return sum("train/reward_mean" in line for line in lines)
