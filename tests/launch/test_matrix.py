"""An evaluation file carried out: models that are served from here, and one behind an address."""

import asyncio
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from hone.config.load import load_evaluated, recipe_from, save_recipe
from hone.evals.evaluate import Pending
from hone.evals.storage import read_settings, read_traces
from hone.launch.board import Board, Place
from hone.launch.fingerprint import fingerprint
from hone.launch.matrix import evaluate_file
from hone.model.checkpoint import save_model
from hone.model.families import ModelConfig
from hone.model.transformer import Transformer
from hone.text.training import train_tokenizer
from hone.transport.addresses import allocate, save_addresses
from hone.transport.folders import RunFolder
from inference.served import Served, running

FILE = """
[run]
folder = "{folder}"
name = "served"
[evaluation]
num_tasks = 3
num_attempts = 2
sampling = {{ max_tokens = 4 }}
[[environments]]
name = "reverse_text"
limits = {{ max_tokens = 3 }}
[[models]]
name = "folder"
path = "{model}"
[[models]]
name = "recipe"
recipe = "{recipe}"
[[models]]
name = "address"
model = "tiny"
address = "{address}"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    run = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    tokenizer = train_tokenizer(["write this backwards: stone letters words " * 3], 400, chat_template="chatml")
    described = {"model_type": "qwen3", "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_hidden_layers": 1}
    described |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
    described |= {"max_position_embeddings": 1024, "eos_token_id": tokenizer.eos_token_ids[0]}
    config = ModelConfig.from_hugging_face(described)
    save_model(Transformer(config).initialize(0).requires_grad_(False), config, run.model)
    tokenizer.save(run.model)
    recipe = recipe_from(
        {
            "run": {"name": "tiny", "folder": str(run.path.parent)},
            "model": {"path": str(run.model)},
            "engine": {"num_blocks": 256, "threads": 1},
        },
        "test",
    )
    save_recipe(recipe, run.config)
    save_addresses(allocate(recipe), run.addresses)
    with running(run) as served:
        yield served


def quiet() -> Board:
    return Board(Console(file=io.StringIO()))


@pytest.mark.slow
async def test_models_from_a_folder_a_recipe_and_an_address_are_evaluated(server: Served, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    run = server.folder
    path.write_text(FILE.format(folder=tmp_path, model=run.model, recipe=run.config, address=server.api))
    tree = load_evaluated(path)
    results = await evaluate_file(tree, quiet(), Pending.MISSING)
    assert set(results) == {Place(name, "reverse_text") for name in ("folder", "recipe", "address")}
    assert {place: (result.num_rollouts, result.failures) for place, result in results.items()} == {
        place: (6, {}) for place in results
    }

    def settings(name: str) -> object:
        return read_settings(tmp_path / "served" / name / "reverse_text")

    assert settings("folder").source == settings("recipe").source == fingerprint(run.model)
    assert settings("address").source == f"tiny at {server.api}"
    assert settings("folder").budgets == {"max_tokens": 3}
    # Served from here, a turn carries its tokens; seeds make equal weights say the same.
    traces = {
        name: {
            (t.task.key, t.attempt): t
            for t in read_traces(tmp_path / "served" / name / "reverse_text" / "traces.jsonl")
        }
        for name in ("folder", "recipe")
    }
    for key, trace in traces["folder"].items():
        assert trace.turns[0].token_ids
        assert trace.turns[0].token_ids == traces["recipe"][key].turns[0].token_ids


@pytest.mark.slow
async def test_an_environment_with_a_python_of_its_own_is_evaluated_there(server: Served, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    text = FILE.format(folder=tmp_path, model="", recipe="", address=server.api)
    models = text[text.index('[[models]]\nname = "address"') :]
    listed = f'name = "reverse_text"\npython = "{sys.executable}"'
    path.write_text(text.partition("[[models]]")[0].replace('name = "reverse_text"', listed) + models)
    results = await evaluate_file(load_evaluated(path), quiet(), Pending.MISSING)
    [(place, result)] = results.items()
    assert (place, result.num_rollouts, result.failures) == (Place("address", "reverse_text"), 6, {})
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    path.write_text(path.read_text().replace(sys.executable, str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="there is no Python at"):
        await evaluate_file(load_evaluated(path), quiet(), Pending.MISSING)


async def test_what_is_wrong_is_told_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    text = FILE.format(
        folder=tmp_path, model=tmp_path / "absent", recipe=tmp_path / "absent.toml", address="http://a/v1"
    )
    path.write_text(text)
    with pytest.raises(ValueError, match="is no model in the Hugging Face layout"):
        await evaluate_file(load_evaluated(path), quiet(), Pending.MISSING)
    keyed = (
        text.partition("[[models]]")[0]
        + '[[models]]\nname = "m"\naddress = "http://a/v1"\napi_key_variable = "HONE_NO_SUCH"\n'
    )
    path.write_text(keyed)
    with pytest.raises(ValueError, match="the environment variable HONE_NO_SUCH is not set"):
        await evaluate_file(load_evaluated(path), quiet(), Pending.MISSING)
    assert not (tmp_path / "served").exists()
