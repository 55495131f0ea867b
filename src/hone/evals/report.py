"""Results of evaluations as tables for the terminal."""

from collections.abc import Mapping

from rich.table import Table

from hone.evals.results import EvalResult
from hone.evals.statistics import CONFIDENCE, Estimate


def result_table(result: EvalResult) -> Table:
    """One result: a line for each number, with its confidence interval."""
    model = f" · {result.model}" if result.model else ""
    table = Table(title=f"{result.environment} {result.environment_version}{model}", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_column(f"{CONFIDENCE:.0%} interval", justify="right")
    table.add_column("tasks", justify="right")
    for name, estimate in rows_of(result).items():
        table.add_row(name, f"{estimate.mean:.3f}", _interval(estimate), str(estimate.num_tasks))
    for name, count in result.failures.items():
        table.add_row(f"failed: {name}", f"{count} of {result.num_rollouts}", "", "")
    return table


def comparison_table(results: Mapping[str, EvalResult], title: str = "") -> Table:
    """Several results side by side, one column for each label; numbers that only some have stay empty for the others."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("score")
    for label in results:
        table.add_column(label, justify="right")
    rows = {label: rows_of(result) for label, result in results.items()}
    for name in dict.fromkeys(name for named in rows.values() for name in named):
        table.add_row(name, *(_cell(named.get(name)) for named in rows.values()))
    for name in dict.fromkeys(name for result in results.values() for name in result.failures):
        counts = (f"{result.failures.get(name, 0)} of {result.num_rollouts}" for result in results.values())
        table.add_row(f"failed: {name}", *counts)
    return table


def rows_of(result: EvalResult) -> dict[str, Estimate]:
    """The estimates of a result by the name they are shown under, most important first."""
    rows: dict[str, Estimate | None] = {f"reward (avg@{result.attempts})": result.reward}
    if len(result.rewards) > 1:
        rows |= {f"reward {name}": estimate for name, estimate in result.rewards.items()}
    rows |= dict(result.metrics)
    rows |= {f"pass@{k}": estimate for k, estimate in result.pass_at.items()}
    rows |= {"truncated": result.truncated, "completion tokens": result.completion_tokens}
    return {name: estimate for name, estimate in rows.items() if estimate is not None}


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.mean:.3f} {_interval(estimate)}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "unknown"
    return f"{estimate.low:.3f} – {estimate.high:.3f}"
