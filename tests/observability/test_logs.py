"""Logs: one JSON line per record in the process's file, one short line on the console."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from hone.observability.logs import OURS, configure, fields

logger = logging.getLogger("hone.test")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    roots = [logging.getLogger(name) for name in OURS]
    before = [(root.level, root.propagate) for root in roots]
    yield
    for root, (level, propagate) in zip(roots, before, strict=True):
        for handler in root.handlers[:]:
            root.removeHandler(handler)
            handler.close()
        root.level, root.propagate = level, propagate


def lines(folder: Path, process: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "logs" / f"{process}.log").read_text().splitlines()]


def test_a_record_is_one_json_line_with_its_values(tmp_path: Path) -> None:
    configure("trainer", tmp_path, console=False)
    logger.info(
        "weights loaded\nfor good",
        extra=fields(version=3, folder=Path("weights/v000003"), loss=float("nan"), norms=[1.0, float("inf")]),
    )
    (line,) = lines(tmp_path, "trainer")
    assert line.pop("time") > 1e9  # type: ignore[operator]
    assert line == {
        "level": "info",
        "process": "trainer",
        "logger": "hone.test",
        "message": "weights loaded\nfor good",
        "version": 3,
        "folder": "weights/v000003",
        "loss": None,
        "norms": [1.0, None],
    }


def test_configuring_twice_does_not_write_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure("trainer", tmp_path)
    configure("trainer", tmp_path)
    logger.info("once")
    assert len(lines(tmp_path, "trainer")) == 1
    assert capsys.readouterr().err.count("once") == 1


def test_a_module_that_is_run_as_a_program_logs_like_any_other(tmp_path: Path) -> None:
    configure("trainer", tmp_path, console=False)
    logging.getLogger("__main__").info("ready")
    assert [line["message"] for line in lines(tmp_path, "trainer")] == ["ready"]


def test_a_restarted_process_goes_on_in_its_file(tmp_path: Path) -> None:
    for message in ("before", "after"):
        configure("trainer", tmp_path, console=False)
        logger.info(message)
    assert [line["message"] for line in lines(tmp_path, "trainer")] == ["before", "after"]


def test_the_console_line_is_short_and_marks_trouble(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure("trainer")
    logger.info("step", extra=fields(loss=0.123456, step=3))
    logger.warning("bad step")
    first, second = capsys.readouterr().err.splitlines()
    assert first.split(maxsplit=1)[1] == "trainer      step loss=0.1235 step=3"
    assert second.endswith("warning: bad step")
    assert not list(tmp_path.iterdir())


def test_an_exception_is_kept_with_its_traceback(tmp_path: Path) -> None:
    configure("trainer", tmp_path, console=False)
    try:
        raise RuntimeError("it broke")
    except RuntimeError:
        logger.exception("trouble")
    (line,) = lines(tmp_path, "trainer")
    assert "RuntimeError: it broke" in str(line["exception"])


def test_debug_records_are_left_out_by_default(tmp_path: Path) -> None:
    configure("trainer", tmp_path, console=False)
    logger.debug("detail")
    assert lines(tmp_path, "trainer") == []


def test_other_libraries_are_left_alone(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    configure("trainer", tmp_path, console=False)
    logging.getLogger("elsewhere").warning("not ours")
    assert lines(tmp_path, "trainer") == []
    assert logging.getLogger().handlers == before
