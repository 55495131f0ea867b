"""The report: complete, self-contained, and there whatever the folder lacks."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hone.studio.outcomes import outcomes_of
from hone.studio.report import write_report
from hone.studio.scores import Rail, scores_of
from hone.transport.folders import RunFolder
from studio.page import Page


def page_of(folder: RunFolder) -> Page:
    return Page(write_report(folder.path).read_text())


def data_of(folder: RunFolder) -> dict[str, Any]:
    html = write_report(folder.path).read_text()
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_report_lies_in_the_folder_or_where_it_is_wanted(run: RunFolder, tmp_path: Path) -> None:
    assert write_report(run.path) == run.path / "report.html"
    elsewhere = tmp_path / "pages" / "one.html"
    assert write_report(run.path, elsewhere) == elsewhere
    assert elsewhere.read_text() == (run.path / "report.html").read_text()


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder of a run"):
        write_report(tmp_path / "absent")


def test_a_page_of_a_run_has_every_section(run: RunFolder) -> None:
    page = page_of(run)
    assert page.headings == [
        *("Results", "Held-out tasks during training", "Learning", "Trainer and sampler", "Speed", "SFT"),
        *("Where time goes", "What became of the rollouts", "Traces", "Any metric", "Warnings and errors"),
        "How it was made",
    ]
    assert not page.open


def test_a_page_needs_no_other_file_and_no_network(run: RunFolder) -> None:
    page = page_of(run)
    assert all(reference.startswith("#") for reference in page.references)
    html = (run.path / "report.html").read_text()
    assert "default-src 'none'" in html
    assert html.count("plotly.js v") == 1
    assert "@import" not in html.partition("<script")[0]
    assert "url(" not in html.partition("<script")[0]


def test_links_within_the_page_lead_to_its_sections(run: RunFolder) -> None:
    page = page_of(run)
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)


def test_scores_that_compare_stand_together_in_the_order_of_a_run(run: RunFolder) -> None:
    rows = [(row.score, row.policy, row.value) for row in scores_of(run.evals)]
    assert rows[:6] == [
        *(("reward (avg@1)", "base", "0.000"), ("reward (avg@1)", "sft", "0.450"), ("reward (avg@1)", "rl", "0.940")),
        *(("exact", "base", "0.000"), ("exact", "sft", "0.450"), ("exact", "rl", "0.940")),
    ]
    assert ("failed: environment", "base", "3") in rows


def test_a_score_that_is_no_share_is_drawn_on_no_rail(run: RunFolder) -> None:
    rails = {row.score: row.rail for row in scores_of(run.evals) if row.policy == "rl"}
    assert rails["completion tokens"] is None
    assert rails["exact"] == Rail(left=88.0, width=12.0, at=94.0)


def test_every_attempt_of_the_ledger_counts_once(run: RunFolder) -> None:
    found = {(outcome.state.partition(",")[0], outcome.failure): outcome.count for outcome in outcomes_of(run.ledger)}
    assert found == {
        ("trained", ""): 2,
        ("left out: all rewards of its group are equal", ""): 2,
        ("finished", ""): 1,
        ("failed", "environment"): 1,
    }


def test_every_chart_has_its_data_and_its_place(run: RunFolder) -> None:
    data, page = data_of(run), page_of(run)
    assert data["charts"]
    for chart in data["charts"]:
        assert chart["id"] in page.ids
        for line in chart["lines"]:
            series = data["series"][line["metric"]]
            assert len(series["values"]) == len(series["steps"]) == len(series["minutes"]) > 0


def test_curves_carry_the_numbers_of_the_metrics(run: RunFolder) -> None:
    series = data_of(run)["series"]["train/reward_mean"]
    assert series["steps"] == list(range(1, 41))
    assert series["values"] == [step / 40 for step in range(1, 41)]
    assert series["minutes"][0] == pytest.approx(40 / 60, abs=1e-3)


def test_evaluations_during_training_have_a_chart_for_each_environment(run: RunFolder) -> None:
    charts = {chart["title"]: chart["lines"] for chart in data_of(run)["charts"]}
    assert [line["label"] for line in charts["Held-out tasks: reverse_text"]] == ["reward", "exact"]


def test_a_metric_that_was_never_finite_has_no_curve(run: RunFolder) -> None:
    assert "train/grad_norm" not in data_of(run)["series"]


def test_first_and_last_traces_can_be_read(run: RunFolder) -> None:
    text = page_of(run).text
    assert "Task 0: write this backwards: stone" in text
    assert "Task 29: write this backwards: stone" in text
    assert "Task 15:" not in text
    assert "failure: environment: score: ZeroDivisionError" in text
    assert "version 29-30" in text
    assert "reversal 0.75 × 1" in text


@pytest.mark.parametrize(
    "answer", ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "{{ 7 * 7 }}", "\ud7ff\u2028 ü 漢"]
)
def test_what_a_policy_writes_is_shown_as_text(hostile: Callable[[str], RunFolder], answer: str) -> None:
    page = page_of(hostile(answer))
    assert answer in page.text
    assert "img" not in page.tags
    assert not page.open


def test_the_name_of_a_metric_cannot_end_the_script(run: RunFolder) -> None:
    with run.metrics.open("a") as file:
        file.write(json.dumps({"time": 1.7e9, "process": "x", "step": 1, "</script><b>": 1.0}) + "\n")
    assert "</script><b>" in data_of(run)["series"]
    assert "b" not in page_of(run).tags


def test_a_long_message_is_cut(hostile: Callable[[str], RunFolder]) -> None:
    text = page_of(hostile("x" * 100_000)).text
    assert "(96000 more characters)" in text
    assert len(text) < 50_000


def test_configuration_machine_and_troubles_are_shown(run: RunFolder) -> None:
    text = page_of(run).text
    assert 'chat_template = "glm4"' in text
    assert "Machine and versions" in text
    assert re.search(r"step 3 is skipped\s*3", text)


def test_an_empty_folder_has_a_report_that_says_what_is_missing(empty: RunFolder) -> None:
    page = page_of(empty)
    assert page.headings == ["How it was made"]
    assert "Left out, because the folder has none (yet): configuration, metrics" in page.text


PARTS = ["config", "metrics", "spans", "traces", "logs", "evals", "ledger"]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_may_be_missing(run: RunFolder, part: str) -> None:
    remove(getattr(run, part))
    assert not page_of(run).open


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def test_a_broken_result_of_an_evaluation_is_told(run: RunFolder) -> None:
    (run.evals / "rl" / "reverse_text" / "result.json").write_text("{}")
    assert "evaluations could not be read" in page_of(run).text


@pytest.mark.parametrize("part", ["config", "metrics", "spans", "ledger"])
@pytest.mark.parametrize(
    "garbage", [b"", b"\xff\x00garbage\n{", b'{"time": "yesterday", "start": [], "x/y": {}}\n[1, 2]\n']
)
def test_each_part_may_be_garbage(run: RunFolder, part: str, garbage: bytes) -> None:
    getattr(run, part).write_bytes(garbage)
    assert not page_of(run).open


def test_a_run_that_still_writes_can_be_reported(run: RunFolder) -> None:
    with run.metrics.open("a") as file:
        file.write('{"time": 1700000090.0, "proc')
    segment = next(run.traces.iterdir())
    segment.write_bytes(segment.read_bytes()[:-7])
    page = page_of(run)
    assert "not finished" in page.text
    assert "Task 28:" in page.text


def test_a_finished_run_is_called_finished(run: RunFolder) -> None:
    run.export.mkdir()
    assert "SFT then RL of reverse_text · finished" in page_of(run).text
