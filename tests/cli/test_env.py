"""`hone env` as a person meets it: what it prints, and how it ends."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hone.cli.main import main
from hone.envs.scaffold import scaffold
from hone.transport.traces import TraceWriter
from teachers import teacher

Hone = Callable[..., str]


@pytest.fixture
def hone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hone:
    """What a command prints on standard output (or, with `err=True`, on standard error), run in this process."""

    def run(*arguments: object, code: int = 0, err: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["hone", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == code, printed.err
        return printed.err if err else printed.out

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


BROKEN = """
from hone.envs import Rubric, SingleTurn, Tasks, Task, assistant, reward, user

@reward
def lenient(answer: str, reference: str) -> float:
    return float(reference in answer)

@reward(weight=0.0)
def raises(answer: str) -> float:
    return 1 / len(answer)

def load_environment():
    def task(index):
        return Task(prompt=(user(f"What is {index} + 10?"),), reference=str(index + 10))
    return SingleTurn(
        name="broken", rubric=Rubric([lenient, raises]), train=Tasks(task, 5),
        gold=lambda task: [assistant(task.reference)],
    )
"""


@pytest.fixture
def broken(here: Path) -> Iterator[Path]:
    made = scaffold("broken", "single", here / "broken")
    (made.folder / "hone_broken" / "__init__.py").write_text(BROKEN)
    yield made.folder
    for name in [name for name in sys.modules if name.startswith("hone_broken")]:
        del sys.modules[name]


def test_help_names_the_commands(hone: Hone) -> None:
    printed = hone("env", "--help")
    assert all(command in printed for command in ("init", "list", "validate", "replay", "debug"))


def test_init_writes_a_package_and_says_what_is_next(hone: Hone, here: Path) -> None:
    printed = hone("env", "init", "cli_made")
    assert "cli_made/hone_cli_made/__init__.py" in printed
    assert "next: pip install -e cli_made && hone env validate cli_made" in printed
    assert "is there already" in hone("env", "init", "cli_made", code=2, err=True)
    assert "there are single, multi" in hone("env", "init", "other", "--kind", "x", code=2, err=True)
    assert hone("env", "init", "other", "--folder", here / "elsewhere").startswith(str(here / "elsewhere"))


def test_validate_proves_a_package_by_its_folder(hone: Hone, here: Path) -> None:
    hone("env", "init", "cli_proven")
    printed = hone("env", "validate", "./cli_proven", "--num-tasks", 2)
    assert "gold answers score full marks" in printed
    assert "a second process gives the same tasks" in printed
    assert "checks passed" in printed


def test_validate_ends_with_1_and_says_what_is_wrong(hone: Hone, broken: Path) -> None:
    printed = hone("env", "validate", broken, "--num-tasks", 2, code=1)
    assert "counts as solved, with reward 1" in printed
    assert "reward raises: ZeroDivisionError" in printed
    assert re.search(r"\d of 20 checks failed", printed)


def test_validate_prints_json_for_programs(hone: Hone, broken: Path) -> None:
    told = json.loads(hone("env", "validate", broken, "--num-tasks", 2, "--json", code=1))
    assert (told["environment"], told["version"], told["has_passed"]) == ("broken", "0.1.0", False)
    failed = {check["name"]: check["problems"] for check in told["checks"] if check["problems"]}
    assert "no full marks: all options listed" in failed
    assert "no full marks: empty" in failed


def test_validate_hands_arguments_on(hone: Hone) -> None:
    wrong = hone("env", "validate", "arithmetic", "--arguments", '{"tries": 0}', code=2, err=True)
    assert "tries 0 leaves no answer" in wrong
    assert "is not JSON" in hone("env", "validate", "arithmetic", "--arguments", "{", code=2, err=True)
    assert "not a JSON object" in hone("env", "validate", "arithmetic", "--arguments", "[]", code=2, err=True)
    assert "not installed" in hone("env", "validate", "nowhere", code=2, err=True)


def test_list_shows_what_is_installed(hone: Hone) -> None:
    printed = hone("env", "list")
    assert "arithmetic" in printed
    assert "multi-turn" in printed
    rows = {row["name"]: row for row in json.loads(hone("env", "list", "--json"))}
    assert rows["reverse_text"]["rewards"] == ["reversal"]
    assert rows["arithmetic"]["train"] is None


def test_debug_plays_the_gold_answer(hone: Hone) -> None:
    printed = hone("env", "debug", "arithmetic", "--gold", "--index", 1, "--held-out")
    assert "held-out task 1" in printed
    assert "What is" in printed
    assert re.search(r"correct\s*│ 1\s*│ 1\s*│ 1", printed)
    assert "first_try" in printed
    assert "stopped: completed · 1 turns" in printed


def test_debug_shows_tool_calls_and_what_they_gave(hone: Hone, here: Path) -> None:
    hone("env", "init", "cli_tools", "--kind", "tool")
    printed = hone("env", "debug", "./cli_tools", "--gold")
    assert "→ price(" in printed
    assert "tool       price: The price of one thing in cents." in printed
    assert "num_tool_calls" in printed


def test_debug_asks_any_endpoint(hone: Hone) -> None:
    with teacher(lambda body: {"content": "hm", "reasoning_content": "let me think"}) as address:
        printed = hone("env", "debug", "arithmetic", "--base-url", address, "--model", "m")
    assert "let me think" in printed
    assert "That is not a number. Try again." in printed
    assert "5 sampled · no token ids" in printed
    assert "2 turns · 10 tokens sampled" in printed


def test_debug_shows_the_traceback_of_a_failure(hone: Hone, broken: Path) -> None:
    with teacher(lambda body: {"content": ""}) as address:
        printed = hone("env", "debug", broken, address, "--model", "m", code=1)
    assert "failed: environment in reward raises" in printed
    assert "return 1 / len(answer)" in printed
    assert "ZeroDivisionError" in printed


def test_debug_says_that_nothing_answers(hone: Hone) -> None:
    told = hone("env", "debug", "arithmetic", "http://127.0.0.1:9", "--model", "m", code=2, err=True)
    assert "nothing answers at http://127.0.0.1:9/v1" in told


def test_debug_shows_a_model_that_refuses(hone: Hone) -> None:
    with teacher(lambda body: {"status": 400}) as address:
        printed = hone("env", "debug", "arithmetic", address, "--model", "m", code=1)
    assert "failed: model in sample" in printed
    assert "answered 400: on fire" in printed


def test_debug_needs_to_know_who_answers(hone: Hone) -> None:
    assert "say who answers" in hone("env", "debug", "arithmetic", code=2, err=True)
    assert "say who answers" in hone("env", "debug", "arithmetic", "x.toml", "--gold", code=2, err=True)
    assert "give --model" in hone("env", "debug", "arithmetic", "http://x", code=2, err=True)
    assert "neither an http address" in hone("env", "debug", "arithmetic", "nowhere", code=2, err=True)
    assert "has 5 train tasks" in hone(
        "env",
        "debug",
        "reverse_text",
        "--gold",
        "--index",
        9,
        "--arguments",
        '{"num_train_tasks": 5}',
        code=2,
        err=True,
    )


def test_replay_tells_old_from_new(hone: Hone, here: Path) -> None:
    """Traces of a looser setting, judged by a stricter one."""
    (here / "synth.toml").write_text(
        '[teacher]\ntarget = "gold"\n[[environments]]\nname = "reverse_text"\n[rollouts]\nnum_tasks = 5\n'
    )
    hone("synth", "synth.toml")
    folder = here / "synth" / "synthesis"
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    printed = hone("env", "replay", folder, "--environment", "arithmetic")
    assert "5 traces, 5 changed" in printed
    assert "fails now (reward correct)" in printed
    same = hone("env", "replay", folder / "traces")
    assert "5 traces, 0 changed; mean reward 1.0000 before, 1.0000 now (+0.0000)" in same
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before

    hone("env", "replay", folder, "--output", here / "new.jsonl")
    told = json.loads(hone("env", "replay", here / "new.jsonl", "--json"))
    assert (told["num_traces"], told["num_changed"], told["mean_after"]) == (5, 0, 1.0)
    assert len(told["traces"]) == 5
    assert "exists already" in hone("env", "replay", folder, "--output", here / "new.jsonl", code=2, err=True)


def test_replay_says_where_traces_are_looked_for(hone: Hone, here: Path) -> None:
    assert "no traces at" in hone("env", "replay", here, code=2, err=True)
    (here / "empty.jsonl").write_text("{}\n")
    assert "holds no trace" in hone("env", "replay", here / "empty.jsonl", code=2, err=True)
    with TraceWriter(here / "traces"):
        pass
    assert "0 traces" in hone("env", "replay", here)


@pytest.mark.parametrize("text", ["[", "[]", "{}"])
def test_replay_names_the_settings_that_it_cannot_read(hone: Hone, here: Path, text: str) -> None:
    (here / "traces.jsonl").write_text("no trace\n")
    (here / "settings.json").write_text(text)
    told = hone("env", "replay", here, code=2, err=True)
    assert ("holds no trace" if text == "{}" else str(here / "settings.json")) in told


def test_the_commands_need_neither_torch_nor_rich_to_say_help() -> None:
    code = "import sys, hone.cli.main; print([m for m in ('torch', 'rich.table', 'msgspec', 'aiohttp') if m in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert ended.stdout.strip() == "[]", ended.stderr
