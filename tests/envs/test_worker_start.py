"""An env worker that cannot start says why in one line."""

import errno
from pathlib import Path

import pytest

from hone.envs import worker


def test_a_missing_recipe_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.main([str(tmp_path), "worker-0", "reverse_text"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no recipe at")


def test_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "worker-0.log")

    monkeypatch.setattr(worker.logs, "configure", full)
    assert worker.main([str(tmp_path), "worker-0", "reverse_text"]) == 2
    assert "error: cannot write worker-0.log: No space left on device" in capsys.readouterr().err
