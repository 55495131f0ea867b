"""What a recipe means for the orchestrator: its limits, its mixture, its identity."""

import os
from collections.abc import Mapping
from typing import Any

from hone.config.load import ConfigError
from hone.config.recipe import Recipe, RlSection
from hone.envs.environment import Environment
from hone.envs.retries import Retries
from hone.orchestrator.curriculum import curriculum_of
from hone.orchestrator.decide import Limits
from hone.orchestrator.mixture import Mixture
from hone.schema.traces import FailureClass


def limits_of(recipe: Recipe, section: RlSection) -> Limits:
    """The numbers of a recipe that decisions depend on."""
    all_in_time = (section.max_staleness + 1) * section.batch_size
    return Limits(
        groups_per_batch=section.groups_per_batch,
        group_size=section.group_size,
        max_staleness=section.max_staleness,
        num_steps=section.num_steps,
        max_concurrent=section.max_concurrent or all_in_time,
        in_flight_updates=section.in_flight_updates,
        filter_without_signal=section.filter_without_signal,
        evaluate_every=recipe.evaluation.every,
        stop_at_reward=section.stop_at_reward,
        retries=retries_of(recipe),
    )


def retries_of(recipe: Recipe) -> Retries:
    """The retry policy of a recipe."""
    return Retries({FailureClass(kind): count for kind, count in recipe.retries.model_dump().items()})


def identity_of(recipe: Recipe, section: RlSection) -> dict[str, Any]:
    """What a ledger must not change under: task order, groups and the bound."""
    return {
        "seed": recipe.run.seed,
        "environments": [environment.model_dump(mode="json") for environment in recipe.environments],
        "batch_size": section.batch_size,
        "group_size": section.group_size,
        "max_staleness": section.max_staleness,
    }


def mixture_of(recipe: Recipe, environments: Mapping[str, Environment]) -> Mixture:
    """The mixture of a recipe's environments, with the curricula that it wants."""
    seed = recipe.run.seed
    wanted = {e.name: curriculum_of(e, environments[e.name], seed) for e in recipe.environments}
    curricula = {name: curriculum for name, curriculum in wanted.items() if curriculum is not None}
    return Mixture({e.name: e.weight for e in recipe.environments}, environments, seed, curricula)


def longest_rollout_seconds(section: RlSection, environments: Mapping[str, Environment]) -> float:
    """When the worker of a rollout should have ended it: a group waits for its slowest, and is scored then."""
    group_seconds = [environment.rubric.group_seconds for environment in environments.values()]
    return section.rollout_timeout_seconds + max(group_seconds, default=0.0)


def admin_token_of(recipe: Recipe) -> str | None:
    """What the inference server's admin routes want to see, from the environment; raises `ConfigError`."""
    variable = recipe.server.admin_token_variable
    if variable is None:
        return None
    token = os.environ.get(variable)
    if token is None:
        raise ConfigError(f"environment variable {variable} (server.admin_token_variable) is not set; set it")
    return token


def metrics_port_of(recipe: Recipe) -> int | None:
    """The first port of the recipe's range is the trainer's, the next is ours."""
    first = recipe.run.metrics_port
    return None if first is None else first + 1
