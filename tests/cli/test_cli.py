"""The commands as a person meets them: what cannot be done is one readable message and exit code 2."""

import json
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hone.cli.errors import complaint
from hone.cli.main import main
from hone.cli.summary import last_line
from hone.evals.results import EvalResult
from hone.evals.statistics import Estimate
from hone.inference.client import EngineLost
from hone.text.training import train_tokenizer

RECIPE = """
[run]
folder = "{folder}"
[model.config]
model_type = "qwen3"
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
intermediate_size = 64
max_position_embeddings = 128
[tokenizer]
vocab_size = 300
chat_template = "chatml"
[[environments]]
name = "reverse_text"
[rl]
batch_size = 32
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE.format(folder=tmp_path / "runs"))
    return path


def hone(*arguments: object, largest_file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit_files() -> None:
        assert largest_file_bytes is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))

    return subprocess.run(
        [sys.executable, "-m", "hone.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=None if largest_file_bytes is None else limit_files,
    )


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one message of a command that ends with 2, run in this process."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["hone", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        message = capsys.readouterr().err
        assert ended.value.code == 2
        assert message.startswith("error: ")
        return message

    return run


def test_help_lists_the_commands() -> None:
    ended = hone("--help")
    assert ended.returncode == 0
    assert all(command in ended.stdout for command in ("run", "sft", "rl", "eval", "serve", "chat", "config", "report"))


def test_a_recipe_that_can_be_run_is_fine(recipe: Path) -> None:
    ended = hone("config", "check", recipe)
    assert ended.returncode == 0, ended.stderr
    assert f"{recipe}: fine (rl; run folder" in ended.stdout


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ("--rl.batchsize=64", "unknown field rl.batchsize"),
        ("--rl.batch_size=-8", "rl.batch_size = -8: input should be greater than 0"),
        ("--rl.group_size=6", "rl.group_size 6 does not divide rl.batch_size 32"),
        ("--model.config.num_key_value_heads=3", "num_key_value_heads"),
        ("--model.config.model_type=unknown", "unknown"),
        ("--environments.0.name=nowhere", "nowhere"),
        ("--server.host=0.0.0.0", "the admin routes would be open to the network"),
        ("--server.admin_token_variable=HONE_NO_SUCH", "HONE_NO_SUCH, which is not set"),
        ("--run.folder=/proc/nothing", "run.folder"),
    ],
)
def test_what_cannot_be_run_is_told(refused: Callable[..., str], recipe: Path, change: str, phrase: str) -> None:
    assert phrase in refused("config", "check", recipe, change)


def test_a_missing_recipe_is_told(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no recipe at" in refused("config", "check", tmp_path / "absent.toml")


def test_a_taken_port_is_told(refused: Callable[..., str], recipe: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"cannot bind 127.0.0.1:{port}" in refused("config", "check", recipe, f"--server.port={port}")
        assert "run.metrics_port" in refused("config", "check", recipe, f"--run.metrics_port={port - 1}")


def with_model(tmp_path: Path, model: str) -> Path:
    path = tmp_path / "trained.toml"
    path.write_text(
        f'[run]\nfolder = "{tmp_path / "runs"}"\n[model]\npath = "{model}"\n[[environments]]\nname = "reverse_text"\n'
    )
    return path


def test_a_model_path_that_is_neither_a_folder_nor_a_hub_name_is_told(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    assert "there is no such folder" in refused("config", "check", with_model(tmp_path, "a/b/c"))


def test_a_broken_tokenizer_and_a_missing_template_are_told(refused: Callable[..., str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    described = {"model_type": "qwen3", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}
    described |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
    described |= {"max_position_embeddings": 128}
    (model / "config.json").write_text(json.dumps(described))
    recipe = with_model(tmp_path, str(model))
    (model / "tokenizer.json").write_text("{ no json")
    assert "tokenizer.json" in refused("config", "check", recipe)
    (model / "tokenizer.json").unlink()
    tokenizer = train_tokenizer(["some text"], 300, chat_template="chatml")
    tokenizer.chat_template = None
    tokenizer.save(model)
    assert "has no chat template" in refused("config", "check", recipe)


def test_a_folder_to_serve_takes_no_overrides(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "unknown argument --prot=9000" in refused("serve", tmp_path, "--prot", "9000")


def test_an_address_to_chat_with_takes_no_overrides(refused: Callable[..., str]) -> None:
    message = refused("chat", "http://127.0.0.1:9", "--engine.max_context=4")
    assert "unknown argument --engine.max_context=4" in message


@pytest.mark.slow
def test_a_recipe_is_chatted_with_as_its_engine_section_says(recipe: Path) -> None:
    changes = ("--sft.num_conversations=32", "--sft.epochs=2")
    assert hone("sft", recipe, *changes).returncode == 0
    ended = hone("chat", recipe, *changes, "--prompt", "hello", "--engine.max_context=4")
    assert "a context of 4" in ended.stderr
    ended = hone("chat", recipe, *changes, "--prompt", "hello", "--max-tokens", "4")
    assert ended.returncode == 0, ended.stderr


def test_a_broken_model_to_serve_is_told(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert str(tmp_path) in refused("serve", tmp_path, "--port", "0")


def test_a_disk_that_takes_no_more_is_told(recipe: Path) -> None:
    # The recipe's own config.toml is larger than a file may get here.
    ended = hone("rl", recipe, largest_file_bytes=256)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert "File too large" in ended.stderr
    assert "free some space" in ended.stderr


def test_a_deadline_and_a_lost_engine_are_told_but_faults_of_ours_are_not() -> None:
    assert complaint(TimeoutError("the server was not ready")) == "the server was not ready"
    assert complaint(EngineLost("no answer")) == "no answer"
    assert complaint(ExceptionGroup("tasks", [ValueError("wrong"), ValueError("too")])) == "wrong"
    assert complaint(TimeoutError()) is None
    assert complaint(KeyError("fault")) is None
    assert complaint(ExceptionGroup("tasks", [ValueError("wrong"), KeyError("fault")])) is None


def result(reward: float, exact: float | None = None) -> EvalResult:
    metrics = {} if exact is None else {"exact": estimate(exact)}
    return EvalResult("e", "1", "m", 1, 10, estimate(reward), {}, metrics, {}, None, None, {})


def estimate(mean: float) -> Estimate:
    return Estimate(mean, mean, mean, 10)


def line(*results: EvalResult, labels: Sequence[str] = ("base", "sft", "rl")) -> str:
    return last_line(dict(zip(labels, results, strict=False)))


def test_the_last_line_names_exact_match_where_every_stage_measured_it() -> None:
    assert line(result(0.1, 0.0), result(0.6, 0.45), result(1, 0.94)) == "base 0.00 · sft 0.45 · rl 0.94 exact match"


def test_the_last_line_falls_back_to_the_reward() -> None:
    assert line(result(0.1, 0.0), result(0.6)) == "base 0.10 · sft 0.60 reward"
