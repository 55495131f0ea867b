"""Crash and go on: kill every process of an RL run at random moments, then audit the ledger.

A run is started (after SFT), and at random moments one of its processes gets SIGKILL: each kind in turn, `--kills`
times each; also the launcher itself, which is then started again by the same command. At the end the ledger must say
that no finished rollout was lost and none was trained twice, and the run must have reached the reward of the same run
left alone.
"""

import argparse
import json
import os
import random
import signal
import statistics
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
LAST_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills of each process")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(derive_seed(arguments.seed, "kills"))
    victims = [kind for _ in range(arguments.kills) for kind in draw.sample(KINDS, len(KINDS))]
    with tempfile.TemporaryDirectory() as scratch:
        kills = torment(Path(scratch) / "crash", arguments.steps, victims, draw)
        torment(Path(scratch) / "alone", arguments.steps, [], draw)
        result = audit(Path(scratch) / "crash")
        rewards, undisturbed = (trained_rewards(Path(scratch) / name) for name in ("crash", "alone"))
    harness.show_table("after the kills", ["process", "kills"], [(kind, kills.count(kind)) for kind in KINDS])
    final, expected = (statistics.fmean(curve[-LAST_STEPS:]) for curve in (rewards, undisturbed))
    print(f"first reward {rewards[0]:.3f}, final {final:.3f}, left alone {expected:.3f}; {result}")
    harness.finish(
        "crash",
        {
            "claim": "SIGKILL of every process at random moments: nothing lost, nothing trained twice, the run goes on",
            "ratio": final / expected,
            "kills": {kind: kills.count(kind) for kind in KINDS},
            "lost": result.lost,
            "trained_twice": result.trained_twice,
            "regenerated": result.regenerated,
            "too_stale": result.too_stale,
            "reward_first": rewards[0],
            "reward_final": final,
            "reward_left_alone": expected,
        },
        "torch",
    )


def torment(folder: Path, num_steps: int, victims: list[str], draw: random.Random) -> list[str]:
    """Run SFT, then RL to its end under fire, the last victim first; returns who was killed."""
    command = [
        HONE, "rl", str(RECIPE), f"--run.folder={folder.parent}", f"--run.name={folder.name}",
        f"--rl.num_steps={num_steps}", "--run.max_restarts=1000", "--trainer.checkpoint_every=5",
        "--rl.optimizer.warmup_steps=5",
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
        if victims and kill(victims[-1], launcher, folder):
            killed.append(victims.pop())
    return killed


def trained_rewards(folder: Path) -> list[float]:
    """The mean reward of each step's batch."""
    lines = map(json.loads, (folder / "metrics.jsonl").open())
    return [line["train/reward_mean"] for line in lines if "train/reward_mean" in line]


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
