"""A run's folder in the format of the real ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hone.evals.results import EvalResult
from hone.evals.statistics import Estimate
from hone.evals.storage import EvalFolder, Settings
from hone.observability.machine import save_machine
from hone.observability.spans import Spans
from hone.orchestrator.ledger import Ledger
from hone.orchestrator.mixture import Draw
from hone.schema.messages import Message
from hone.schema.rollouts import RolloutResult
from hone.schema.sampling import FinishReason, SamplingParameters, Turn, VersionRun
from hone.schema.tasks import Task
from hone.schema.traces import Failure, FailureClass, Node, Reward, StopReason, Trace
from hone.schema.wire import Wire
from hone.transport.folders import RunFolder
from hone.transport.traces import BEGINNING, TraceWriter

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny" / "reverse.toml"
START = 1_700_000_000.0


def trace(number: int, *, answer: str = "enots", failure: Failure | None = None) -> Trace:
    """One rollout; its task's text carries the number."""
    prompt = Message("user", f"Task {number}: write this backwards: stone")
    turn = Turn(
        Message("assistant", answer),
        FinishReason.STOP,
        context_token_ids=[1, 2],
        token_ids=[3, 4],
        logprobs=[-0.1, -0.2],
        versions=[VersionRun(number, 1), VersionRun(number + 1, 1)],
        num_completion_tokens=2,
    )
    return Trace(
        environment="reverse_text",
        task=Task((prompt,), reference="enots"),
        attempt=number % 8,
        nodes=[Node(prompt), Node(turn.message, 0, turn)],
        rewards={} if failure else {"reversal": Reward(0.75)},
        metrics={"exact": 0.0},
        failure=failure,
        stop_reason=None if failure else StopReason.COMPLETED,
    )


def write_metrics(folder: RunFolder) -> None:
    with folder.metrics.open("w") as file:
        for step in range(1, 41):
            line = {"time": START + step, "process": "trainer", "step": step}
            sft = {"sft/loss": 3.0 / step, "sft/grad_norm": 1.0, "sft/tokens_per_second": 9000.0}
            rl: dict[str, object] = {
                "train/loss": 0.01,
                "train/samples_per_second": 1500.0,
                "train/reward_mean": step / 40,
                "train/staleness_max": step % 4,
            }
            if step % 10 == 0:
                held_out = {"eval/reverse_text/reward_mean": 0.5, "eval/reverse_text/metric_exact_mean": step / 40}
                file.write(json.dumps(line | held_out | {"time": START + 41 + step}) + "\n")
            file.write(json.dumps(line | sft) + "\n")
            file.write(json.dumps(line | rl | {"time": START + 40 + step, "train/grad_norm": None}) + "\n")


def write_spans(folder: RunFolder) -> None:
    for process, name, seconds in (("trainer", "train", 0.6), ("trainer", "wait", 0.3), ("worker-0", "score", 0.1)):
        spans = Spans(folder.spans, process)
        for step in range(40):
            spans.record(name, START + 40 + step, seconds, step=step)
        spans.close()


def write_traces(folder: RunFolder, traces: list[Trace]) -> None:
    wire = Wire(RolloutResult)
    with TraceWriter(folder.traces) as writer:
        for item in traces:
            writer.append([wire.encode(RolloutResult("0", item.attempt, item))])


def write_result(folder: Path, mean: float, failures: dict[str, int] | None = None) -> None:
    """A result.json as an evaluation writes it."""
    sampling = SamplingParameters(max_tokens=16)
    with EvalFolder(folder, Settings("reverse_text", "0.1.0", folder.parent.name, sampling, 0)) as files:
        estimate = Estimate(mean, max(0.0, mean - 0.06), min(1.0, mean + 0.06), 256)
        files.save_result(
            EvalResult(
                environment="reverse_text",
                environment_version="0.1.0",
                model=folder.parent.name,
                attempts=1,
                num_rollouts=256,
                reward=estimate,
                rewards={"reversal": estimate},
                metrics={"exact": estimate},
                pass_at={1: estimate},
                truncated=Estimate(0.0, 0.0, 0.015, 256),
                completion_tokens=Estimate(6.5, 6.1, 6.9, 256),
                failures=failures or {},
            )
        )


def write_ledger(folder: RunFolder) -> None:
    """Three groups of two: one trained, one filtered, one of which an attempt failed."""
    with Ledger(folder.ledger, {"num_steps": 10, "max_staleness": 4}) as ledger:
        for number in range(3):
            ledger.admit(number, Draw("reverse_text", number, number), f"key-{number}", 0, 2)
            ledger.run(number, [0, 1])
            ledger.finish(number, 0, 0.5, 0, BEGINNING)
            if number < 2:
                ledger.finish(number, 1, 1.0, 0, BEGINNING)
        ledger.finish_group(0)
        ledger.filter_group(1)
        ledger.fail(2, 1, FailureClass.ENVIRONMENT)
        ledger.commit()
        ledger.batch(1, [0], 2)
        ledger.train(1)
        ledger.commit()


@pytest.fixture
def empty(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "reverse")
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture
def run(empty: RunFolder) -> RunFolder:
    empty.config.write_text(RECIPE.read_text())
    save_machine(empty.path / "machine.json")
    write_metrics(empty)
    write_spans(empty)
    broken = Failure(FailureClass.ENVIRONMENT, "score", "ZeroDivisionError: division by zero")
    write_traces(empty, [trace(number, failure=broken if number == 2 else None) for number in range(30)])
    write_ledger(empty)
    write_result(empty.evals / "rl" / "reverse_text", 0.94)
    write_result(empty.evals / "base" / "reverse_text", 0.0, {"environment": 3})
    write_result(empty.evals / "sft" / "reverse_text", 0.45)
    empty.logs.mkdir()
    warning = {"time": START, "level": "warning", "process": "trainer", "message": "step 3 is skipped"}
    empty.log("trainer").write_text((json.dumps(warning) + "\n") * 3)
    return empty


@pytest.fixture
def hostile(run: RunFolder) -> Callable[[str], RunFolder]:
    """The run, whose policy answered the given text."""

    def answering(text: str) -> RunFolder:
        for segment in run.traces.iterdir():
            segment.unlink()
        write_traces(run, [trace(0, answer=text)])
        return run

    return answering
