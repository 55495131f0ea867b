"""Environment packages, installed ones by name and others by folder: the entry point is found and called."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
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


def load_folder(folder: Path, **arguments: Any) -> Environment:
    """The environment of the package in `folder`, which need not be installed.

    Its modules are imported from there, so that what is checked is what is being written.
    """
    from importlib.metadata import EntryPoint  # as in _entries

    project, name, value = _declared(folder)
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    environment = _made(name, _loaded(name, EntryPoint(name, value, GROUP)), arguments)
    module = sys.modules[value.partition(":")[0]]
    if not Path(module.__file__ or "").resolve().is_relative_to(folder.resolve()):
        raise EnvironmentLoadError(
            f"environment {name!r}: {module.__name__} was imported from {module.__file__}, not from {folder};"
            " run this in a process that has not imported it yet"
        )
    environment.version = environment.version or str(project.get("version", ""))
    return environment


def _declared(folder: Path) -> tuple[dict[str, Any], str, str]:
    """The [project] table of the folder's pyproject.toml, and the name and value of its one entry point."""
    import tomllib  # as in _entries

    path = folder / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text())["project"]
        entries = project["entry-points"][GROUP]
        ((name, value),) = entries.items()
    except OSError as error:
        raise EnvironmentLoadError(
            f"{folder} is no environment package: cannot read {path} ({error.strerror})"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise EnvironmentLoadError(f"{path} is not a TOML file: {error}") from error
    except (KeyError, ValueError, AttributeError) as error:
        raise EnvironmentLoadError(f'{path} does not declare one entry point under "{GROUP}"') from error
    return project, name, value


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
