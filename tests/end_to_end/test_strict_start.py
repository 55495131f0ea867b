"""A strict run where no C compiler is: every process says so in a line and ends for good."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hone.config.load import ConfigError, recipe_from, save_recipe
from hone.config.recipe import EngineSection, Recipe
from hone.inference.server.serve import Endpoint, Serving, load
from hone.launch.preflight import preflight
from hone.model.native import library
from hone.trainer.start import run_process
from hone.transport.folders import RunFolder

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.functions.cache_clear()
    yield
    library.functions.cache_clear()


def recipe(folder: Path, numerics: str) -> Recipe:
    tree = {
        "run": {"folder": str(folder), "name": "x"},
        "model": {"config": {"model_type": "qwen3"} | SIZES},
        "tokenizer": {"vocab_size": 64, "chat_template": "chatml"},
        "environments": [{"name": "reverse_text"}],
        "trainer": {"numerics": numerics},
        "rl": {},
    }
    return recipe_from(tree, "test")


def test_the_checks_before_a_run_refuse_it_and_tell_the_ways_out(tmp_path: Path, no_compiler: None) -> None:
    with pytest.raises(ConfigError, match=r"no C compiler found.*install gcc.*or set trainer.numerics = 'fast'"):
        preflight(recipe(tmp_path, "strict"))
    preflight(recipe(tmp_path, "fast"))


def test_the_inference_server_refuses_it(tmp_path: Path, no_compiler: None) -> None:
    with pytest.raises(ValueError, match=r"strict numerics need.*install gcc"):
        load(Serving(tmp_path, "x", EngineSection(), Endpoint("127.0.0.1", 0), strict=True))


def test_the_trainer_refuses_it(tmp_path: Path, no_compiler: None, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    save_recipe(recipe(tmp_path, "strict"), folder.config)
    assert run_process(lambda run: None, [str(tmp_path)]) == 2
    assert "install gcc" in capsys.readouterr().err
