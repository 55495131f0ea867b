"""Which curves a report draws, as data: a curve whose metric the run never wrote is left out, so is an empty chart."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hone.schema.traces import FailureClass
from hone.studio.series import Series

HELD_OUT = re.compile(r"eval/(?P<environment>[^/]+)/(?:metric_)?(?P<score>(?!completion_tokens|truncated).+)_mean")


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. raw: draw the points as they are, not their running mean."""

    metric: str
    label: str
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves on common axes."""

    title: str
    lines: tuple[Line, ...]
    unit: str = ""
    log: bool = False
    from_zero: bool = False
    note: str = ""

    def with_lines_of(self, series: Mapping[str, Series]) -> "Chart | None":
        """The chart with those of its lines that the run wrote; None without any."""
        lines = tuple(line for line in self.lines if line.metric in series)
        return Chart(self.title, lines, self.unit, self.log, self.from_zero, self.note) if lines else None

    def spoken(self, series: Mapping[str, Series]) -> str:
        """What the curves show, in words: the means of their first and last tenths."""
        ends = [(line.label, *series[line.metric].beginning_and_end()) for line in self.lines]
        return "; ".join(f"{label}: {shown(first)} to {shown(last)}" for label, first, last in ends)


@dataclass(frozen=True, slots=True)
class ChartGroup:
    """Charts under one heading; `anchor` is unique on the page."""

    title: str
    anchor: str
    charts: tuple[Chart, ...]


def charts_of(series: Mapping[str, Series]) -> list[ChartGroup]:
    """The groups of charts that a run has metrics for."""
    groups = []
    for group in (ChartGroup("Held-out tasks during training", "held-out", _held_out(series)), *GROUPS):
        charts = tuple(drawn for chart in group.charts if (drawn := chart.with_lines_of(series)) is not None)
        if charts:
            groups.append(ChartGroup(group.title, group.anchor, charts))
    return groups


def _held_out(series: Mapping[str, Series]) -> tuple[Chart, ...]:
    """One chart for each environment that is evaluated during training: its rewards, metrics and solved share."""
    lines: dict[str, list[Line]] = {}
    for name in series:
        found = HELD_OUT.fullmatch(name)
        if found is not None:
            lines.setdefault(found["environment"], []).append(Line(name, found["score"].replace("_", " "), raw=True))
    return tuple(Chart(f"Held-out tasks: {name}", _without_repetition(own, series)) for name, own in lines.items())


def _without_repetition(lines: Sequence[Line], series: Mapping[str, Series]) -> tuple[Line, ...]:
    """Of curves that lie on one another the first: the only reward of a rubric is also the total."""
    first: dict[tuple[float, ...], Line] = {}
    for line in lines:
        first.setdefault(tuple(series[line.metric].values), line)
    return tuple(first.values())


def shown(value: float) -> str:
    """A number as a person reads it."""
    if value == 0 or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}"


GROUPS: tuple[ChartGroup, ...] = (
    ChartGroup(
        "Learning",
        "learning",
        (
            Chart(
                "Reward",
                (Line("train/reward_mean", "trained rollouts"), Line("rollout/reward_mean", "all finished rollouts")),
                "mean reward",
            ),
            Chart("Spread of the rewards", (Line("train/reward_std", "standard deviation"),), "reward"),
            Chart("RL loss", (Line("train/loss", "loss"),), "loss"),
            Chart("Gradient norm", (Line("train/grad_norm", "before clipping"),), "norm", log=True),
            Chart("Entropy", (Line("train/entropy", "sampler"),), "nats per token"),
            Chart("Learning rate", (Line("train/lr", "RL", raw=True),), "", from_zero=True),
        ),
    ),
    ChartGroup(
        "Trainer and sampler",
        "agreement",
        (
            Chart(
                "Staleness",
                (
                    Line("train/staleness_max", "maximum", raw=True),
                    Line("train/staleness_mean", "mean"),
                    Line("train/staleness_min", "minimum", raw=True),
                ),
                "policy versions",
                from_zero=True,
            ),
            Chart("Mismatch KL", (Line("train/mismatch_kl", "sampler to trainer"),), "nats per token"),
            Chart(
                "Difference of logprobs",
                (
                    Line("train/logprob_difference_max", "maximum"),
                    Line("train/logprob_difference_p99", "99th percentile"),
                ),
                "nats",
            ),
            Chart("Effective sample size", (Line("train/ess", "share of the tokens"),), "share"),
            Chart("Masked tokens", (Line("train/masked_share", "share of the tokens"),), "share", from_zero=True),
            Chart("Largest importance ratio", (Line("train/ratio_max", "maximum"),), "ratio", log=True),
        ),
    ),
    ChartGroup(
        "Rollouts",
        "rollouts",
        (
            Chart("Length", (Line("rollout/completion_tokens_mean", "sampled tokens"),), "tokens", from_zero=True),
            Chart("Truncated", (Line("rollout/truncated_share", "rollouts"),), "share", from_zero=True),
            Chart("Duration", (Line("rollout/duration_seconds", "mean"),), "seconds", from_zero=True),
            Chart(
                "Left out, by batch",
                (
                    Line("rollout/filtered_groups_count", "groups with equal rewards"),
                    Line("rollout/dropped_groups_count", "groups with too few valid rollouts"),
                    Line("rollout/stale_groups_count", "groups too old after the engine went back"),
                ),
                "groups",
                from_zero=True,
            ),
            Chart(
                "Failures, by batch and class",
                tuple(Line(f"rollout/failed_{kind}_count", str(kind), raw=True) for kind in FailureClass),
                "rollouts",
                from_zero=True,
            ),
            Chart(
                "Under way",
                (Line("rollout/running_count", "running"), Line("rollout/queued_count", "requests without a worker")),
                "rollouts",
                from_zero=True,
            ),
            Chart(
                "Ahead of the trainer",
                (
                    Line("batch/ahead_count", "batches", raw=True),
                    Line("batch/ready_groups_count", "groups that wait for a batch"),
                ),
                "count",
                from_zero=True,
            ),
        ),
    ),
    ChartGroup(
        "Speed",
        "speed",
        (
            Chart("Tokens sampled", (Line("engine/tokens_per_second", "engine"),), "tokens per second", from_zero=True),
            Chart(
                "Requests of the engine",
                (Line("engine/running_requests", "running"), Line("engine/waiting_requests", "waiting")),
                "requests",
                from_zero=True,
            ),
            Chart("KV cache", (Line("engine/kv_usage", "share of the blocks"),), "share", from_zero=True),
            Chart(
                "Rollouts trained", (Line("train/samples_per_second", "trainer"),), "samples per second", from_zero=True
            ),
            Chart(
                "Tokens of a step", (Line("train/tokens_per_second", "trainer"),), "tokens per second", from_zero=True
            ),
            Chart(
                "Seconds of a step",
                (
                    Line("train/step_seconds", "train"),
                    Line("train/wait_seconds", "wait for a batch"),
                    Line("train/broadcast_seconds", "publish weights"),
                ),
                "seconds",
                from_zero=True,
            ),
        ),
    ),
    ChartGroup(
        "SFT",
        "sft",
        (
            Chart("SFT loss", (Line("sft/loss", "loss"),), "nats per token", log=True),
            Chart("SFT gradient norm", (Line("sft/grad_norm", "before clipping"),), "norm", log=True),
            Chart("SFT learning rate", (Line("sft/lr", "learning rate", raw=True),), "", from_zero=True),
            Chart("SFT speed", (Line("sft/tokens_per_second", "trainer"),), "tokens per second", from_zero=True),
        ),
    ),
)
