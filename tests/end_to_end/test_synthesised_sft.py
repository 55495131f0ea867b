"""From a teacher that calls tools, over HTTP, to a tiny model that calls them: `hone synth`, `hone sft`, `hone env debug`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hone.envs.scaffold import scaffold
from hone.model.checkpoint import load_model
from hone.model.layers.attention import PackedAttention
from hone.observability.metrics import read_metrics
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone.trainer.data import read_conversations
from hone.transport.folders import RunFolder
from teachers import shopper, teacher

SYNTHESIS = """
[synthesis]
name = "basket"
folder = "{folder}/synth"
[teacher]
target = "{address}"
model = "shopper"
[[environments]]
name = "basket"
[rollouts]
num_tasks = 12
num_attempts = 2
"""

RECIPE = """
[run]
name = "learner"
folder = "{folder}/runs"
[model.config]
model_type = "qwen3"
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
intermediate_size = 128
max_position_embeddings = 1024
[tokenizer]
vocab_size = 600
chat_template = "qwen3"
[[environments]]
name = "basket"
[sft]
data = "{data}"
epochs = 30
batch_tokens = 4096
[sft.optimizer]
lr = 5e-3
"""


def install(folder: Path) -> None:
    """The scaffold of kind tool as an environment `basket`, as pip would leave it."""
    scaffold("basket", "tool", folder / "package")
    (folder / "package" / "hone_basket").rename(folder / "hone_basket")
    described = folder / "hone_basket-0.1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: hone-basket\nVersion: 0.1.0\n")
    (described / "entry_points.txt").write_text("[hone.environments]\nbasket = hone_basket:load_environment\n")


def hone(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-m", "hone.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.mark.slow
def test_a_tiny_model_learns_the_tool_calls_of_a_teacher(tmp_path: Path) -> None:
    install(tmp_path)
    with teacher(shopper) as address:
        (tmp_path / "synth.toml").write_text(SYNTHESIS.format(folder=tmp_path, address=address))
        written = hone(tmp_path, "synth", tmp_path / "synth.toml").stdout.splitlines()
    (data,) = (Path(line) for line in written if line.endswith(".parquet"))
    conversations = list(read_conversations(data))
    assert len(conversations) == 12
    for conversation in conversations:
        assert [tool.name for tool in conversation.tools] == ["price"]
        assert conversation.messages[1].tool_calls
        assert [message.role for message in conversation.messages[2:-1]] == ["tool"] * len(
            conversation.messages[1].tool_calls
        )

    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path, data=data))
    hone(tmp_path, "sft", tmp_path / "recipe.toml")
    run = RunFolder(tmp_path / "runs" / "learner")
    losses = [float(line["sft/loss"]) for line in read_metrics(run.metrics) if "sft/loss" in line]
    assert losses[-1] < 0.2 * losses[0]
    assert first_calls_spelled(run) >= 0.9
    shown = hone(tmp_path, "env", "debug", "basket", tmp_path / "recipe.toml", "--temperature", 0, "--max-tokens", 200)
    assert "logprobs" in shown.stdout
    assert "→ price(" in shown.stdout
    assert json.loads((run.sft_export / "config.json").read_text())["model_type"] == "qwen3"


def first_calls_spelled(run: RunFolder) -> float:
    """The share of the tokens of the first assistant turn, the tool calls, that the trained model takes for likeliest."""
    model, renderer = load_model(run.sft_export), Renderer(Tokenizer.load(run.model))
    data = next((run.path.parents[1] / "synth" / "basket" / "data").glob("*.parquet"))
    num_right = num_tokens = 0
    for conversation in read_conversations(data, 8):
        (rendered,) = renderer.render_branches(conversation.messages[:2], conversation.tools)
        ids, mask = torch.tensor(rendered.token_ids), torch.tensor(rendered.loss_mask, dtype=torch.bool)
        attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        likeliest = model.unembed(model(ids, torch.arange(len(ids)), attend)).argmax(-1)
        right = (likeliest[:-1] == ids[1:])[mask[1:]]
        num_right, num_tokens = num_right + int(right.sum()), num_tokens + len(right)
    return num_right / num_tokens
