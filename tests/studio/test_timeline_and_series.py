"""Timelines and series: what the report computes from spans and metrics."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hone.schema.traces import FailureClass
from hone.studio.charts import GROUPS, Chart, Line, charts_of, shown
from hone.studio.report import HEADLINES
from hone.studio.series import MAX_POINTS, Series, series_of
from hone.studio.timeline import MAX_BARS, Span, covered_seconds, shares, spans_of, window


def span(start: float, seconds: float, name: str = "train", process: str = "trainer") -> Span:
    return Span(name, process, start, seconds, {})


def test_work_that_overlaps_counts_once() -> None:
    assert covered_seconds([span(0, 2), span(1, 2), span(1.5, 0.1), span(5, 1)]) == 4


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10)), max_size=30))
def test_covered_time_is_the_size_of_the_union(pieces: list[tuple[int, int]]) -> None:
    spans = sorted((span(start, seconds) for start, seconds in pieces), key=lambda s: s.start)
    seconds = {second for start, length in pieces for second in range(start, start + length)}
    assert covered_seconds(spans) == len(seconds)


def test_shares_are_of_the_process_own_time() -> None:
    found = shares([span(0, 6), span(6, 4, "wait"), span(2, 1, "score", "worker-0")])
    assert [(s.process, s.name, s.share) for s in found] == [
        ("trainer", "train", 0.6),
        ("trainer", "wait", 0.4),
        ("worker-0", "score", 1.0),
    ]


def test_a_span_that_sums_up_many_pieces_counts_what_they_took_together() -> None:
    sums = [Span("generate", "o", float(n), 1.0, {"busy_seconds": 30.0}) for n in range(10)]
    [found] = shares(sums)
    assert (found.seconds, found.share) == (300.0, 30.0)


def test_a_window_is_of_the_asked_length_and_from_the_middle() -> None:
    found = window([span(float(second), 0.5) for second in range(101)], 10.0)
    assert [int(s.start) for s in found] == list(range(50, 61))


def test_a_window_shows_a_time_in_which_all_processes_work() -> None:
    alone = [span(float(second), 1.0) for second in range(100)]
    together = [span(80.0 + second, 1.0, "generate", "orchestrator") for second in range(20)]
    found = window(sorted([*alone, *together], key=lambda s: s.start), 4.0)
    assert {s.process for s in found} == {"trainer", "orchestrator"}
    assert min(s.start for s in found) >= 88


def test_a_window_holds_no_more_bars_than_a_picture_can_show() -> None:
    assert 0 < len(window([span(n / 1000, 0.001) for n in range(100_000)], 10.0)) <= MAX_BARS
    assert len(window([span(1.0, 0.0)] * 5000, 10.0)) == MAX_BARS
    assert window([], 10.0) == []


def test_lines_that_are_no_spans_are_passed_over() -> None:
    lines = [
        {"name": "b", "process": "p", "start": 2.0, "seconds": 1, "step": 3},
        {"name": "x", "process": "p", "start": "now", "seconds": 1},
        {},
        {"name": "a", "process": "p", "start": 1, "seconds": 0.5},
    ]
    assert [(s.name, s.end, s.fields) for s in spans_of(lines)] == [("a", 1.5, {}), ("b", 3.0, {"step": 3})]


def test_a_step_that_was_done_again_counts_as_it_was_done_last() -> None:
    values = [(1, 10.0), (2, 20.0), (3, 30.0), (2, 21.0), (3, 31.0), (4, 40.0)]
    found = series_of({"time": float(t), "process": "p", "step": s, "a/b": v} for t, (s, v) in enumerate(values))
    assert found["a/b"].steps == [1, 2, 3, 4]
    assert found["a/b"].values == [10.0, 21.0, 31.0, 40.0]


def test_lines_without_a_step_keep_their_order() -> None:
    found = series_of({"time": 60.0 * t, "process": "p", "a/b": float(t)} for t in range(3))
    assert found["a/b"] == Series([None, None, None], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0])


@given(st.integers(1, 10_000))
def test_a_thinned_series_keeps_its_ends_and_its_order(count: int) -> None:
    series = Series(list(range(count)), [float(n) for n in range(count)], [float(n) for n in range(count)])
    thin = series.thinned()
    assert (thin.values[0], thin.values[-1]) == (0.0, count - 1.0)
    assert thin.values == sorted(set(thin.values))
    assert len(thin.values) <= MAX_POINTS + 1


def test_a_chart_leaves_out_what_was_never_written() -> None:
    chart = Chart("both", (Line("a/b", "one"), Line("a/c", "two")))
    drawn = chart.with_lines_of({"a/b": Series([1], [0.0], [2.0])})
    assert drawn is not None
    assert [line.metric for line in drawn.lines] == ["a/b"]
    assert chart.with_lines_of({}) is None
    assert charts_of({}) == []


def test_a_chart_says_in_words_how_its_curves_begin_and_end() -> None:
    series = Series(list(range(20)), [0.0] * 20, [0.0] * 10 + [1.0] * 10)
    assert Chart("c", (Line("a/b", "reward"),)).spoken({"a/b": series}) == "reward: 0 to 1"


def test_no_two_groups_of_charts_have_one_anchor() -> None:
    anchors = [group.anchor for group in GROUPS]
    assert len(set(anchors)) == len(anchors)


def test_everything_that_is_drawn_is_written_by_a_process() -> None:
    # tests/test_docs.py compares this page with the source.
    documented = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    drawn = {line.metric for group in GROUPS for chart in group.charts for line in chart.lines}
    by_class = {f"rollout/failed_{kind}_count" for kind in FailureClass}
    names = (drawn - by_class) | {metric for _, metric, _ in HEADLINES}
    assert [name for name in sorted(names) if f"`{name}`" not in documented] == []


def test_numbers_read_well() -> None:
    assert [shown(value) for value in (0.0, 12345.6, 0.123456, 1e-5, 42.0)] == ["0", "12,346", "0.123", "1e-05", "42"]
