"""A real inference server in a process of its own, with a tiny model that has learned two answers by heart."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hone.config.load import recipe_from, save_recipe
from hone.model.checkpoint import save_model
from hone.model.families import ModelConfig
from hone.model.layers.attention import PackedAttention
from hone.model.transformer import Transformer
from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone.text.training import train_tokenizer
from hone.transport.addresses import Addresses, allocate, save_addresses
from hone.transport.folders import RunFolder

ADD = ToolSpec("add", "Adds two numbers.", {"type": "object", "properties": {"a": {"type": "integer"}}})
GREETING = [
    Message(role="user", content="hi"),
    Message(role="assistant", reasoning="hm", content="Hello there, friend!"),
]
CALLING = [
    Message(role="user", content="add"),
    Message(role="assistant", content="Sure.", tool_calls=(ToolCall("call_0", "add", '{"a": 1}'),)),
]


@dataclass(frozen=True, slots=True)
class Fetched:
    status: int
    text: str

    def json(self) -> dict:
        return json.loads(self.text)


def fetch(url: str, body: object = None, headers: dict[str, str] | None = None, timeout: float = 10.0) -> Fetched:
    """GET, or POST when there is a body: bytes as they are, anything else as JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return Fetched(response.status, response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Fetched(error.code, error.read().decode())


@dataclass(frozen=True, slots=True)
class Served:
    folder: RunFolder
    addresses: Addresses
    process: subprocess.Popen[bytes]

    @property
    def api(self) -> str:
        return self.addresses.api + "/v1"

    def health(self) -> dict:
        return fetch(self.addresses.admin + "/health").json()


def prepare(folder: Path, **server: object) -> RunFolder:
    """A run's folder with a trained model, a recipe and addresses."""
    run = RunFolder(folder)
    tokenizer = train_tokenizer(
        ["hi add Hello there, friend! Sure. Adds two numbers. " * 3], 420, chat_template="qwen3"
    )
    config = ModelConfig.from_hugging_face(
        {
            "model_type": "qwen3",
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
            "max_position_embeddings": 1024,
            "initializer_range": 0.05,
            "eos_token_id": tokenizer.eos_token_ids[0],
        }
    )
    save_model(learned_by_heart(config, tokenizer), config, run.model)
    tokenizer.save(run.model)
    recipe = recipe_from(
        {
            "run": {"name": "tiny", "folder": str(folder)},
            "model": {"path": str(run.model)},
            "engine": {"num_blocks": 512, "max_running": 64, "threads": 1},
            "server": server,
        },
        "test",
    )
    save_recipe(recipe, run.config)
    save_addresses(allocate(recipe), run.addresses)
    return run


def learned_by_heart(config: ModelConfig, tokenizer: Tokenizer) -> Transformer:
    renderer = Renderer(tokenizer)
    rows = [renderer.render_for_training(GREETING), renderer.render_for_training(CALLING, [ADD])]
    tokens = torch.tensor([i for row in rows for i in row.token_ids])
    mask = torch.tensor([i for row in rows for i in row.loss_mask], dtype=torch.bool)
    lengths = [len(row.token_ids) for row in rows]
    positions = torch.cat([torch.arange(length) for length in lengths])
    attention = PackedAttention(torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32), max(lengths))
    trained = mask.nonzero()[:, 0]
    model = Transformer(config).initialize(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        logits = model.unembed(model(tokens, positions, attention)[trained - 1])
        loss = torch.nn.functional.cross_entropy(logits, tokens[trained])
        if loss < 0.003:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05, "the tiny model did not learn its two answers"
    return model.requires_grad_(False)


@contextlib.contextmanager
def running(run: RunFolder, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    from hone.transport.addresses import load_addresses

    process = start(run, *arguments, environment=environment)
    served = Served(run, load_addresses(run.addresses), process)
    try:
        wait_until_ready(served)
        yield served
    finally:
        process.terminate()
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


def start(run: RunFolder, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "hone.inference.server", str(run.path), *arguments],
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )


def wait_until_ready(served: Served) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert served.process.poll() is None, served.process.stderr.read().decode()
        with contextlib.suppress(OSError):
            if served.health()["ready"]:
                return
        time.sleep(0.05)
    raise TimeoutError("the server was not ready within 60 s")
