"""The end of `hone run`: the table, where the run's folder and report are, how to talk with the result."""

from collections.abc import Mapping
from pathlib import Path

from hone.evals.report import comparison_table
from hone.evals.results import EvalResult
from hone.launch.console import StageConsole
from hone.studio.report import write_report
from hone.transport.folders import RunFolder


def show_results(results: Mapping[str, Mapping[str, EvalResult]], folder: Path, console: StageConsole) -> None:
    """One table for each environment with a column for each stage; the last line is for scripts."""
    run = RunFolder(folder)
    environments = dict.fromkeys(name for found in results.values() for name in found)
    for environment in environments:
        columns = {label: found[environment] for label, found in results.items()}
        console.table(comparison_table(columns, title=environment))
    best = next(path for path in (run.export, run.sft_export, run.model) if path.exists())
    console.say(f"run folder  {shown(folder)}")
    console.say(f"report      {shown(write_report(folder))}")
    console.say(f"chat        hone chat {shown(best)}")
    console.say(f"serve       hone serve {shown(best)}")
    for environment in environments:
        print(f"{folder.name}: " + last_line({label: found[environment] for label, found in results.items()}))


def last_line(columns: Mapping[str, EvalResult]) -> str:
    """`base 0.00 · sft 0.45 · rl 0.94 exact match`: exact match where the environment measures it, else the reward."""
    has_exact = all(result.score("exact") is not None for result in columns.values())
    parts = []
    for label, result in columns.items():
        estimate = result.score("exact") if has_exact else result.reward
        parts.append(f"{label} {'failed' if estimate is None else format(estimate.mean, '.2f')}")
    return " · ".join(parts) + (" exact match" if has_exact else " reward")


def shown(path: Path) -> Path:
    """Relative to the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
