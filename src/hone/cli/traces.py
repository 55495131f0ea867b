"""Saved traces by the path that a person gives: a run, its traces, an evaluation, a file."""

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hone.evals.storage import read_traces as read_lines
from hone.schema.traces import Trace
from hone.transport.traces import read_traces as read_segments

SEGMENTS = "segment-*.mpk.zz"


def saved_traces(path: Path) -> Iterator[Trace]:
    """The traces that `path` stands for, in the order in which they were written.

    A file with one trace a line, a folder of segments, or a folder that has either (`traces.jsonl`, `traces/`).
    """
    if path.is_file():
        return _at_least_one(read_lines(path), path)
    if (path / "traces.jsonl").is_file():
        return _at_least_one(read_lines(path / "traces.jsonl"), path)
    for folder in (path, path / "traces"):
        if any(folder.glob(SEGMENTS)):
            return (result.trace for _, result in read_segments(folder))
    raise ValueError(
        f"no traces at {path}; give a run's folder, its traces/, an evaluation's folder (evals/LABEL/ENVIRONMENT), or a"
        " file with one trace a line"
    )


def arguments_of(path: Path) -> dict[str, dict[str, Any]]:
    """The arguments that the environments of the traces at `path` were loaded with, by name, where files beside tell.

    These are the settings.json of an evaluation or a synthesis, and the config.toml of a run, in the folder or above.
    """
    for folder in (path, *path.absolute().parents):
        if (folder / "settings.json").is_file():
            settings = _table_in(folder / "settings.json", json.loads)
            if "environments" in settings:  # of a synthesis: name to version and arguments
                return {name: arguments for name, (_, arguments) in settings["environments"].items()}
            if settings.get("arguments") and "environment" in settings:
                return {settings["environment"]: settings["arguments"]}
        if (folder / "config.toml").is_file():
            sections = _table_in(folder / "config.toml", tomllib.loads).get("environments", [])
            return {section["name"]: section.get("arguments", {}) for section in sections}
    return {}


def _table_in(path: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    try:
        found = read(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); give --arguments to replay without it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, no settings; give --arguments to replay without it")
    return found


def _at_least_one(traces: Iterator[Trace], path: Path) -> Iterator[Trace]:
    first = next(traces, None)
    if first is None:
        raise ValueError(f"{path} holds no trace that can be read")
    yield first
    yield from traces
