"""Crash and go on: kill every process of an RL run at random moments, then audit the ledger.

A run is started (after SFT), and at random moments one of its processes gets SIGKILL: each kind in turn, `--kills`
times each; also the launcher itself, which is then started again by the same command. At the end the ledger must say
that no finished rollout was lost and none was trained twice, and the run must have reached its reward.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

from hone.orchestrator.audit import audit
from hone.schema.seeds import derive_seed

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/tiny/reverse.toml"
HONE = str(Path(sys.executable).with_name("hone"))
KINDS = ("inference", "orchestrator", "worker-0", "trainer", "launcher")
DEADLINE_SECONDS = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills of each process")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        kills = torment(Path(scratch), arguments)
        folder = Path(scratch) / "crash"
        result = audit(folder)
        rewards = [
            line["train/reward_mean"]
            for line in map(json.loads, (folder / "metrics.jsonl").open())
            if "train/reward_mean" in line
        ]
    harness.show_table("after the kills", ["process", "kills"], [(kind, kills.count(kind)) for kind in KINDS])
    final = sum(rewards[-5:]) / len(rewards[-5:])
    print(f"first reward {rewards[0]:.3f}, final {final:.3f}; {result}")
    harness.finish(
        "crash",
        {
            "claim": "SIGKILL of every process at random moments: nothing lost, nothing trained twice, the run goes on",
            "ratio": final / rewards[0],
            "kills": {kind: kills.count(kind) for kind in KINDS},
            "lost": result.lost,
            "trained_twice": result.trained_twice,
            "regenerated": result.regenerated,
            "too_stale": result.too_stale,
            "reward_first": rewards[0],
            "reward_final": final,
        },
        "torch",
    )


def torment(scratch: Path, arguments: argparse.Namespace) -> list[str]:
    """Run RL to its end under fire; returns who was killed."""
    draw = random.Random(derive_seed(arguments.seed, "kills"))
    victims = [kind for _ in range(arguments.kills) for kind in draw.sample(KINDS, len(KINDS))]
    command = [
        HONE, "rl", str(RECIPE), f"--run.folder={scratch}", "--run.name=crash", f"--rl.num_steps={arguments.steps}",
        "--run.max_restarts=1000", "--trainer.checkpoint_every=5", "--rl.optimizer.warmup_steps=5",
    ]  # fmt: skip
    subprocess.run([HONE, "sft", *command[2:]], check=True)
    launcher = subprocess.Popen(command)
    killed: list[str] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    while launcher.poll() != 0:
        assert time.monotonic() < deadline, f"the run did not end within {DEADLINE_SECONDS:.0f} s"
        if launcher.poll() is not None:
            launcher = subprocess.Popen(command)
        time.sleep(draw.uniform(0.5, 6.0))  # a random moment
        if victims and kill(victims[-1], launcher, scratch / "crash"):
            killed.append(victims.pop())
    return killed


def kill(kind: str, launcher: subprocess.Popen, folder: Path) -> bool:
    """SIGKILL one process; False when it is not there."""
    if kind == "launcher":
        if launcher.poll() is not None:
            return False
        launcher.kill()
        launcher.wait()
        return True
    try:
        pid = json.loads((folder / "processes.json").read_text()).get(kind)
        os.kill(pid, signal.SIGKILL)
    except (OSError, TypeError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
