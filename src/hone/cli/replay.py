"""`hone env replay`: old against new rewards of saved traces."""

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from rich.table import Table
from rich.text import Text

from hone.cli.traces import arguments_of, saved_traces
from hone.envs.environment import Environment
from hone.envs.fingerprint import load_target
from hone.envs.replay import Replayed, groups_of, replay
from hone.schema.traces import Trace


@dataclass(frozen=True, slots=True)
class Summary:
    """All replayed traces in sum; the means are over traces that have a reward both times, None without any."""

    num_traces: int
    num_compared: int
    num_changed: int
    mean_before: float | None
    mean_after: float | None
    notes: dict[str, int]

    @property
    def line(self) -> str:
        """One line for people."""
        if self.mean_before is None or self.mean_after is None:
            means = "no trace has a reward both times"
        else:
            gain = self.mean_after - self.mean_before
            means = f"mean reward {self.mean_before:.4f} before, {self.mean_after:.4f} now ({gain:+.4f})"
        notes = "".join(f"; {count} {note}" for note, count in self.notes.items())
        return f"{self.num_traces} traces, {self.num_changed} changed; {means}{notes}"

    def as_json(self, replayed: Sequence[Replayed]) -> dict[str, Any]:
        """The sums, and one entry for each trace."""
        sums = {name: getattr(self, name) for name in self.__slots__}
        return sums | {"traces": [_entry(one) for one in replayed]}


async def replay_all(
    path: Path, name: str | None, arguments: Mapping[str, Any] | None, output: Path | None
) -> list[Replayed]:
    """Judge every trace at `path` again; what is returned has no nodes, so that a whole run fits into memory.

    name: the environment that judges, else each trace names its own. arguments: of that environment, else those of
    the run, evaluation or synthesis that the traces lie in. output: a file for the judged traces with all they hold.
    """
    replayed: list[Replayed] = []
    with contextlib.nullcontext(_discard) if output is None else _written(output) as write:
        async for one in _replayed(path, name, arguments):
            write(one.after)
            replayed.append(Replayed(_without_nodes(one.before), _without_nodes(one.after), one.note))
    return replayed


async def _replayed(path: Path, name: str | None, arguments: Mapping[str, Any] | None) -> AsyncIterator[Replayed]:
    """One after the other; those whose environment compares the rollouts of a group when all have been read."""
    from_files = arguments_of(path) if arguments is None else {}
    loaded: dict[str, Environment] = {}
    compared: list[Trace] = []
    for trace in saved_traces(path):
        if trace.environment not in loaded:
            settings = from_files.get(trace.environment, {}) if arguments is None else arguments
            loaded[trace.environment] = load_target(name or trace.environment, settings)
        environment = loaded[trace.environment]
        if environment.scores_groups:
            compared.append(trace)
        else:
            (one,) = await replay(environment, [trace])
            yield one
    for group in groups_of(compared):
        for one in await replay(loaded[group[0].environment], group):
            yield one


def summary_of(replayed: Sequence[Replayed]) -> Summary:
    """The sums over all traces."""
    compared = [one for one in replayed if one.difference is not None]
    before = [one.before.reward for one in compared]
    after = [one.after.reward for one in compared]
    notes = Counter(_note(one) for one in replayed)
    notes.pop("", None)
    return Summary(
        num_traces=len(replayed),
        num_compared=len(compared),
        num_changed=sum(one.is_changed for one in replayed),
        mean_before=sum(before) / len(before) if before else None,
        mean_after=sum(after) / len(after) if after else None,
        notes=dict(notes.most_common()),
    )


def replay_table(replayed: Sequence[Replayed], num_rows: int) -> Table:
    """The traces, the most changed first."""
    table = Table("environment", "task", "attempt", "before", "now", "difference", "")
    ordered = sorted(replayed, key=_importance, reverse=True)
    for one in ordered[:num_rows]:
        difference = one.difference
        shown = "" if difference is None else f"{difference:+.4g}"
        style = "" if not difference else "green" if difference > 0 else "red"
        before = one.before
        cells = [before.environment, before.task.key, str(before.attempt), _reward(before), _reward(one.after)]
        table.add_row(*cells, Text(shown, style), _note(one) or _changed_names(one))
    if len(ordered) > num_rows:
        table.caption = f"and {len(ordered) - num_rows} more"
    return table


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Callable[[Trace], None]]:
    """A function that appends a trace as one line to a file, which is whole in the end, or not there."""
    if path.exists():
        raise ValueError(f"{path} exists already; give another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    encoder = msgspec.json.Encoder()
    with temporary.open("wb") as file:
        yield lambda trace: _append(file, encoder.encode(trace) + b"\n")
    temporary.replace(path)


def _append(file: BinaryIO, line: bytes) -> None:
    file.write(line)


def _discard(trace: Trace) -> None:
    """Nobody wants the judged traces."""


def _without_nodes(trace: Trace) -> Trace:
    return msgspec.structs.replace(trace, nodes=[])


def _entry(one: Replayed) -> dict[str, Any]:
    trace = one.before
    return {
        "environment": trace.environment,
        "task": trace.task.key,
        "attempt": trace.attempt,
        "before": None if trace.failure else trace.reward,
        "after": None if one.after.failure else one.after.reward,
        "is_changed": one.is_changed,
        "note": _note(one),
    }


def _note(one: Replayed) -> str:
    if one.note:
        return one.note
    if one.after.failure is not None:
        return f"fails now ({one.after.failure.where})"
    return "failed before, has a reward now" if one.before.failure is not None else ""


def _importance(one: Replayed) -> tuple[bool, float, bool]:
    return (bool(_note(one)) and one.is_changed, abs(one.difference or 0.0), one.is_changed)


def _reward(trace: Trace) -> str:
    return f"failed: {trace.failure.kind}" if trace.failure is not None else f"{trace.reward:.4g}"


def _numbers(trace: Trace) -> dict[str, float]:
    """Rewards and metrics by name; those of single agents as `agent.reward`."""
    common = {name: reward.value for name, reward in trace.rewards.items()}
    own = {
        f"{agent}.{name}": one.value for agent, record in trace.agents.items() for name, one in record.rewards.items()
    }
    return common | own | trace.metrics


def _changed_names(one: Replayed) -> str:
    """The rewards and metrics that are others now."""
    old, new = _numbers(one.before), _numbers(one.after)
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {_number(old.get(name))} → {_number(new.get(name))}" for name in changed)


def _number(value: float | None) -> str:
    return "none" if value is None else json.dumps(round(value, 4))
