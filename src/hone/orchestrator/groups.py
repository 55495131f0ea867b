"""The groups that train, from the draw of their task to the batch that takes them, or to why none does."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from hone.envs.retries import Failures, total
from hone.orchestrator.audit import group_name
from hone.orchestrator.batching import Tally
from hone.orchestrator.curriculum import Outcome, solve_rate
from hone.orchestrator.dispatch import Key
from hone.orchestrator.events import RolloutFailed, RolloutFinished
from hone.orchestrator.ledger import Ledger, LedgerError
from hone.orchestrator.mixture import Draw, Mixture
from hone.orchestrator.purposes import Submit, complaint_of
from hone.orchestrator.recovery import Drawn
from hone.orchestrator.samples import UntrainableTraceError, check_trainable
from hone.schema.rollouts import RolloutRequest
from hone.schema.sampling import SamplingParameters
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, Trace
from hone.transport.traces import Location

logger = logging.getLogger("hone.orchestrator.groups")


@dataclass(slots=True)
class Content:
    """What an outstanding group consists of: where the mixture had it from, what it attempts, its valid traces so far.

    task: None when its environment did not give it.
    """

    draw: Draw
    task: Task | None
    traces: dict[int, Trace] = field(default_factory=dict)


class TrainingGroups:
    """The purpose of rollouts at train tasks; does with groups what was decided, in ledger, curriculum and tally.

    is_pending: whether an attempt of a group has no outcome yet. post: takes the outcomes of rollouts as events.
    """

    min_valid = 2

    def __init__(
        self,
        mixture: Mixture,
        ledger: Ledger,
        *,
        group_size: int,
        sampling: SamplingParameters,
        run_seed: int,
        reward_of_solved: Mapping[str, float],
        is_pending: Callable[[int, int], bool],
        submit: Submit,
        post: Callable[[RolloutFinished | RolloutFailed], None],
    ) -> None:
        self.group_size = group_size
        self.tally = Tally()
        self.last_complaint = ""
        self._mixture = mixture
        self._ledger = ledger
        self._sampling = sampling
        self._run_seed = run_seed
        self._reward_of_solved = reward_of_solved
        self._is_pending = is_pending
        self._submit = submit
        self._post = post
        self._groups: dict[int, Content] = {}

    def restore(self, drawn: Mapping[int, Drawn], traces: Mapping[int, dict[int, Trace]]) -> None:
        """The outstanding groups of a run that goes on; raises `LedgerError` where a task has changed since."""
        for number, found in drawn.items():
            task = self._task_of(found.draw)
            if task is not None and task.key != found.task_key:
                raise LedgerError(
                    f"task {found.draw.number} of environment {found.draw.environment!r} is not the one that this run"
                    f" began with; install the environment's former version, or start a new run with another run.name"
                )
            self._groups[number] = Content(found.draw, task, traces.get(number, {}))

    # What is decided of a group.

    def start(self, number: int, version: int) -> None:
        """Draw the next task and attempt it."""
        draw = self._mixture.draw()
        attempts = list(range(self.group_size))
        task = self._task_of(draw)
        self._groups[number] = Content(draw, task)
        self._ledger.admit(number, draw, "" if task is None else task.key, version, len(attempts))
        self._run(number, attempts, num_failures=0)

    def run_again(self, number: int, attempt: int, failures: Failures) -> None:
        if failures:
            self._ledger.retry(number, attempt, failures)
        self.tally.num_again += 1
        self._run(number, [attempt], total(failures))

    def give_up_attempt(self, number: int, attempt: int, kind: FailureClass) -> None:
        self.tally.given_up[kind] += 1
        self._ledger.fail(number, attempt, kind)

    def finish_group(self, number: int) -> None:
        """It is complete; its traces wait for their batch."""
        self._tell_curriculum(number, has_outcome=True)
        self._ledger.finish_group(number)

    def filter(self, number: int) -> None:
        self.tally.num_filtered += 1
        self._tell_curriculum(number, has_outcome=True)
        self._ledger.filter_group(number)
        del self._groups[number]

    def drop(self, number: int, kind: FailureClass | None) -> None:
        self._drop(number, str(kind))

    def drop_stale(self, number: int) -> None:
        self.tally.num_stale += 1
        self._drop(number, "stale")

    def cancel(self, number: int) -> None:
        self._leave_out(number, FailureClass.CANCELLED)

    def traces_of(self, numbers: Iterable[int]) -> list[list[Trace]]:
        """The valid traces of complete groups, in the order of their attempts."""
        return [[trace for _, trace in sorted(self._groups[number].traces.items())] for number in numbers]

    def hand_over(self, numbers: Iterable[int]) -> None:
        """A batch has these groups."""
        for number in numbers:
            del self._groups[number]

    def end_tally(self) -> Tally:
        """What happened since the last time."""
        tally, self.tally = self.tally, Tally()
        return tally

    # As a purpose of rollouts.

    def waits_for(self, key: Key) -> bool:
        group, attempt = key
        return self._is_pending(int(group), attempt)

    def environment_of(self, key: Key) -> str:
        group, _ = key
        return self._groups[int(group)].draw.environment

    def note_sent(self, request: RolloutRequest) -> None:
        self._ledger.run(int(request.group), request.attempts)

    def complaint_about(self, trace: Trace) -> tuple[FailureClass, str] | None:
        if trace.failure is not None:
            return trace.failure.kind, complaint_of(trace.failure)
        try:
            check_trainable(trace)
        except UntrainableTraceError as error:
            return error.kind, str(error)
        return None

    def finish(self, key: Key, trace: Trace, location: Location) -> None:
        reward, version, agent_rewards = check_trainable(trace)
        number, attempt = int(key[0]), key[1]
        group = self._groups[number]
        group.traces[attempt] = trace
        self.tally.add(group.draw.environment, trace, reward)
        self._ledger.finish(number, attempt, reward, version, location)
        self._post(RolloutFinished(number, attempt, reward, version, agent_rewards))

    def fail(self, key: Key, kind: FailureClass, complaint: str, *, is_final: bool = False) -> None:
        group, attempt = key
        self.last_complaint = complaint
        self.tally.failures[kind] += 1
        self._post(RolloutFailed(int(group), attempt, kind, is_final))

    def _task_of(self, draw: Draw) -> Task | None:
        """None when the environment does not give it: the group fails, the run goes on."""
        try:
            task = self._mixture.task(draw)
            assert task.key, "a task has a key"
        except Exception as error:  # code of an environment may raise anything
            self.last_complaint = f"environment {draw.environment!r} gives no task {draw.number}: {error!r}"
            logger.warning("%s", self.last_complaint)
            return None
        return task

    def _run(self, number: int, attempts: list[int], num_failures: int) -> None:
        group, name = self._groups[number], group_name(number)
        if group.task is None:
            for attempt in attempts:
                self.fail((name, attempt), FailureClass.ENVIRONMENT, self.last_complaint)
            return
        # A task that comes again in another epoch gets other random numbers, a repeated attempt gets the same.
        seed = derive_seed(self._run_seed, "rollouts", name)
        request = RolloutRequest(name, group.draw.environment, group.task, attempts, self._sampling, seed)
        self._submit(request, num_failures)

    def _drop(self, number: int, reason: str) -> None:
        self.tally.num_dropped += 1
        self._leave_out(number, reason)

    def _leave_out(self, number: int, reason: str) -> None:
        self._tell_curriculum(number, has_outcome=False)
        self._ledger.fail_group(number, reason)
        del self._groups[number]

    def _tell_curriculum(self, number: int, has_outcome: bool) -> None:
        """A group has ended; the ledger, which is told at the same time, says the same after a restart."""
        group = self._groups[number]
        environment = group.draw.environment
        curriculum = self._mixture.curricula.get(environment)
        if curriculum is None:
            return
        if not has_outcome:
            curriculum.leave_out(group.draw.index)
            return
        rewards = [trace.reward for trace in group.traces.values()]
        curriculum.record(Outcome(group.draw.index, solve_rate(rewards, self._reward_of_solved[environment])))
