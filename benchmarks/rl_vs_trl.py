"""Faster than the peer that runs on a CPU: the same RL job by TRL's GRPOTrainer and by hone, on the same two cores.

Both sides start from one SFT checkpoint (about 45 % sampled exact) of a tiny GLM-4.5-style mixture of experts, with the
same tokenizer, prompts, reward and sampling (temperature 1), and learn to reverse 4 to 6 letters of a 12-letter alphabet.
Seeds are interleaved. TRL's clock leaves out its evaluations; ours does not: they run while it trains. A sample is a
rollout that was generated and scored; for hone those of groups without signal are counted but not trained.

What was tried for each side (tuned on seed 0): see TRIES.
"""

# extra: bench-trl

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

from hone.config.load import load_recipe

HERE = Path(__file__).parent
RECIPE = HERE / "rl_vs_trl.toml"
HONE = str(Path(sys.executable).with_name("hone"))
TARGET = 0.9
TRL_DEADLINE_SECONDS = 220.0

TRIES = {
    "trl": ["lr 3e-5", "lr 1e-4 (chosen)", "lr 2e-4", "lr 3e-4", "lr 1e-3"],
    "hone": [
        "adamw: lr 3e-4, batch 256; the same with warm-up 15; lr 2e-4, warm-up 10, constant; lr 2e-4, batch 128, warm-up 15",
        "adamw, lr 2e-4, staleness 4; lr 3e-4, warm-up 30; group-normalised advantages; PPO clip; betas (0.9, 0.95)",
        "muon, batch 256: lr 3e-4, 4e-4, 6e-4, 8e-4; batch 512, lr 8e-4; batch 128, lr 6e-4",
        "muon, lr 4e-4, batch 128: staleness 2 and 3; 150 and 200 steps; PPO clip; groups of 16; group-normalised",
        "muon, batch 256, lr 5e-4 down to 0.3 of it (chosen); batch 192, lr 4e-4 down to 0.3 of it",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trl-lr", type=float, default=1e-4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        start = fine_tune(Path(scratch))
        ours, theirs = [], []
        for seed in range(arguments.seeds):
            theirs.append(run_trl(start / "sft" / "export", seed, arguments.trl_lr))
            ours.append(run_hone(Path(scratch), start, seed))
            show_seed(seed, ours[-1], theirs[-1])
    report(ours, theirs)


def fine_tune(scratch: Path) -> Path:
    """The run's folder with the checkpoint that both sides start from."""
    subprocess.run([HONE, "sft", str(RECIPE), f"--run.folder={scratch}", "--run.name=start"], check=True)
    return scratch / "start"


def run_trl(model: Path, seed: int, lr: float) -> dict[str, object]:
    environment = load_recipe(RECIPE).environments[0].arguments
    command = [
        sys.executable, str(HERE / "trl_side.py"), "--model", str(model), "--environment", json.dumps(environment),
        "--seed", str(seed), "--lr", str(lr), "--max-tokens", "12", "--target", str(TARGET),
        "--deadline-seconds", str(TRL_DEADLINE_SECONDS),
    ]  # fmt: skip
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def run_hone(scratch: Path, start: Path, seed: int) -> dict[str, object]:
    name = f"hone-{seed}"
    folder = scratch / name
    folder.mkdir()
    for part in ("model", "sft"):
        shutil.copytree(start / part, folder / part)
    command = [HONE, "rl", str(RECIPE), f"--run.folder={scratch}", f"--run.name={name}", f"--run.seed={seed}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return measured(folder / "metrics.jsonl")


def measured(metrics: Path) -> dict[str, object]:
    """The curve of a run: seconds since its first rollouts were asked for, samples so far, held-out exact."""
    lines = [json.loads(line) for line in metrics.open()]
    steps = {line["step"]: line for line in lines if "train/loss" in line}
    first = steps[min(steps)]
    began = first["time"] - first["train/step_seconds"] - first["train/wait_seconds"]
    finished = {line["step"]: line["rollout/finished_count"] for line in lines if "rollout/finished_count" in line}
    curve = [
        (
            round(steps[line["step"]]["time"] - began, 2),
            int(sum(count for step, count in finished.items() if step <= line["step"])),
            line["eval/reverse_text/metric_exact_mean"],
        )
        for line in lines
        if "eval/reverse_text/metric_exact_mean" in line and line["step"] in steps
    ]
    last = steps[max(steps)]
    return {
        "curve": curve,
        "seconds_to_target": next((seconds for seconds, _, exact in curve if exact >= TARGET), None),
        "samples_per_second": sum(finished.values()) / (last["time"] - began),
        "samples": int(sum(finished.values())),
    }


def show_seed(seed: int, ours: dict[str, object], theirs: dict[str, object]) -> None:
    rows = [
        (name, side["seconds_to_target"] or "not reached", side["samples_per_second"], side["curve"][-1][2])
        for name, side in (("hone", ours), ("TRL", theirs))
    ]
    harness.show_table(f"seed {seed}", ["side", f"seconds to {TARGET:.0%}", "samples/s", "last exact"], rows)


def report(ours: list[dict[str, object]], theirs: list[dict[str, object]]) -> None:
    """A side that did not reach the target counts with the time after which it was stopped."""
    rates = [harness.summary([side["samples_per_second"] for side in sides]) for sides in (ours, theirs)]
    times = [
        harness.summary([side["seconds_to_target"] or side["curve"][-1][0] for side in sides])
        for sides in (ours, theirs)
    ]
    rows = [
        ("samples per second", rates[0]["median"], rates[1]["median"], rates[0]["median"] / rates[1]["median"]),
        (f"seconds to {TARGET:.0%}", times[0]["median"], times[1]["median"], times[0]["median"] / times[1]["median"]),
    ]
    harness.show_table("medians", ["", "hone", "TRL", "ratio"], rows)
    harness.finish(
        "rl_vs_trl",
        {
            "claim": "RL on two cores: samples per second >= 2.5 x TRL's, wall-clock to 90 % <= 0.25 x",
            "ratio": rates[0]["median"] / rates[1]["median"],
            "time_ratio": times[0]["median"] / times[1]["median"],
            "hone_samples_per_second": rates[0],
            "trl_samples_per_second": rates[1],
            "hone_seconds_to_target": times[0],
            "trl_seconds_to_target": times[1],
            "hone_reached": [side["seconds_to_target"] is not None for side in ours],
            "trl_reached": [side["seconds_to_target"] is not None for side in theirs],
            "tries": TRIES,
            "curves": {"hone": [side["curve"] for side in ours], "trl": [side["curve"] for side in theirs]},
        },
        "torch",
        "transformers",
        "trl",
    )


if __name__ == "__main__":
    main()
