"""The whole job on each kind of device: RL lifts what SFT left, with the three processes, real sockets and real weights."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes/tiny/reverse.toml"
HONE = Path(sys.executable).with_name("hone")


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_rl_lifts_what_sft_left(device: str, tmp_path: Path) -> None:
    # 250 steps on a schedule that ends with them: about half of the recipe's RL.
    command = [HONE, "run", RECIPE, f"--run.folder={tmp_path}", f"--model.device={device}", "--rl.num_steps=250"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=900).stdout
    stages = dict(re.findall(r"\b(base|sft|rl) ([\d.]+)", output.strip().splitlines()[-1]))
    base, after_sft, after_rl = (float(stages[stage]) for stage in ("base", "sft", "rl"))
    assert base < 0.05
    assert 0.2 < after_sft < 0.65
    assert after_rl > after_sft + 0.15
