"""Every model of an evaluation file on every environment, in the folder <model>/<environment>/ of the evaluation."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hone.config.evaluation import EvaluatedEnvironment, EvaluatedModel, EvaluationFile
from hone.config.load import load_recipe, recipe_from, save_recipe
from hone.config.recipe import Recipe, RunSection, ServerSection
from hone.envs.remote import ending_processes, environment_of
from hone.envs.rollout import Limits
from hone.envs.sampler import Sampler
from hone.evals.asked import sampling_parameters
from hone.evals.evaluate import Cell, Pending, Plan, complete
from hone.evals.results import EvalResult, Prices
from hone.inference.client import ChatSampler
from hone.launch.board import MAX_MESSAGES, Board, Place
from hone.launch.evaluations import check_model_folder, newest_policy
from hone.launch.fingerprint import fingerprint
from hone.launch.service import served_sampler
from hone.observability.machine import save_machine
from hone.schema.seeds import derive_seed
from hone.transport.folders import RunFolder

CONFIG = "evaluation.toml"
SERVERS = ".servers"
"""Where the servers of models have their logs and addresses, inside the evaluation's folder."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What is behind a model's name, and how it is reached: `open` serves it, if need be, for as long as it is used."""

    identity: str
    is_served: bool
    open: Callable[[], contextlib.AbstractAsyncContextManager[Sampler]]


async def evaluate_file(tree: EvaluationFile, board: Board, pending: Pending) -> dict[Place, EvalResult]:
    """Run what is pending and conclude every cell.

    Models behind addresses run at the same time; those that are served from here run one after the other beside them.
    """
    # Everything that can be known to be wrong is found before the first rollout.
    sources = {model.name: _source(model, tree, board) for model in tree.models}
    plans = {Place(*names): plan for names, plan in _plans(tree, sources)}
    with contextlib.ExitStack() as held:
        cells = {place: held.enter_context(Cell(plan)) for place, plan in plans.items()}
        save_recipe(tree, tree.folder / CONFIG)
        save_machine(tree.folder / "machine.json")
        environments = {plan.environment for plan in plans.values()}
        async with ending_processes(environments), board.showing(cells), asyncio.TaskGroup() as running:
            served = [model for model in tree.models if sources[model.name].is_served]
            for model in tree.models:
                if model not in served:
                    running.create_task(_evaluate_models([model], tree, sources, cells, pending))
            running.create_task(_evaluate_models(served, tree, sources, cells, pending))
        for place, cell in cells.items():
            _tell_failures(place, cell, board)
        return {place: cell.conclude() for place, cell in cells.items()}


async def _evaluate_models(
    models: list[EvaluatedModel],
    tree: EvaluationFile,
    sources: Mapping[str, _Source],
    cells: Mapping[Place, Cell],
    pending: Pending,
) -> None:
    for model in models:
        own = [cell for place, cell in cells.items() if place.model == model.name]
        if any(cell.pending(pending) for cell in own):
            max_concurrent = model.max_concurrent or tree.evaluation.max_concurrent
            async with sources[model.name].open() as sampler:
                await complete(own, sampler, max_concurrent=max_concurrent, pending=pending)


def _plans(tree: EvaluationFile, sources: Mapping[str, _Source]) -> Iterator[tuple[tuple[str, str], Plan]]:
    loaded = {asked.shown: environment_of(asked) for asked in tree.environments}
    for model in tree.models:
        prices = model.prices
        for asked in tree.environments:
            yield (
                (model.name, asked.shown),
                Plan(
                    environment=loaded[asked.shown],
                    num_tasks=asked.num_tasks or tree.evaluation.num_tasks,
                    attempts=asked.num_attempts or tree.evaluation.num_attempts,
                    sampling=sampling_parameters(tree.sampling_of(asked)),
                    seed=derive_seed(tree.run.seed, "evaluation"),
                    limits=limits_of(asked),
                    arguments=asked.arguments,
                    folder=tree.folder / model.name / asked.shown,
                    model=model.name,
                    source=sources[model.name].identity,
                    prices=None if prices is None else Prices(prices.prompt, prices.completion, prices.cached),
                    max_failed_share=tree.evaluation.max_failed_share,
                ),
            )


def limits_of(environment: EvaluatedEnvironment) -> Limits:
    """The limits that an evaluation file sets for the rollouts of an environment."""
    section = environment.limits
    return Limits(
        max_turns=section.max_turns,
        max_tool_calls=section.max_tool_calls,
        max_tokens=section.max_tokens,
        budget_seconds=section.budget_seconds,
        deadline_seconds=section.deadline_seconds,
    )


def _source(model: EvaluatedModel, tree: EvaluationFile, board: Board) -> _Source:
    deadline_seconds = max(environment.limits.deadline_seconds for environment in tree.environments)
    if model.address is not None:
        name, key = model.model or model.name, _api_key(model)
        address = model.address.rstrip("/")
        return _Source(
            f"{name} at {address}",
            is_served=False,
            open=lambda: ChatSampler(address, name, key, deadline_seconds=deadline_seconds),
        )
    recipe, weights, base = _recipe_and_weights(model)
    check_model_folder(weights)
    scratch = RunFolder(tree.folder.absolute() / SERVERS / model.name)
    return _Source(
        fingerprint(weights),
        is_served=True,
        open=lambda: _served(recipe, weights, base, scratch, deadline_seconds, board),
    )


def _api_key(model: EvaluatedModel) -> str | None:
    if model.api_key_variable is None:
        return None
    key = os.environ.get(model.api_key_variable)
    if not key:
        raise ValueError(f"model {model.name!r}: the environment variable {model.api_key_variable} is not set")
    return key


def _recipe_and_weights(model: EvaluatedModel) -> tuple[Recipe, Path, Path]:
    """How to serve a model, its weights, and the folder whose tokenizer they have if they have none of their own."""
    if model.recipe is not None:
        recipe = load_recipe(model.recipe)
        run = RunFolder(recipe.folder.absolute())
        return recipe, newest_policy(run), run.model
    assert model.path is not None  # the file's own rule
    path = model.path.absolute()
    return recipe_from({"model": {"path": str(path)}}, str(path)), path, path


@contextlib.asynccontextmanager
async def _served(
    recipe: Recipe, weights: Path, base: Path, scratch: RunFolder, deadline_seconds: float, board: Board
) -> AsyncIterator[Sampler]:
    """Serve weights from a folder of our own: the run's may be in use, and so may its ports."""
    scratch.path.mkdir(parents=True, exist_ok=True)
    scratch.model.unlink(missing_ok=True)
    scratch.model.symlink_to(base)
    own = {"run": RunSection(name=scratch.path.name, folder=scratch.path.parent), "server": ServerSection()}
    recipe = recipe.model_copy(update=own)
    save_recipe(recipe, scratch.config)
    board.say(f"serving {weights}")
    async with served_sampler(recipe, scratch, weights, deadline_seconds=deadline_seconds, show=board.show) as sampler:
        yield sampler


def _tell_failures(place: Place, cell: Cell, board: Board) -> None:
    counted = Counter(cell.failure_messages())
    for message, count in counted.most_common(MAX_MESSAGES):
        board.say(f"{place}: {count:,} failed, {message[:300]}")
