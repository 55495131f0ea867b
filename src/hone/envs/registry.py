"""Installed environment packages by name: `load_environment` finds the entry point and calls it."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hone.envs.environment import Environment

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

GROUP = "hone.environments"


class EnvironmentLoadError(ValueError):
    """An environment that cannot be loaded; the message names it and says what to do."""


def load_environment(name: str, **arguments: Any) -> Environment:
    """The environment that an installed package provides under `name`, made with these arguments.

    Packages declare it in their pyproject.toml::

        [project.entry-points."hone.environments"]
        reverse_text = "hone_reverse_text:load_environment"
    """
    entry = _entry(name)
    environment = _made(name, _loaded(name, entry), arguments)
    if not environment.version and entry.dist is not None:
        environment.version = entry.dist.version
    return environment


def installed_environments() -> list[str]:
    """The names that `load_environment` knows here."""
    return sorted({entry.name for entry in _entries()})


def _entries() -> "EntryPoints":
    from importlib.metadata import entry_points  # a quarter of the time that `import hone.envs` would take

    return entry_points(group=GROUP)


def _entry(name: str) -> "EntryPoint":
    wanted = name.replace("-", "_")
    found = [entry for entry in _entries() if entry.name.replace("-", "_") == wanted]
    if not found:
        known = ", ".join(installed_environments()) or "none"
        raise EnvironmentLoadError(
            f"environment {name!r} is not installed (installed: {known}); install its package with pip"
        )
    owners = sorted({entry.value for entry in found})
    if len(owners) > 1:
        raise EnvironmentLoadError(
            f"environment {name!r} is provided by {' and '.join(owners)}; uninstall all packages but one of them"
        )
    return found[0]


def _loaded(name: str, entry: "EntryPoint") -> Callable[..., Any]:
    try:
        load = entry.load()
    except (ImportError, AttributeError) as error:
        raise EnvironmentLoadError(
            f"environment {name!r}: {entry.value} cannot be imported ({error}); reinstall its package"
        ) from error
    if not callable(load):
        raise EnvironmentLoadError(f"environment {name!r}: {entry.value} is not a function; correct its entry point")
    return load  # type: ignore[no-any-return]


def _made(name: str, load: Callable[..., Any], arguments: dict[str, Any]) -> Environment:
    try:
        inspect.signature(load).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(load).parameters) or "none"
        raise EnvironmentLoadError(f"environment {name!r}: {error}; its arguments are {known}") from error
    try:
        environment = load(**arguments)
    except (ValueError, TypeError, OSError) as error:
        raise EnvironmentLoadError(f"environment {name!r}: {error}") from error
    if not isinstance(environment, Environment):
        raise EnvironmentLoadError(
            f"environment {name!r}: load_environment returned {type(environment).__name__}, not an Environment"
        )
    return environment
