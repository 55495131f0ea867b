"""metrics.jsonl and spans.jsonl: lines of many processes, whole and readable whatever happens to a process."""

import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.observability.metrics import Metrics, read_metrics
from hone.observability.spans import Spans, read_spans

NUM_LINES = 300
NUM_VALUES = 500  # a line of more than one page
APPEND = f"""
import sys
from pathlib import Path
from hone.observability.metrics import Metrics
values = {{f"area/number_{{index}}": float(index) for index in range({NUM_VALUES})}}
with Metrics(Path(sys.argv[1]), sys.argv[2]) as metrics:
    for step in range({NUM_LINES}):
        metrics.write(values, step=step)
"""


def test_lines_of_two_processes_do_not_tear_one_another(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    names = ("trainer", "inference")
    processes = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), name]) for name in names]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2 * NUM_LINES
    for name in names:
        assert [line["step"] for line in lines if line["process"] == name] == list(range(NUM_LINES))
    assert all(len(line) == NUM_VALUES + 3 for line in lines)


def test_a_line_carries_time_process_step_and_values(tmp_path: Path) -> None:
    with Metrics(tmp_path / "run" / "metrics.jsonl", "trainer") as metrics:
        metrics.write({"trainer/loss": 0.123456789}, step=3)
        metrics.write({"trainer/idle_seconds": 1})
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (first["process"], first["step"], first["trainer/loss"]) == ("trainer", 3, 0.1234568)
    assert "step" not in second
    assert second["time"] >= first["time"] > 1e9  # type: ignore[operator]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"time": 1, "process": "a", "x/y": 1}\n{"time": 2, "proc')
    assert [line["time"] for line in read_metrics(path)] == [1]
    with Metrics(path, "b") as metrics:
        metrics.write({"x/y": 3})  # ends the torn line, and is lost with it
        metrics.write({"x/y": 4})
    assert [line["x/y"] for line in read_metrics(path)] == [1, 4]


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "absent.jsonl")) == []
    assert list(read_spans(tmp_path / "absent.jsonl")) == []


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@given(st.dictionaries(st.text(st.characters(categories=["Ll"]), min_size=1), st.floats(), max_size=4))
def test_every_line_is_valid_json_whatever_the_values(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, float]
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with Metrics(path, "trainer") as metrics:
        metrics.write({f"area/{name}": value for name, value in values.items()})
    (line,) = path.read_text().splitlines()
    json.loads(line, parse_constant=refuse)


def test_a_value_that_is_not_finite_is_null_in_the_file_and_absent_when_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, "trainer") as metrics:
        metrics.write({"trainer/loss": float("nan"), "trainer/grad_norm": float("inf"), "trainer/lr": 0.1}, step=1)
    written = json.loads(path.read_text())
    assert written["trainer/loss"] is None
    assert written["trainer/grad_norm"] is None
    (read,) = read_metrics(path)
    assert set(read) == {"time", "process", "step", "trainer/lr"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_prometheus_endpoint_tells_the_last_values(tmp_path: Path) -> None:
    port = free_port()
    with Metrics(tmp_path / "metrics.jsonl", "trainer", port=port) as metrics:
        metrics.write({"trainer/mismatch_kl": 0.5, "trainer/loss": float("nan")})
        metrics.write({"trainer/mismatch_kl": 0.25})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            page = answer.read().decode()
    assert 'hone_trainer_mismatch_kl{process="trainer"} 0.25' in page
    assert 'hone_trainer_loss{process="trainer"} NaN' in page
    with Metrics(tmp_path / "metrics.jsonl", "trainer", port=port):
        pass  # close has freed the port


def test_a_taken_port_is_told_with_advice(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"cannot serve metrics on .*choose another run\.metrics_port"):
            Metrics(tmp_path / "metrics.jsonl", "trainer", port=taken.getsockname()[1])


def test_a_span_tells_when_and_how_long(tmp_path: Path) -> None:
    spans = Spans(tmp_path / "spans.jsonl", "trainer")
    with spans.span("train", step=4):
        pass
    spans.record("broadcast", 1000.0, 0.25, version=4)
    spans.close()
    first, second = read_spans(tmp_path / "spans.jsonl")
    assert (first["name"], first["process"], first["step"]) == ("train", "trainer", 4)
    assert 0 <= first["seconds"] < 60  # type: ignore[operator]
    assert second == {"name": "broadcast", "process": "trainer", "start": 1000.0, "seconds": 0.25, "version": 4}


def test_a_span_is_recorded_also_when_its_body_raises(tmp_path: Path) -> None:
    spans = Spans(tmp_path / "spans.jsonl", "trainer")
    with pytest.raises(RuntimeError), spans.span("train"):
        raise RuntimeError
    spans.close()
    assert [line["name"] for line in read_spans(tmp_path / "spans.jsonl")] == ["train"]
