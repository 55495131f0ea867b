"""What evaluations have left in a tree of folders: one cell for each model and environment, finished or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hone.evals.results import EvalResult, Outcome, summarise
from hone.evals.storage import (
    RESULT,
    SETTINGS,
    TRACES,
    Settings,
    read_outcomes,
    read_result,
    read_settings,
    read_traces,
)


@dataclass(frozen=True)
class FoundCell:
    """One model on one environment, as its folder tells; model and environment are named as the folders are."""

    folder: Path
    model: str
    environment: str
    settings: Settings

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """One for each attempt that has ended."""
        return read_outcomes(self.folder)

    @cached_property
    def result(self) -> EvalResult:
        """The numbers; of an evaluation that is not over, over what is there."""
        if self.is_over:
            return read_result(self.folder)
        attempts = 1 + max((outcome.attempt for outcome in self.outcomes), default=0)
        made = self.settings
        return summarise(
            self.outcomes,
            environment=made.environment,
            version=made.environment_version,
            attempts=attempts,
            model=made.model,
        )

    @property
    def is_over(self) -> bool:
        """Whether the evaluation was concluded."""
        return (self.folder / RESULT).exists()

    @property
    def shortcoming(self) -> str | None:
        """Why the numbers are not those that were asked for; None if they are."""
        return self.result.shortcoming if self.is_over else "it was interrupted, or still runs"

    def prompts(self) -> dict[str, str]:
        """What was asked last in the prompt of each task."""
        traces = read_traces(self.folder / TRACES)
        return {trace.task.key: trace.task.prompt[-1].content for trace in traces if trace.task.prompt}

    def failure_messages(self) -> dict[str, list[str]]:
        """By class of failure, what was said of the rollouts that failed, those that succeeded since included."""
        said: dict[str, list[str]] = {}
        for trace in read_traces(self.folder / TRACES):
            if trace.failure is not None:
                message = f"{trace.failure.where}: {trace.failure.message}"
                said.setdefault(trace.failure.kind.value, []).append(message)
        return said


def find_cells(folder: Path) -> list[FoundCell]:
    """The cells in a folder and below it, in the order of their paths; `ValueError` when there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; evaluations are in evals/ or in the evals/ of a run's folder")
    found = sorted(path.parent for path in folder.rglob(SETTINGS) if (path.parent / TRACES).exists())
    if not found:
        raise ValueError(f"no evaluation in {folder}: neither it nor a folder below it holds {SETTINGS} and {TRACES}")
    return [FoundCell(path, path.absolute().parent.name, path.absolute().name, read_settings(path)) for path in found]


def two_models(folder: Path) -> tuple[Path, Path]:
    """The folders of the two models of an evaluation; `ValueError` when there are not two."""
    models = list(dict.fromkeys(cell.folder.absolute().parent for cell in find_cells(folder)))
    if len(models) != 2:
        names = ", ".join(model.name for model in models)
        raise ValueError(f"{folder} holds {len(models)} models ({names}); give the folders of the two to compare")
    return models[0], models[1]


def shared_environments(
    first: Sequence[FoundCell], second: Sequence[FoundCell]
) -> Mapping[str, tuple[FoundCell, FoundCell]]:
    """The cells of two models by environment, where both have one made on the same tasks in the same way.

    `ValueError` where a side has several models, where nothing is shared, or where the settings of an environment differ
    in what a fair comparison needs equal.
    """
    ours, theirs = _by_environment(first), _by_environment(second)
    if len(ours) == len(theirs) == 1:  # two folders of one environment each, whatever they are called
        [(name, one)], [other] = ours.items(), theirs.values()
        pairs = {name: (one, other)}
    else:
        pairs = {name: (ours[name], theirs[name]) for name in ours if name in theirs}
    if not pairs:
        raise ValueError(
            f"nothing to compare: one has {', '.join(ours)}, the other {', '.join(theirs)}; evaluate both on one environment"
        )
    for one, other in pairs.values():
        _check_comparable(one, other)
    return pairs


def _by_environment(cells: Sequence[FoundCell]) -> dict[str, FoundCell]:
    models = list(dict.fromkeys(cell.folder.absolute().parent for cell in cells))
    if len(models) > 1:
        names = ", ".join(folder.name for folder in models)
        raise ValueError(f"{models[0].parent} holds several models ({names}); give the folder of one of them")
    return {cell.environment: cell for cell in cells}


def is_comparable(first: FoundCell, second: FoundCell) -> bool:
    """Whether two cells asked the same questions under the same budgets."""
    return _difference_of(first, second) is None


def _check_comparable(first: FoundCell, second: FoundCell) -> None:
    if (name := _difference_of(first, second)) is not None:
        ours, theirs = getattr(first.settings, name), getattr(second.settings, name)
        raise ValueError(
            f"{first.folder} was made with {name} = {ours!r}, {second.folder} with {theirs!r}: their scores do not"
            " compare; evaluate both in the same way"
        )


def _difference_of(first: FoundCell, second: FoundCell) -> str | None:
    names = ("environment", "environment_version", "arguments", "budgets")
    return next((name for name in names if getattr(first.settings, name) != getattr(second.settings, name)), None)
