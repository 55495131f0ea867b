"""`hone eval` as a person meets it: many models and environments, killed and continued, failures run again, compared."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hone.evals.folders import find_cells
from hone.evals.storage import read_result, read_traces


class Models(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint with two models: `good` reverses texts, `bad` only those of an early letter."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.seconds = 0.0
        self.broken: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.keys: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Models

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked[body["model"]] += 1
        self.server.keys.add(self.headers.get("Authorization"))
        time.sleep(self.server.seconds)
        if body["model"] in self.server.broken:
            return self.answer(400, {"error": {"message": "the model is out"}})
        text = body["messages"][-1]["content"]
        said = text[::-1] if body["model"] == "good" or text[0] < "m" else text
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return self.answer(200, {"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 500}})

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def models() -> Iterator[Models]:
    with Models() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def file(tmp_path: Path, models: Models) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(f"""
[run]
name = "two"
folder = "{tmp_path / "evals"}"
[evaluation]
num_tasks = 12
num_attempts = 2
max_concurrent = 4
[[environments]]
name = "reverse_text"
arguments = {{ prompt = "{{text}}" }}
[[environments]]
name = "reverse_text"
label = "few"
arguments = {{ prompt = "{{text}}" }}
num_tasks = 3
sampling = {{ temperature = 0.0 }}
limits = {{ max_turns = 1 }}
[[models]]
name = "first"
model = "good"
address = "{models.address}"
api_key_variable = "TEST_KEY"
prices = {{ prompt = 1.0, completion = 2.0 }}
[[models]]
name = "second"
model = "bad"
address = "{models.address}"
max_concurrent = 2
""")
    return path


def hone(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hone.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"TEST_KEY": "secret"},
    )


def attempts_in(folder: Path) -> Counter[tuple[str, int]]:
    return Counter((trace.task.key, trace.attempt) for trace in read_traces(folder / "traces.jsonl"))


@pytest.mark.slow
def test_models_are_run_on_environments_and_compared(file: Path, models: Models) -> None:
    ended = hone("eval", file)
    assert ended.returncode == 0, ended.stderr
    assert models.asked == {"good": 30, "bad": 30}
    assert models.keys == {"Bearer secret", None}
    evals = file.parent / "evals" / "two"
    assert "secret" not in (evals / "evaluation.toml").read_text()
    assert [(cell.model, cell.environment) for cell in find_cells(evals)] == [
        ("first", "few"),
        ("first", "reverse_text"),
        ("second", "few"),
        ("second", "reverse_text"),
    ]
    good, bad = (read_result(evals / name / "reverse_text") for name in ("first", "second"))
    assert (good.num_rollouts, good.num_wanted, good.shortcoming) == (24, 24, None)
    assert good.pass_all[2].mean == 1 > bad.pass_at[1].mean
    assert good.usage.prompt == 24_000
    assert good.cost == pytest.approx(24_000 * 1e-6 + 12_000 * 2e-6)
    assert bad.cost is None
    lines = ended.stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("first on reverse_text: reward (avg@2) 1.000")
    assert lines[0].endswith("0 of 24 failed")

    assert hone("eval", file).returncode == 0
    assert models.asked == {"good": 30, "bad": 30}  # nothing was missing

    for arguments in ((evals / "first", evals / "second"), (evals,)):
        compared = hone("eval", "compare", *arguments)
        assert compared.returncode == 0, compared.stderr
        assert "second minus first" in compared.stdout
        assert "lost" in compared.stdout
        assert "gained" in compared.stdout
    assert "the same folder" in hone("eval", "compare", evals / "first", evals / "first").stderr


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_runs_every_attempt_once(file: Path, models: Models) -> None:
    models.seconds = 0.1
    evals = file.parent / "evals" / "two"
    process = subprocess.Popen(
        [sys.executable, "-m", "hone.cli.main", "eval", str(file)],
        env=os.environ | {"TEST_KEY": "secret"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while sum(models.asked.values()) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {cell.folder: attempts_in(cell.folder) for cell in find_cells(evals)}
    assert 0 < sum(found.total() for found in before.values()) < 60
    assert not list(evals.rglob("result.json"))
    assert not any(cell.is_over for cell in find_cells(evals))

    models.seconds = 0.0
    models.asked.clear()
    ended = hone("eval", file)
    assert ended.returncode == 0, ended.stderr
    assert models.asked.total() == 60 - sum(found.total() for found in before.values())
    for cell in find_cells(evals):
        attempts = attempts_in(cell.folder)
        assert set(attempts.values()) == {1}
        assert attempts.total() == read_result(cell.folder).num_rollouts == cell.result.num_wanted
        assert set(before[cell.folder]) <= set(attempts)


@pytest.mark.slow
def test_too_many_failures_are_no_finished_evaluation_and_run_again_alone(file: Path, models: Models) -> None:
    models.broken.add("bad")
    ended = hone("eval", file)
    assert ended.returncode == 1
    assert "30 failed" in ended.stderr or "24 failed" in ended.stderr
    assert "the model is out" in ended.stderr
    [line, _] = [line for line in ended.stdout.splitlines() if line.startswith("second on")]
    assert line.startswith("second on reverse_text: NOT FINISHED (24 of 24 rollouts failed, more than 5%)")

    models.asked.clear()
    assert hone("eval", file).returncode == 1
    assert models.asked == {}  # failures are records: without being told to, nobody pays for them twice

    models.broken.clear()
    again = hone("eval", file, "--retry-failures")
    assert again.returncode == 0, again.stderr
    assert models.asked == {"bad": 30}
    result = read_result(file.parent / "evals" / "two" / "second" / "reverse_text")
    assert (result.num_rollouts, result.failures, result.num_wanted) == (24, {}, 24)

    grown = hone("eval", file, "--retry-failures", "--evaluation.num_attempts=3")
    assert grown.returncode == 1
    assert "12 of 36 rollouts are missing" in grown.stdout
    assert models.asked == {"bad": 30}


@pytest.mark.slow
def test_results_of_other_settings_are_never_mixed(file: Path, models: Models) -> None:
    assert hone("eval", file).returncode == 0
    models.asked.clear()
    for change in ("--evaluation.sampling.temperature=0.5", "--run.seed=3", "--models.0.model=bad"):
        ended = hone("eval", file, change)
        assert ended.returncode == 2
        assert "use another folder" in ended.stderr
    assert models.asked == {}
    assert hone("eval", file, "--run.seed=3", "--run.name=other").returncode == 0
    assert models.asked.total() == 60
