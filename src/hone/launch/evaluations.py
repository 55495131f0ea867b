"""Evaluate one model on the environments of a recipe, in the run's folder under evals/<label>/<environment>/."""

import contextlib
import itertools
import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from hone.config.recipe import EnvironmentSection, Recipe, SamplingSection
from hone.envs.registry import load_environment
from hone.envs.sampler import Sampler
from hone.envs.worker import limits_from
from hone.evals.evaluate import Progress, evaluate, held_out_tasks
from hone.evals.report import result_table
from hone.evals.results import EvalResult
from hone.evals.storage import Settings, read_result
from hone.inference.client import ChatSampler, TokenChannel, TokenSampler
from hone.launch.console import StageConsole, Update
from hone.launch.service import inference_server
from hone.launch.supervise import Supervisor
from hone.schema.sampling import SamplingParameters
from hone.schema.seeds import derive_seed
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
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
) -> Results:
    """Evaluate a model folder, an http address, or (None) the newest policy of the run, and show the tables."""
    run = RunFolder(folder)
    if target is not None and target.startswith(("http://", "https://")):
        if model is None:
            raise ValueError(f"give --model: which of the models at {target} shall be evaluated?")
        async with ChatSampler(target, model, api_key) as sampler:
            results = await evaluate_with(sampler, recipe, run, name or label_of(model), console, model=model)
    else:
        weights = Path(target) if target is not None else newest_policy(run)
        if not (weights / "config.json").exists():
            raise ValueError(f"{weights} is no model in the Hugging Face layout: it holds no config.json")
        results = await evaluate_weights(recipe, run, weights, name or label_of(str(weights.absolute())), console)
    for result in results.values():
        console.table(result_table(result))
    return results


async def evaluate_weights(recipe: Recipe, run: RunFolder, weights: Path, label: str, console: StageConsole) -> Results:
    """Serve the weights, evaluate them; results that are there already are read."""
    if found := finished(recipe, run, label):
        return found
    set_other_sampling_aside(recipe, run.evals / label)
    async with _engine(recipe, run, weights, console) as sampler:
        return await evaluate_with(sampler, recipe, run, label, console, model=label)


async def evaluate_with(
    sampler: Sampler, recipe: Recipe, run: RunFolder, label: str, console: StageConsole, *, model: str
) -> Results:
    """Every environment of the recipe in turn, with a progress bar each."""
    if not recipe.environments:
        raise ValueError("the recipe lists no [[environments]]; there is nothing to evaluate on")
    section = recipe.evaluation
    results: Results = {}
    for environment in recipe.environments:
        loaded = load_environment(environment.name, **environment.arguments)
        title = f"eval {label}" if len(recipe.environments) == 1 else f"eval {label} {environment.name}"
        with console.counting(title, section.num_tasks * section.attempts) as update:

            def show(progress: Progress, update: Update = update) -> None:
                update(progress.num_done, progress.num_total, f"reward {progress.mean_reward:.3f}")

            results[environment.name] = await evaluate(
                loaded,
                sampler,
                num_tasks=section.num_tasks,
                attempts=section.attempts,
                sampling=sampling_parameters(section.sampling),
                seed=derive_seed(recipe.run.seed, "evaluation"),
                max_concurrent=section.max_concurrent,
                limits=limits_from(recipe),
                folder=run.evals / label / environment.name,
                model=model,
                progress=show,
            )
    return results


def finished(recipe: Recipe, run: RunFolder, label: str) -> Results:
    """The results under a label when all environments have one that was made as the recipe asks; else nothing."""
    results: Results = {}
    for environment in recipe.environments:
        with contextlib.suppress(ValueError, OSError):
            folder = run.evals / label / environment.name
            result = read_result(folder)
            if _is_as_asked(result, _settings(folder), recipe, environment):
                results[environment.name] = result
    return results if len(results) == len(recipe.environments) else {}


def set_other_sampling_aside(recipe: Recipe, results: Path) -> None:
    """Keep results that were sampled otherwise than the recipe asks now under another name: they cannot be gone on with."""
    for environment in recipe.environments:
        with contextlib.suppress(ValueError, OSError):
            if _settings(results / environment.name).sampling != sampling_parameters(recipe.evaluation.sampling):
                names = (results.with_name(f"{results.name}-{number}") for number in itertools.count(1))
                results.rename(next(name for name in names if not name.exists()))
                return


def _is_as_asked(result: EvalResult, made: Settings, recipe: Recipe, environment: EnvironmentSection) -> bool:
    section = recipe.evaluation
    if result.failures or result.attempts != section.attempts:
        return False
    if (made.sampling, made.seed) != (
        sampling_parameters(section.sampling),
        derive_seed(recipe.run.seed, "evaluation"),
    ):
        return False
    tasks = held_out_tasks(load_environment(environment.name, **environment.arguments), section.num_tasks)
    return result.num_rollouts == len(tasks) * section.attempts


def _settings(folder: Path) -> Settings:
    return msgspec.json.decode((folder / "settings.json").read_bytes(), type=Settings)


def sampling_parameters(section: SamplingSection) -> SamplingParameters:
    """The recipe's sampling as an engine takes it; the seeds of turns are derived by the rollout."""
    return SamplingParameters(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        max_tokens=section.max_tokens,
    )


def newest_policy(run: RunFolder) -> Path:
    """The best that a run has: its export, else the newest weights, else the SFT result, else the base model."""
    if run.export.exists():
        return run.export
    _, newest = run.newest_weights()
    if not newest.exists():
        raise ValueError(f"{run.path} holds no model yet; train one with `hone run`, or give another --run.name")
    return newest


def label_of(text: str) -> str:
    """A folder's name made from a model's name or path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "model"


@contextlib.asynccontextmanager
async def _engine(recipe: Recipe, run: RunFolder, weights: Path, console: StageConsole) -> AsyncIterator[Sampler]:
    supervisor = Supervisor(run.path, recipe.run.max_restarts, console.show)
    own_tokenizer = (weights / "tokenizer.json").is_file()
    renderer = Renderer(Tokenizer.load(weights if own_tokenizer else run.model))
    async with (
        inference_server(recipe, run, supervisor, weights) as addresses,
        TokenChannel(addresses.tokens) as channel,
    ):
        yield TokenSampler(channel, renderer, deadline_seconds=limits_from(recipe).deadline_seconds)
