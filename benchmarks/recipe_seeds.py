"""The model learns by RL, not only by SFT: a recipe's whole job (`hone run`) for several seeds.

Every seed must end at or above the bar on held-out tasks, sampled at temperature 1, with SFT well below it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

ROOT = Path(__file__).parents[1]
HONE = str(Path(sys.executable).with_name("hone"))
STAGES = ("base", "sft", "rl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/tiny/reverse.toml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bar", type=float, default=0.9)
    arguments, overrides = parser.parse_known_args()
    runs = [run(arguments.recipe, seed, overrides) for seed in range(arguments.seeds)]
    rows = [(seed, *(one[stage] for stage in STAGES), one["seconds"]) for seed, one in enumerate(runs)]
    harness.show_table(str(arguments.recipe.name), ["seed", "base", "after SFT", "after RL", "seconds"], rows)
    after_rl = [one["rl"] for one in runs]
    harness.finish(
        f"recipe_seeds_{arguments.recipe.stem}",
        {
            "claim": f"every seed ends at {arguments.bar} or above after RL, and below it after SFT",
            "ratio": min(after_rl) / arguments.bar,
            "num_seeds_below_bar": sum(value < arguments.bar for value in after_rl),
            "overrides": overrides,
            "seeds": runs,
        }
        | {stage: harness.summary([one[stage] for one in runs]) for stage in (*STAGES, "seconds")},
        "torch",
    )


def run(recipe: Path, seed: int, overrides: list[str]) -> dict[str, float]:
    """The figures of one run, from the last line that it prints."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [HONE, "run", str(recipe), f"--run.folder={scratch}", f"--run.seed={seed}", *overrides]
        began = time.perf_counter()
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = time.perf_counter() - began
    last = output.strip().splitlines()[-1]
    print(f"seed {seed}: {last} ({seconds:.0f} s)", flush=True)
    return {stage: float(found[1]) for stage in STAGES if (found := re.search(rf"\b{stage} ([\d.]+)", last))} | {
        "seconds": seconds
    }


if __name__ == "__main__":
    main()
