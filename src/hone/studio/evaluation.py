"""The report of an evaluation: one HTML file with scores, curves, paired differences, failures and traces to read."""

import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from statistics import quantiles
from typing import Any

from hone.evals.comparison import Comparison, Difference, compare
from hone.evals.folders import FoundCell, find_cells, is_comparable
from hone.evals.report import shown_estimate, shown_p_value
from hone.evals.statistics import CONFIDENCE, Estimate, estimate_pass_all, estimate_pass_at
from hone.observability.machine import read_machine
from hone.studio.browser import Browser, browser_of
from hone.studio.page import embedded, inlined, plotly, template, write_page
from hone.studio.report import Fact
from hone.studio.scores import ORDER, Score, scores_of_result

MAX_PAIRED_MODELS = 6
"""With more models, only the first is compared with each of the others: pairs grow with the square."""
MAX_FLIPS = 50
MAX_PROMPT = 200
MAX_K = 64


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on one environment."""

    first: str
    second: str
    environment: str
    found: Comparison


@dataclass(frozen=True, slots=True)
class Reward:
    """The headline of one cell, ready to be read."""

    value: str
    interval: str
    is_finished: bool


@dataclass(frozen=True, slots=True)
class Trouble:
    """Failures of one class in one cell, with what was said most often."""

    model: str
    environment: str
    failure: str
    message: str
    count: int


def write_evaluation_report(folder: Path, output: Path | None = None, *, max_traces: int = 5000) -> Path:
    """Write the report of all results in a folder to `output`, by default report.html in it; returns where it is.

    An evaluation that was interrupted, or still runs, is reported with what is there, and marked as not finished.
    """
    cells = _in_order(find_cells(folder), folder)
    return write_page(output or folder / "report.html", render(folder, cells, max_traces))


def render(folder: Path, cells: Sequence[FoundCell], max_traces: int) -> str:
    """The page as text."""
    browser = browser_of(cells, max_traces)
    pairs = list(_pairs(cells))
    models = list(dict.fromkeys(cell.model for cell in cells))
    environments = list(dict.fromkeys(cell.environment for cell in cells))
    return template("evaluation.html.j2").render(
        name=folder.resolve().name,
        status=f"Evaluation of {_counted(len(models), 'model')} on {_counted(len(environments), 'environment')}",
        facts=_facts(cells),
        unfinished=[(cell.model, cell.environment, cell.shortcoming) for cell in cells if cell.shortcoming is not None],
        confidence=f"{CONFIDENCE:.0%}",
        rewards={(cell.model, cell.environment): _reward(cell) for cell in cells},
        scores=_scores(cells),
        several_attempts=[
            name for name in environments if max(c.result.attempts for c in cells if c.environment == name) > 1
        ],
        firsts=list(dict.fromkeys(pair.first for pair in pairs)),
        troubles=list(_troubles(cells)),
        models=models,
        environments=environments,
        num_traces=len(browser.rows),
        num_left_out=browser.num_left_out,
        config=_config(folder),
        machine=_machine(folder),
        data=embedded(_drawn(cells, pairs, browser)),
        css=inlined("report.css", "evaluation.css"),
        javascript=inlined("plots.js", "evaluation.js", "browser.js"),
        plotly=plotly(),
    )


def _in_order(cells: list[FoundCell], folder: Path) -> list[FoundCell]:
    """The models in the order of the evaluation file, or of a run's stages."""
    named = [model["name"] for model in tomllib.loads(_config(folder)).get("models", ())] or list(ORDER)
    return sorted(
        cells, key=lambda c: (named.index(c.model) if c.model in named else len(named), c.model, c.environment)
    )


def _facts(cells: Sequence[FoundCell]) -> list[Fact]:
    results = [cell.result for cell in cells]
    num_rollouts, num_failed = sum(r.num_rollouts for r in results), sum(r.num_failed for r in results)
    facts = [Fact("rollouts", f"{num_rollouts:,}"), Fact("failed", f"{num_failed:,}")]
    prompt, completion = sum(r.usage.prompt for r in results), sum(r.usage.completion for r in results)
    if prompt or completion:
        facts += [Fact("tokens in", f"{prompt:,}"), Fact("tokens out", f"{completion:,}")]
    costs = [result.cost for result in results if result.cost is not None]
    return facts + ([Fact("cost", f"{sum(costs):,.2f}")] if costs else [])


def _reward(cell: FoundCell) -> Reward:
    estimate = cell.result.reward
    value, interval = ("no score", "") if estimate is None else shown_estimate(estimate)
    return Reward(value, interval, cell.shortcoming is None)


def _scores(cells: Sequence[FoundCell]) -> list[Score]:
    """The rows of all cells, models that compare beside one another."""
    scores = [
        replace(score, environment=cell.environment)
        for cell in cells
        for score in scores_of_result(cell.model, cell.result)
        if not score.score.startswith("failed: ")
    ]
    places = {key: place for place, key in enumerate(dict.fromkeys((s.environment, s.score) for s in scores))}
    environments = {name: place for place, name in enumerate(dict.fromkeys(s.environment for s in scores))}
    return sorted(scores, key=lambda s: (environments[s.environment], places[s.environment, s.score]))


def _pairs(cells: Sequence[FoundCell]) -> Iterator[Paired]:
    by_environment: defaultdict[str, list[FoundCell]] = defaultdict(list)
    for cell in cells:
        by_environment[cell.environment].append(cell)
    for environment, own in by_environment.items():
        among = list(permutations(own, 2)) if len(own) <= MAX_PAIRED_MODELS else [(own[0], other) for other in own[1:]]
        for first, second in among:
            if is_comparable(first, second):
                yield Paired(first.model, second.model, environment, compare(first.outcomes, second.outcomes))


def _troubles(cells: Sequence[FoundCell]) -> Iterator[Trouble]:
    for cell in cells:
        messages = cell.failure_messages() if cell.result.num_failed else {}
        for failure, count in cell.result.failures.items():
            said = Counter(messages.get(failure, ())).most_common(1)
            yield Trouble(cell.model, cell.environment, failure, said[0][0] if said else "", count)


def _config(folder: Path) -> str:
    path = folder / "evaluation.toml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _machine(folder: Path) -> dict[str, str]:
    path = folder / "machine.json"
    return read_machine(path) if path.is_file() else {}


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _drawn(cells: Sequence[FoundCell], pairs: Sequence[Paired], browser: Browser) -> dict[str, Any]:
    """What the page's scripts draw and list."""
    return {
        "cells": [
            {
                "model": cell.model,
                "environment": cell.environment,
                "is_finished": cell.shortcoming is None,
                "reward": None if cell.result.reward is None else _point(cell.result.reward),
                "curves": _curves(cell),
                "lengths": _box([o.num_completion_tokens for o in cell.outcomes if o.failure is None]),
                "endings": cell.result.stop_reasons | {f"failed: {n}": c for n, c in cell.result.failures.items()},
            }
            for cell in cells
        ],
        "pairs": [_pair(pair, cells) for pair in pairs],
        "traces": browser.data(),
    }


def _point(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}


def _curves(cell: FoundCell) -> dict[str, list[dict[str, Any]]]:
    """pass@k and pass^k for every k up to the attempts."""
    tasks: defaultdict[str, list[bool]] = defaultdict(list)
    for outcome in cell.outcomes:
        if outcome.failure is None:
            tasks[outcome.task].append(outcome.is_solved)
    ks = range(1, min(cell.result.attempts, MAX_K) + 1)
    curves = {}
    for name, estimate_of in (("pass@k", estimate_pass_at), ("pass^k", estimate_pass_all)):
        estimates = ((k, estimate_of(k, tasks.values())) for k in ks)
        curves[name] = [{"k": k, **_point(estimate)} for k, estimate in estimates if estimate is not None]
    return curves


def _box(values: Sequence[int]) -> list[float] | None:
    """Minimum, quartiles and maximum."""
    if not values:
        return None
    inner = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [float(values[0])] * 3
    return [min(values), *inner, max(values)]


def _pair(pair: Paired, cells: Sequence[FoundCell]) -> dict[str, Any]:
    place = {(cell.model, cell.environment): cell for cell in cells}
    prompts = place[pair.first, pair.environment].prompts() if pair.found.flips else {}
    return {
        "first": pair.first,
        "second": pair.second,
        "environment": pair.environment,
        "reward": _shown_difference(pair.found.reward),
        "solved": _shown_difference(pair.found.solved),
        "num_lost": sum(not flip.is_gained for flip in pair.found.flips),
        "num_gained": sum(flip.is_gained for flip in pair.found.flips),
        "flips": [
            asdict(flip) | {"prompt": " ".join(prompts.get(flip.task, "").split())[:MAX_PROMPT]}
            for flip in pair.found.flips[:MAX_FLIPS]
        ],
    }


def _shown_difference(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "p": shown_p_value(found.p_value),
        "num_tasks": found.num_tasks,
    }
