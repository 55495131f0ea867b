"""Evaluate one model on the environments of a recipe, in the run's folder under evals/<label>/<environment>/."""

import contextlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from hone.config.recipe import Recipe
from hone.envs.remote import ending_processes, environment_of
from hone.envs.sampler import Sampler
from hone.envs.worker import limits_from
from hone.evals.asked import held_out_tasks, sampling_parameters
from hone.evals.evaluate import Cell, Pending, Plan, complete
from hone.evals.report import result_table
from hone.evals.results import EvalResult
from hone.evals.storage import read_result, read_settings
from hone.inference.client import ChatSampler
from hone.launch.console import StageConsole
from hone.launch.fingerprint import fingerprint
from hone.launch.service import served_sampler
from hone.schema.seeds import derive_seed
from hone.transport.folders import RunFolder

Results = dict[str, EvalResult]


async def evaluate_target(
    recipe: Recipe,
    folder: Path,
    console: StageConsole,
    target: str | None,
    *,
    name: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    pending: Pending = Pending.BOTH,
) -> Results:
    """Evaluate a model folder, an http address, or (None) the newest policy of the run, and show the tables."""
    run = RunFolder(folder)
    if target is not None and target.startswith(("http://", "https://")):
        if model is None:
            raise ValueError(f"give --model: which of the models at {target} shall be evaluated?")
        plans = plans_of(recipe, run, name or label_of(model), model=model, source=f"{model} at {target}")
        deadline_seconds = limits_from(recipe).deadline_seconds
        async with ChatSampler(target, model, api_key, deadline_seconds=deadline_seconds) as sampler:
            results = await _evaluate(plans, sampler, recipe, console, pending)
    else:
        weights = Path(target) if target is not None else newest_policy(run)
        label = name or label_of(str(weights.absolute()))
        results = await evaluate_weights(recipe, run, weights, label, console, pending)
    for result in results.values():
        console.table(result_table(result))
    return results


async def evaluate_weights(
    recipe: Recipe, run: RunFolder, weights: Path, label: str, console: StageConsole, pending: Pending = Pending.BOTH
) -> Results:
    """Serve the weights, evaluate them; results that are there already are read."""
    check_model_folder(weights)
    plans = plans_of(recipe, run, label, model=label, source=fingerprint(weights))
    if found := finished(plans):
        return found
    set_other_settings_aside(plans, run.evals / label)
    deadline_seconds = limits_from(recipe).deadline_seconds
    async with served_sampler(recipe, run, weights, deadline_seconds=deadline_seconds, show=console.show) as sampler:
        return await _evaluate(plans, sampler, recipe, console, pending)


def plans_of(recipe: Recipe, run: RunFolder, label: str, *, model: str, source: str) -> dict[str, Plan]:
    """What the recipe asks of a model, by environment."""
    if not recipe.environments:
        raise ValueError("the recipe lists no [[environments]]; there is nothing to evaluate on")
    section = recipe.evaluation
    return {
        environment.name: Plan(
            environment=environment_of(environment),
            num_tasks=section.num_tasks,
            attempts=section.num_attempts,
            sampling=sampling_parameters(section.sampling),
            seed=derive_seed(recipe.run.seed, "evaluation"),
            limits=limits_from(recipe),
            arguments=environment.arguments,
            folder=run.evals / label / environment.name,
            model=model,
            source=source,
        )
        for environment in recipe.environments
    }


def finished(plans: dict[str, Plan]) -> Results:
    """The results in the folders of the plans when all are there, as asked and without a failure; else nothing."""
    results: Results = {}
    for name, plan in plans.items():
        assert plan.folder is not None
        with contextlib.suppress(ValueError, OSError):
            result = read_result(plan.folder)
            if read_settings(plan.folder) == plan.settings and _is_as_asked(result, plan):
                results[name] = result
    return results if len(results) == len(plans) else {}


def set_other_settings_aside(plans: dict[str, Plan], results: Path) -> None:
    """Keep results that were made otherwise than is asked now under another name: they cannot be gone on with."""
    for plan in plans.values():
        assert plan.folder is not None
        with contextlib.suppress(ValueError, OSError):
            if read_settings(plan.folder) != plan.settings:
                names = (results.with_name(f"{results.name}-{number}") for number in itertools.count(1))
                results.rename(next(name for name in names if not name.exists()))
                return


def newest_policy(run: RunFolder) -> Path:
    """The best that a run has: its export, else the newest weights, else the SFT result, else the base model."""
    if run.export.exists():
        return run.export
    _, newest = run.newest_weights()
    if not newest.exists():
        raise ValueError(f"{run.path} holds no model yet; train one with `hone run`, or give another --run.name")
    return newest


def check_model_folder(folder: Path) -> None:
    """Raise `ValueError` for a folder without a model."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no model in the Hugging Face layout: it holds no config.json")


def label_of(text: str) -> str:
    """A folder's name made from a model's name or path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "model"


async def _evaluate(
    plans: dict[str, Plan], sampler: Sampler, recipe: Recipe, console: StageConsole, pending: Pending
) -> Results:
    """Every environment of the recipe in turn, with a progress bar each."""
    async with ending_processes(plan.environment for plan in plans.values()):
        return {
            name: await _evaluate_one(plan, sampler, recipe, console, pending, _title(plan, list(plans)))
            for name, plan in plans.items()
        }


def _title(plan: Plan, environments: Sequence[str]) -> str:
    assert plan.folder is not None
    label, name = plan.folder.parts[-2:]
    return f"eval {label}" if len(environments) == 1 else f"eval {label} {name}"


async def _evaluate_one(
    plan: Plan, sampler: Sampler, recipe: Recipe, console: StageConsole, pending: Pending, title: str
) -> EvalResult:
    with Cell(plan) as cell, console.counting(title, cell.progress.num_total) as update:

        def show(cell: Cell) -> None:
            progress = cell.progress
            update(progress.num_done, progress.num_total, f"reward {progress.mean_reward:.3f}")

        show(cell)
        max_concurrent = recipe.evaluation.max_concurrent
        await complete([cell], sampler, max_concurrent=max_concurrent, pending=pending, progress=show)
        return cell.conclude()


def _is_as_asked(result: EvalResult, plan: Plan) -> bool:
    if result.failures or result.attempts != plan.attempts:
        return False
    tasks = held_out_tasks(plan.environment, plan.num_tasks, plan.environment.name)
    return result.num_rollouts == len(tasks) * plan.attempts
