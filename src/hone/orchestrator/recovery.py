"""A run that goes on: the state that its orchestrator died in, from the ledger and the trace segments."""

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from hone.config.recipe import RlSection
from hone.observability.logs import fields
from hone.orchestrator.audit import group_name
from hone.orchestrator.batching import make_batch
from hone.orchestrator.decide import Group, Limits, State
from hone.orchestrator.ledger import GroupRow, Ledger, LedgerError
from hone.orchestrator.mixture import Draw, Mixture
from hone.orchestrator.samples import agent_rewards
from hone.schema.rollouts import RolloutResult
from hone.schema.traces import Trace
from hone.schema.wire import WireError
from hone.transport.batches import read_batch, write_batch
from hone.transport.folders import RunFolder
from hone.transport.traces import Location, read_frame, read_traces

logger = logging.getLogger("hone.orchestrator.recovery")


@dataclass(frozen=True, slots=True)
class Drawn:
    """The task of an outstanding group: where the mixture had it from, and its key then."""

    draw: Draw
    task_key: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a restarted orchestrator begins with.

    drawn, traces: of outstanding groups. orphans: results that reached the
    segments but not the ledger, to be taken as if they arrived now. broken: steps whose batch file must be made again.
    """

    state: State
    drawn: dict[int, Drawn]
    traces: dict[int, dict[int, Trace]]
    orphans: list[tuple[Location, RolloutResult]]
    broken: list[int]


def recover(ledger: Ledger, folder: RunFolder, limits: Limits, scored_together: Collection[str] = ()) -> Recovery:
    """The state of the run in `folder`; that of a new run when the ledger is empty.

    scored_together: the environments whose groups are whole or not there at all.
    """
    rows = ledger.outstanding()
    traces = read_group_traces(ledger, folder, [row.number for row in rows])
    lost = [
        (row.number, attempt.attempt)
        for row in rows
        for attempt in row.attempts
        if attempt.state == "finished" and attempt.attempt not in traces.get(row.number, {})
    ]
    if lost:
        for number, attempt in lost:
            ledger.forget_result(number, attempt)
        rows = ledger.outstanding()
    torn = [row.number for row in rows if row.draw.environment in scored_together and _is_torn(row)]
    if torn:
        for number in torn:
            ledger.forget_group(number)
            traces.pop(number, None)
        rows = ledger.outstanding()
    state = State(limits)
    for row in rows:
        state.restore_group(row.number, _group(row, traces.get(row.number, {})))
    _restore_steps(state, ledger, folder)
    return Recovery(
        state=state,
        drawn={row.number: Drawn(row.draw, row.task_key) for row in rows},
        traces=traces,
        orphans=_orphans(ledger, folder, state, {r.number for r in rows if r.draw.environment in scored_together}),
        broken=[step for step in range(state.covered + 1, state.num_batches + 1) if not _is_whole(folder, step)],
    )


def restore_mixture(mixture: Mixture, ledger: Ledger, reward_of_solved: Mapping[str, float]) -> None:
    """Let a new mixture go on where the ledger says that the run is, after `recover` has had its say in the ledger."""
    mixture.restore(ledger.num_drawn())
    for name, curriculum in mixture.curricula.items():
        outcomes = ledger.outcomes(name, reward_of_solved[name])
        curriculum.restore(ledger.drawn_tasks(name), ledger.tasks_under_way(name), outcomes)


def make_batch_again(ledger: Ledger, folder: RunFolder, step: int, section: RlSection) -> None:
    """A batch whose file a power cut or a person has damaged, from the traces that it was made of."""
    logger.warning("a batch file is missing or damaged and is made again", extra=fields(step=step))
    [row] = [row for row in ledger.batches() if row.step == step]
    traces = read_group_traces(ledger, folder, row.groups)
    missing = [number for number in row.groups if number not in traces]
    if missing:
        raise LedgerError(
            f"the batch of step {step} and traces of its group {missing[0]} are gone from {folder.path};"
            f" restore them, or start a new run"
        )
    groups = [[trace for _, trace in sorted(traces[number].items())] for number in row.groups]
    write_batch(folder.batch_of(step), make_batch(step, groups, section).batch)


def read_group_traces(ledger: Ledger, folder: RunFolder, numbers: Iterable[int]) -> dict[int, dict[int, Trace]]:
    """The finished traces of some groups, by group and attempt; those whose frame is gone are missing."""
    wanted: dict[Location, set[tuple[str, int]]] = defaultdict(set)
    number_of = {group_name(number): number for number in numbers}
    for name, number in number_of.items():
        for attempt in ledger.attempts(number):
            if attempt.location is not None:
                wanted[attempt.location].add((name, attempt.attempt))
    traces: dict[int, dict[int, Trace]] = {}
    for location in sorted(wanted):
        for result in read_frame(folder.traces, location):
            if (result.group, result.attempt) in wanted[location]:
                traces.setdefault(number_of[result.group], {})[result.attempt] = result.trace
    return traces


def _is_torn(row: GroupRow) -> bool:
    """Whether some attempts of a running group have an outcome: a trace is lost, or the environment has changed."""
    return not row.is_finished and any(a.state not in ("issued", "running") for a in row.attempts)


def _group(row: GroupRow, traces: Mapping[int, Trace]) -> Group:
    pending = {a.attempt: a.failures for a in row.attempts if a.state in ("issued", "running")}
    failures = [a.failure for a in row.attempts if a.failure is not None]
    group = Group(row.version, pending, last_failure=failures[-1] if failures else None)
    for a in row.attempts:
        if a.reward is not None:
            group.record(a.attempt, a.reward, a.min_version, agent_rewards(traces[a.attempt]))
    return group


def _restore_steps(state: State, ledger: Ledger, folder: RunFolder) -> None:
    batches = ledger.batches()
    state.next_group = ledger.next_number()
    state.num_batches = len(batches)
    state.batched_reward = ledger.batch_reward(batches[-1].step) if batches else None
    state.trained = max((row.step for row in batches if row.state == "trained"), default=0)
    state.offered = max((row.step for row in batches if row.state != "formed"), default=0)
    state.covered = ledger.covered()
    state.trained = max(state.trained, state.covered)
    state.published = folder.newest_weights()[0]
    early_end = ledger.early_end()
    if early_end is not None and state.limits.num_steps <= ledger.num_steps():
        state.last_step = early_end
    # A recipe that now wants fewer steps than were begun cannot undo them.
    state.last_step = max(state.last_step, state.offered, state.trained)


def _orphans(
    ledger: Ledger, folder: RunFolder, state: State, whole: Collection[int]
) -> list[tuple[Location, RolloutResult]]:
    """whole: groups that are adopted with all their results, which one frame holds, failures among them; or not."""
    waited_for = {(group_name(number), a): None for number, group in state.groups.items() for a in group.pending}
    sizes = {group_name(number): len(state.groups[number].pending) for number in whole}
    together: dict[tuple[Location, str], list[RolloutResult]] = defaultdict(list)
    found = []
    for location, result in read_traces(folder.traces, ledger.traces_end()):
        key = result.group, result.attempt
        if key not in waited_for:
            continue
        if result.group in sizes:
            together[location, result.group].append(result)
        elif result.trace.failure is None:
            del waited_for[key]
            found.append((location, result))
    for (location, group), results in together.items():
        num_valid = sum(result.trace.failure is None for result in results)
        if len(results) == sizes[group] and num_valid >= 2:  # with fewer it was to run again
            found += [(location, result) for result in results]
    return found


def _is_whole(folder: RunFolder, step: int) -> bool:
    try:
        return read_batch(folder.batch_of(step)).step == step
    except (WireError, FileNotFoundError):
        return False
