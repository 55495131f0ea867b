"""The report of an evaluation: self-contained, escaped, honest about what is not finished, and every trace in it."""

import base64
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import ScriptedSampler
from hone.envs import MultiTurn, Rollout, Rubric, SingleTurn, Task, metric, reward, system, user
from hone.evals.evaluate import Cell, Plan, complete
from hone.evals.results import Prices
from hone.schema.messages import Message
from hone.schema.sampling import SamplingParameters
from hone.studio.browser import fair_shares
from hone.studio.evaluation import write_evaluation_report
from studio.page import Page

EVIL = "</script><script>alert(1)</script><b>"


@reward
def correct(answer: str, reference: str) -> float:
    return float(answer == reference)


@metric
def size(answer: str) -> float:
    return len(answer)


class Insists(MultiTurn):
    async def reply(self, rollout: Rollout) -> list[Message] | None:
        return None if rollout.num_turns == 2 else [user("Are you certain?")]


def tasks(count: int) -> list[Task]:
    return [Task((system("Answer."), user(f"{EVIL} repeat {n}")), str(n)) for n in range(count)]


ENVIRONMENTS = [
    SingleTurn(name="repeat", version="1", rubric=Rubric([correct, size]), train=[], held_out=tasks(9)),
    Insists(name="insist", version="1", rubric=Rubric([correct]), train=[], held_out=tasks(4)),
]


async def evaluated(folder: Path, model: str, sampler: ScriptedSampler, environments: Any = ENVIRONMENTS) -> None:
    for environment in environments:
        plan = Plan(
            environment,
            9,
            2,
            SamplingParameters(max_tokens=12),
            folder=folder / model / environment.name,
            model=model,
            prices=Prices(10.0, 100.0),
        )
        with Cell(plan) as cell:
            await complete([cell], sampler, max_concurrent=1)
            cell.conclude()


def number(branch: Any) -> int:
    return int(branch[1].message.content.rpartition(" ")[2])


@pytest.fixture
async def evals(tmp_path: Path) -> Path:
    folder = tmp_path / "evals"
    await evaluated(folder, "base", ScriptedSampler(lambda branch: str(number(branch) % 3)))
    await evaluated(folder, "rl", ScriptedSampler(lambda branch: str(min(6, number(branch)))))
    return folder


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def traces_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        trace for chunk in data["traces"]["chunks"] for trace in json.loads(zlib.decompress(base64.b64decode(chunk)))
    ]


def test_the_page_is_whole_and_needs_no_other_file(evals: Path) -> None:
    html = write_evaluation_report(evals).read_text()
    page = Page(html)
    assert not page.open
    assert len(set(page.ids)) == len(page.ids)
    assert all(reference.startswith("#") for reference in page.references)
    assert page.headings == ["Results", "Several attempts", "Paired differences", "Lengths and endings", "Traces"]
    assert "Evaluation of 2 models on 2 environments" in page.text
    assert "pass^2" in page.text
    assert "not finished" not in page.text


def test_the_scores_curves_and_differences_are_those_of_the_results(evals: Path) -> None:
    data = data_of(write_evaluation_report(evals).read_text())
    base, rl = (
        next(c for c in data["cells"] if c["model"] == m and c["environment"] == "repeat") for m in ("base", "rl")
    )
    assert (base["reward"]["mean"], rl["reward"]["mean"]) == (pytest.approx(3 / 9), pytest.approx(7 / 9))
    assert [point["mean"] for point in rl["curves"]["pass^k"]] == pytest.approx([7 / 9, 7 / 9])
    [pair] = [p for p in data["pairs"] if (p["first"], p["second"], p["environment"]) == ("base", "rl", "repeat")]
    assert pair["reward"]["mean"] == pytest.approx(4 / 9)
    assert (pair["num_lost"], pair["num_gained"]) == (0, 4)
    assert base["endings"] == {"completed": 18}


def test_every_trace_can_be_read_message_by_message(evals: Path) -> None:
    data = data_of(write_evaluation_report(evals).read_text())
    columns, traces = data["traces"]["columns"], traces_of(data)
    assert len(traces) == len(columns["task"]) == 2 * (18 + 8)
    talk = traces[next(i for i, cell in enumerate(columns["cell"]) if data["cells"][cell]["environment"] == "insist")]
    assert [message["role"] for message in talk["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert f"{EVIL} repeat 0" in [message["content"] for message in traces[0]["messages"]]
    solved = [columns["outcome"][i] == "solved" for i in range(len(traces))]
    assert sum(solved) == 2 * (3 + 7) + 2 * (3 + 4)
    assert "rewards: correct" in traces[0]["facts"]


def test_nothing_that_a_model_or_task_says_becomes_markup(evals: Path) -> None:
    (evals / "base").rename(evals / "<img src=x>")
    html = write_evaluation_report(evals).read_text()
    assert "alert(1)" not in html.replace("\\u003cscript>alert(1)\\u003c/script>", "")
    assert "<img" not in html.partition("<script>")[0]
    assert Page(html).tags.count("img") == 0


async def test_failures_are_shown_and_an_evaluation_with_many_is_not_finished(evals: Path) -> None:
    out = ScriptedSampler([ConnectionError("the engine is <gone>")])
    await evaluated(evals, "broken", out, ENVIRONMENTS[:1])
    html = write_evaluation_report(evals).read_text()
    page = Page(html)
    assert "not finished" in page.text
    assert "18 of 18 rollouts failed, more than 5%" in page.text
    assert "the engine is <gone>" in page.text
    data = data_of(html)
    [cell] = [cell for cell in data["cells"] if cell["model"] == "broken"]
    assert (cell["reward"], cell["is_finished"], cell["endings"]) == (None, False, {"failed: model": 18})
    assert data["traces"]["columns"]["outcome"].count("failed") == 18


def test_an_interrupted_evaluation_is_reported_as_not_finished(evals: Path) -> None:
    for path in [*evals.rglob("result.json"), *evals.rglob("outcomes.jsonl")]:
        path.unlink()
    html = write_evaluation_report(evals).read_text()
    assert "it was interrupted, or still runs" in Page(html).text
    assert not any(cell["is_finished"] for cell in data_of(html)["cells"])


async def test_an_attempt_that_ran_again_is_there_once(tmp_path: Path) -> None:
    await evaluated(tmp_path / "evals", "m", ScriptedSampler([ConnectionError("gone")]), ENVIRONMENTS[:1])
    await evaluated(tmp_path / "evals", "m", ScriptedSampler(lambda branch: str(number(branch))), ENVIRONMENTS[:1])
    columns = data_of(write_evaluation_report(tmp_path / "evals").read_text())["traces"]["columns"]
    assert columns["outcome"] == ["solved"] * 18


def test_no_more_traces_are_embedded_than_asked_for(evals: Path) -> None:
    html = write_evaluation_report(evals, max_traces=20).read_text()
    assert len(traces_of(data_of(html))) == 20
    assert "32 more are in the folder" in Page(html).text


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 200))
def test_shares_are_fair(counts: list[int], total: int) -> None:
    shares = fair_shares(counts, total)
    assert sum(shares) == min(total, sum(counts))
    assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))
    cut = [share for share, count in zip(shares, counts, strict=True) if share < count]
    assert not cut or max(shares) - min(cut) <= 1


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluation in"):
        write_evaluation_report(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
def test_a_browser_lists_filters_and_opens_traces(evals: Path, tmp_path: Path) -> None:
    page = (
        write_evaluation_report(evals).read_text()
        + """<script>(async () => {
      document.getElementById("by-model").value = "rl";
      document.getElementById("by-outcome").value = "solved";
      document.getElementById("by-text").value = "CERTAIN 2";
      await filter();
      const trace = await traceAt(found[0]);
      const told = made("pre", { id: "told" }, JSON.stringify([found.length, shown(trace, found[0]).length]));
      document.body.append(told);
    })();</script>"""
    )
    path = tmp_path / "probe.html"
    path.write_text(page)
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    ended = subprocess.run(
        ["chromium", *arguments, "--virtual-time-budget=5000", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    told = re.search(r'<pre id="told">([^<]*)</pre>', ended.stdout)
    assert told is not None, ended.stderr
    num_found, num_parts = json.loads(told[1])
    assert num_found == 2  # both attempts at the task
    assert num_parts == 7  # five messages, the facts, the button
