"""The end of `hone run` and of `hone eval`: the tables, where folder and report are, what to do with the result."""

from collections.abc import Mapping
from pathlib import Path

from hone.evals.report import UNFINISHED, comparison_table, rows_of, shown_estimate
from hone.evals.results import EvalResult
from hone.launch.board import Board
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


def show_matrix(results: Mapping[tuple[str, str], EvalResult], folder: Path, board: Board) -> None:
    """One table for each environment with a column for each model; the lines on standard output are for scripts."""
    models = list(dict.fromkeys(model for model, _ in results))
    for environment in dict.fromkeys(environment for _, environment in results):
        columns = {model: results[model, environment] for model in models}
        board.console.print(comparison_table(columns, title=environment))
    if any(result.num_failed for result in results.values()):
        board.say("failed rollouts run again with --retry-failures")
    if len(models) > 1:
        board.say(f"compare     hone eval compare {shown(folder / models[0])} {shown(folder / models[1])}")
    board.say(f"report      hone eval report {shown(folder)}")
    for (model, environment), result in results.items():
        print(f"{model} on {environment}: {_line(result)}")


def _line(result: EvalResult) -> str:
    scores = {name: estimate for name, estimate in rows_of(result).items() if name.startswith(("reward (", "pass"))}
    told = [f"{name} {' '.join(shown_estimate(estimate))}" for name, estimate in scores.items()]
    told += [f"{result.num_failed} of {result.num_wanted} failed"]
    return " · ".join(told if result.shortcoming is None else [f"{UNFINISHED} ({result.shortcoming})", *told])


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
