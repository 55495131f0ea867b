"""The report of a run: one HTML file that needs no other file and no network, made from the run's folder alone."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hone.config.load import ConfigError, load_recipe
from hone.evals.statistics import CONFIDENCE
from hone.observability.machine import describe_machine
from hone.schema.traces import Trace
from hone.studio.charts import Chart, ChartGroup, charts_of, shown
from hone.studio.excerpts import TraceView, view
from hone.studio.page import embedded, inlined, plotly, template, write_page
from hone.studio.run import Run, gather
from hone.studio.timeline import Span, shares, window
from hone.transport.folders import RunFolder

WINDOW_SECONDS = 10.0
MAX_TROUBLES = 30


HEADLINES: tuple[tuple[str, str, Callable[[Sequence[float]], float]], ...] = (
    ("SFT steps", "sft/loss", len),
    ("RL steps", "train/loss", len),
    ("reward, last tenth of RL", "train/reward_mean", lambda values: fmean(values[-max(1, len(values) // 10) :])),
    ("rollouts trained per second", "train/samples_per_second", median),
    ("sampled tokens per second", "engine/tokens_per_second", median),
    ("largest staleness", "train/staleness_max", max),
    ("largest difference of logprobs", "train/logprob_difference_max", max),
    ("its 99th percentile in the worst step", "train/logprob_difference_p99", max),
)
"""Numbers at the head of the page: name, metric, and how its values become one."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A number at the head of the page."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart with its place on the page and its content in words."""

    id: str
    chart: Chart
    spoken: str


@dataclass(frozen=True, slots=True)
class PlotGroup:
    """Plots under one heading."""

    title: str
    anchor: str
    plots: tuple[Plot, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """Traces under one heading."""

    title: str
    traces: list[TraceView]


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run to `output`, by default report.html in its folder; returns where it is.

    Whatever the folder lacks leaves its section out and a note in the page, so a run that still goes on, or that
    crashed, can be reported like a finished one.
    """
    if not run_folder.is_dir():
        raise ValueError(f"{run_folder} is no folder of a run")
    return write_page(output or run_folder / "report.html", render(gather(RunFolder(run_folder))))


def render(run: Run) -> str:
    """The page as text."""
    groups = _plot_groups(run)
    in_window = window(run.spans, WINDOW_SECONDS)
    return template("report.html.j2").render(
        name=run.folder.path.resolve().name,
        status=_status(run),
        facts=_facts(run),
        notes=run.notes,
        scores=run.scores,
        confidence=f"{CONFIDENCE:.0%}",
        groups=groups,
        shares=shares(run.spans),
        window_title=_window_title(in_window),
        outcomes=run.outcomes,
        samples=_samples(run.traces),
        metric_names=sorted(run.series),
        troubles=run.troubles[:MAX_TROUBLES],
        config=run.config,
        machine=run.machine or describe_machine(),
        machine_title="Machine and versions" if run.machine else "Machine and versions that wrote this report",
        contents=_contents(run, groups),
        data=embedded(_drawn(run, groups, in_window)),
        draws=bool(run.series or run.spans),
        css=inlined("report.css"),
        javascript=inlined("plots.js", "report.js"),
        plotly=plotly(),
    )


def _drawn(run: Run, groups: Sequence[PlotGroup], in_window: Sequence[Span]) -> dict[str, Any]:
    """What the page's script draws."""
    plots = [plot for group in groups for plot in group.plots]
    return {
        "series": {name: asdict(series.thinned()) for name, series in run.series.items()},
        "charts": [asdict(plot.chart) | {"id": plot.id} for plot in plots],
        "timeline": _bars(in_window),
    }


def _plot_groups(run: Run) -> list[PlotGroup]:
    def plots(group: ChartGroup) -> tuple[Plot, ...]:
        return tuple(
            Plot(f"{group.anchor}-{index}", chart, chart.spoken(run.series)) for index, chart in enumerate(group.charts)
        )

    return [PlotGroup(group.title, group.anchor, plots(group)) for group in charts_of(run.series)]


def _bars(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The window as one bar per span, one row per process and activity, one colour per activity."""
    if not spans:
        return []
    begin = min(span.start for span in spans)
    by_name: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: (span.process, span.start)):
        by_name[span.name].append(span)
    return [
        {
            "name": name,
            "rows": [f"{span.process} · {name}" for span in same],
            "starts": [round(span.start - begin, 5) for span in same],
            "seconds": [round(span.seconds, 5) for span in same],
            "texts": [_spoken_span(span) for span in same],
        }
        for name, same in by_name.items()
    ]


def _spoken_span(span: Span) -> str:
    details = "".join(f", {name} {value}" for name, value in span.fields.items())
    return f"{span.process}: {span.name}, {span.seconds * 1000:.1f} ms{details}"


def _window_title(spans: Sequence[Span]) -> str:
    if not spans:
        return ""
    seconds = max(span.end for span in spans) - min(span.start for span in spans)
    return f"{seconds:.3g} seconds in the middle of the run, where all processes work"


def _samples(traces: tuple[list[Trace], list[Trace]]) -> list[Sample]:
    first, last = traces
    found = [Sample("First rollouts", list(map(view, first))), Sample("Last rollouts", list(map(view, last)))]
    return [sample for sample in found if sample.traces]


def _status(run: Run) -> str:
    folder = run.folder
    try:
        recipe = load_recipe(folder.config)
    except ConfigError:
        return "No readable configuration."
    stages = [name for name, section in (("SFT", recipe.sft), ("RL", recipe.rl)) if section is not None]
    export = folder.export if recipe.rl is not None else folder.sft_export
    trained = f"{' then '.join(stages) or 'Evaluation'} of {', '.join(e.name for e in recipe.environments) or 'no environment'}"
    return f"{trained} · {'finished' if not stages or export.exists() else 'not finished'}"


def _facts(run: Run) -> list[Fact]:
    found = [Fact("duration", _duration(max((s.minutes[-1] for s in run.series.values()), default=0.0)))]
    for name, metric, statistic in HEADLINES:
        if metric in run.series:
            found.append(Fact(name, shown(statistic(run.series[metric].values))))
    return found if run.series else []


def _duration(minutes: float) -> str:
    return (
        f"{minutes * 60:.0f} s" if minutes < 2 else f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    )


def _contents(run: Run, groups: Sequence[PlotGroup]) -> list[tuple[str, str]]:
    optional = [
        ("Results", "results", run.scores),
        *((group.title, group.anchor, group.plots) for group in groups),
        ("Where time goes", "time", run.spans),
        ("Outcomes", "outcomes", run.outcomes),
        ("Traces", "traces", run.traces[0]),
        ("Any metric", "metrics", run.series),
        ("Warnings and errors", "troubles", run.troubles),
    ]
    return [(title, anchor) for title, anchor, content in optional if content] + [("How it was made", "how")]
