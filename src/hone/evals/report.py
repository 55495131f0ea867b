"""Results of evaluations as tables for the terminal."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from hone.evals.comparison import Comparison, Difference
from hone.evals.results import EvalResult
from hone.evals.statistics import CONFIDENCE, Estimate

UNFINISHED = "NOT FINISHED"


def result_table(result: EvalResult) -> Table:
    """One result: a line for each number, with its confidence interval."""
    model = f" · {result.model}" if result.model else ""
    table = Table(title=f"{result.environment} {result.environment_version}{model}", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_column(f"{CONFIDENCE:.0%} interval", justify="right")
    table.add_column("std. error", justify="right")
    table.add_column("tasks", justify="right")
    if result.shortcoming is not None:
        table.add_row(Text(UNFINISHED, style="bold red"), result.shortcoming, "", "", "")
    for name, estimate in rows_of(result).items():
        error = "" if estimate.standard_error is None else f"{estimate.standard_error:.3f}"
        table.add_row(name, *shown_estimate(estimate), error, str(estimate.num_tasks))
    for name, count in result.failures.items():
        table.add_row(f"failed: {name}", f"{count} of {result.num_rollouts}", "", "", "")
    for name, value in usage_of(result).items():
        table.add_row(name, value, "", "", "")
    return table


def comparison_table(results: Mapping[str, EvalResult], title: str = "") -> Table:
    """Several results side by side, one column for each label; numbers that only some have stay empty for the others."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("score")
    for label in results:
        table.add_column(label, justify="right")
    if any(result.shortcoming is not None for result in results.values()):
        shortcomings = (result.shortcoming or "" for result in results.values())
        table.add_row(Text(UNFINISHED, style="bold red"), *shortcomings)
    rows = {label: rows_of(result) for label, result in results.items()}
    for name in dict.fromkeys(name for named in rows.values() for name in named):
        table.add_row(name, *(_cell(named.get(name)) for named in rows.values()))
    for name in dict.fromkeys(name for result in results.values() for name in result.failures):
        counts = (f"{result.failures.get(name, 0)} of {result.num_rollouts}" for result in results.values())
        table.add_row(f"failed: {name}", *counts)
    used = {label: usage_of(result) for label, result in results.items()}
    for name in dict.fromkeys(name for named in used.values() for name in named):
        table.add_row(name, *(named.get(name, "") for named in used.values()))
    return table


def difference_table(comparisons: Mapping[str, Comparison], first: str, second: str) -> Table:
    """Paired differences by environment: `second` minus `first`, on the tasks that both attempted."""
    table = Table(title=f"{second} minus {first}", title_justify="left")
    for name in ("environment", "score"):
        table.add_column(name)
    for name in (
        first,
        second,
        "difference",
        f"{CONFIDENCE:.0%} interval",
        "std. error",
        "p",
        "tasks",
        "lost",
        "gained",
    ):
        table.add_column(name, justify="right")
    for environment, comparison in comparisons.items():
        gained = sum(flip.is_gained for flip in comparison.flips)
        flips = {"reward": ("", ""), "solved": (str(len(comparison.flips) - gained), str(gained))}
        for score, difference in (("reward", comparison.reward), ("solved", comparison.solved)):
            cells = ["", "", "no task in common", "", "", "", "0"] if difference is None else _difference(difference)
            table.add_row(environment, score, *cells, *flips[score])
    return table


def flip_table(
    environment: str, comparison: Comparison, prompts: Mapping[str, str], names: tuple[str, str], max_flips: int
) -> Table:
    """The tasks that one model solves most of the time and the other does not, lost ones first."""
    left_out = len(comparison.flips) - max_flips
    title = f"{environment}: flipped tasks" + (
        f" (the first {max_flips} of {len(comparison.flips)})" if left_out > 0 else ""
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("task")
    table.add_column(f"solved by {names[0]}", justify="right")
    table.add_column(f"by {names[1]}", justify="right")
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    for flip in comparison.flips[:max_flips]:
        fate = Text("gained", style="green") if flip.is_gained else Text("lost", style="red")
        prompt = Text(" ".join(prompts.get(flip.task, "").split()))
        table.add_row(fate, flip.task, f"{flip.first:.0%}", f"{flip.second:.0%}", prompt)
    return table


def rows_of(result: EvalResult) -> dict[str, Estimate]:
    """The estimates of a result by the name they are shown under, most important first."""
    rows: dict[str, Estimate | None] = {f"reward (avg@{result.attempts})": result.reward}
    if len(result.rewards) > 1:
        rows |= {f"reward {name}": estimate for name, estimate in result.rewards.items()}
    rows |= dict(result.metrics)
    rows |= {f"pass@{k}": estimate for k, estimate in result.pass_at.items()}
    rows |= {f"pass^{k}": estimate for k, estimate in result.pass_all.items() if k > 1}  # pass^1 is pass@1
    rows |= {"truncated": result.truncated, "completion tokens": result.completion_tokens}
    return {name: estimate for name, estimate in rows.items() if estimate is not None}


def usage_of(result: EvalResult) -> dict[str, str]:
    """What the rollouts used, by the name it is shown under; empty where the endpoint does not tell."""
    usage = result.usage
    if not usage.prompt and not usage.completion:
        return {}
    told = {"tokens in, out": f"{usage.prompt:,}, {usage.completion:,}"}
    return told if result.cost is None else told | {"cost": f"{result.cost:,.2f}"}


def shown_estimate(estimate: Estimate) -> tuple[str, str]:
    """The mean and the interval as text."""
    return f"{estimate.mean:.3f}", _interval(estimate.low, estimate.high)


def _difference(found: Difference) -> list[str]:
    error = "" if found.standard_error is None else f"{found.standard_error:.3f}"
    interval = _interval(found.low, found.high, "+")
    means = [f"{found.first:.3f}", f"{found.second:.3f}", f"{found.mean:+.3f}"]
    return [*means, interval, error, shown_p_value(found.p_value), str(found.num_tasks)]


def shown_p_value(value: float) -> str:
    """A p-value as text."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else " ".join(shown_estimate(estimate))


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "unknown" if low is None or high is None else f"{low:{sign}.3f} – {high:{sign}.3f}"
