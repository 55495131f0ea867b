"""`hone synth` as a person meets it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hone.cli.main import main
from teachers import teacher

FILE = """
[synthesis]
name = "small"
[teacher]
target = "{target}"
model = "m"
[[environments]]
name = "arithmetic"
arguments = {{ operations = "+" }}
[rollouts]
num_tasks = 4
num_attempts = 2
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def synth(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["hone", "synth", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == code, printed.err
        return printed.out, printed.err

    return run


def add(body: dict[str, object]) -> dict[str, object]:
    question = body["messages"][0]["content"]
    first, _, second = question.split()[2:5]
    return {"content": str(int(first) + int(second.rstrip("?")))}


def test_a_teacher_over_http_makes_a_data_set(here: Path, synth: Callable[..., tuple[str, str]]) -> None:
    with teacher(add) as address:
        (here / "small.toml").write_text(FILE.format(target=address))
        out, err = synth("small.toml")
    assert out.splitlines()[0].endswith("synth/small/data/train.parquet")
    assert "equal to another" in err
    rows = [json.loads(line) for line in (here / "synth" / "small" / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert {row["teacher"] for row in rows} == {"m"}


def test_fields_are_overridden_on_the_command_line(here: Path, synth: Callable[..., tuple[str, str]]) -> None:
    with teacher(add) as address:
        (here / "small.toml").write_text(FILE.format(target=address))
        out, _ = synth(
            "small.toml", "--rollouts.num_tasks=2", "--synthesis.name", "other", '--output.formats=["jsonl"]'
        )
    assert len((here / "synth" / "other" / "data" / "train.jsonl").read_text().splitlines()) == 2
    assert "parquet" not in out


def test_what_cannot_be_done_is_one_message(
    here: Path, synth: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    (here / "small.toml").write_text(FILE.format(target="http://127.0.0.1:9"))

    def told(*changes: str) -> str:
        return synth("small.toml", *changes, code=2)[1]

    assert "nothing answers at http://127.0.0.1:9/v1" in told()
    assert "NO_SUCH_KEY, which is not set" in told("--teacher.api_key_variable=NO_SUCH_KEY")
    assert "unknown field keep.min_rewards; did you mean min_reward?" in told("--keep.min_rewards=1")
    assert "no recipe at" in synth("absent.toml", code=2)[1]
    assert not (here / "synth").exists()
