"""What the orchestrator does next, as a pure state machine: admission, batches, retries, weights, evaluations, the end.

`decide(state, *events)` has no clock, socket, file or randomness: the same events give the same commands. To cost O(1)
per rollout it changes the state that it is given and hands it back, so a state must not be used twice.

Why the staleness bound holds. P groups make a batch, S is `max_staleness`, B batches are formed. Step s trains a
token of version v at staleness (s - 1) - v, so a group admitted while the engine serves v has the deadline
d = v + 1 + S: its batch must belong to a step of at most d. Tokens are never older than the version that the engine
had acknowledged at admission. The state keeps, for every d,

    number of outstanding groups with a deadline of at most d  <=  (d - B) * P                          (I)

that is, there is room for all of them in time. Admission keeps (I) because it stops when batched plus outstanding
groups reach (v + 1 + S) * P; a batch is formed only if (I) still holds after it; a group that leaves (filtered,
failed) and a deadline that moves later only relax it. When all outstanding groups have finished, choosing the
earliest deadlines first satisfies (I), so waiting always ends, and nothing that finished is ever thrown away.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from hone.envs.retries import NO_FAILURES, Failures, Retries, counted
from hone.orchestrator.events import (
    CancelGroup,
    Command,
    DropGroup,
    DropStaleGroup,
    EndEarly,
    EndRun,
    EndTraining,
    EngineLost,
    EngineServes,
    EvaluationFinished,
    Event,
    FilterGroup,
    FinishGroup,
    ForgetBatches,
    FormBatch,
    GiveUpAttempt,
    GiveUpCollapsed,
    GiveUpRun,
    LoadWeights,
    MarkTrained,
    OfferBatch,
    Resumed,
    RolloutFailed,
    RolloutFinished,
    RunAgain,
    StartEvaluation,
    StartGroup,
)
from hone.schema.batches import BatchWanted, CheckpointSaved, StepDone
from hone.schema.traces import FailureClass

EQUAL_REWARDS = 1e-9
"""Rewards of a group that differ by no more than this carry no signal: sums of the same weights differ in rounding."""

BARREN_BATCHES = 100
"""Training ends when groups worth this many batches, one after the other, have given nothing to train on."""


class TrainerMismatchError(ValueError):
    """The trainer asks for a batch that this run's ledger cannot give."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers of a recipe that decisions depend on."""

    groups_per_batch: int
    group_size: int
    max_staleness: int
    num_steps: int
    max_concurrent: int
    in_flight_updates: bool = True
    filter_without_signal: bool = True
    evaluate_every: int | None = None
    stop_at_reward: float | None = None
    retries: Retries = field(default_factory=Retries)


@dataclass(slots=True)
class Group:
    """An outstanding group: admitted, and neither batched nor left out."""

    version: int
    pending: dict[int, Failures]
    """Attempts without an outcome, with their failures so far."""
    rewards: dict[int, float] = field(default_factory=dict)
    agent_rewards: dict[int, tuple[float, ...]] = field(default_factory=dict)
    min_version: int | None = None
    last_failure: FailureClass | None = None

    def record(
        self, attempt: int, reward: float, min_version: int | None, agent_rewards: tuple[float, ...] = ()
    ) -> None:
        self.rewards[attempt] = reward
        if agent_rewards:
            self.agent_rewards[attempt] = agent_rewards
        if min_version is not None:
            self.min_version = min_version if self.min_version is None else min(self.min_version, min_version)

    @property
    def is_complete(self) -> bool:
        return not self.pending

    @property
    def reward(self) -> float:
        return math.fsum(self.rewards.values()) / len(self.rewards)

    @property
    def has_signal(self) -> bool:
        """Whether rewards differ: in a game whose rewards add up to zero those of each agent, not their sum."""
        if not self.agent_rewards:
            return max(self.rewards.values()) - min(self.rewards.values()) > EQUAL_REWARDS
        return any(
            max(rewards) - min(rewards) > EQUAL_REWARDS for rewards in zip(*self.agent_rewards.values(), strict=True)
        )


class State:
    """Everything that decisions depend on. Built empty for a new run, or by the ledger for one that goes on."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.groups: dict[int, Group] = {}
        self.next_group = 0
        self.num_running = 0
        self.num_batches = 0
        self.trained = 0
        self.covered = 0
        self.offered = 0
        self.wanted: int | None = None
        self.last_step = limits.num_steps
        self.served: int | None = None
        self.published = 0
        self.loading: int | None = None
        self.evaluating: int | None = None
        self.evaluated = -1
        self.ended = False
        self.num_filtered_in_a_row = 0
        self.num_dropped_in_a_row = 0
        self.filtered_rewards = 0.0
        self.batched_reward: float | None = None
        self.ready: dict[int, deque[int]] = {}
        self.num_ready = 0
        self.num_by_deadline: dict[int, int] = {}

    # Restoring, in the order of the ledger.

    def restore_group(self, number: int, group: Group) -> None:
        """An outstanding group of an interrupted run; a complete one is called in the order of completion."""
        self.groups[number] = group
        self.next_group = max(self.next_group, number + 1)
        self.num_running += len(group.pending)
        deadline = self._true_deadline(group) if group.is_complete else self._deadline(group.version)
        self._count(deadline, 1)
        if group.is_complete:
            self._make_ready(number, deadline)

    # Transitions.

    def resume(self, commands: list[Command]) -> None:
        for number, group in self.groups.items():
            commands += [RunAgain(number, attempt, failures) for attempt, failures in group.pending.items()]

    def serve(self, version: int) -> None:
        self.served = version
        self.published = max(self.published, version)
        self.loading = None

    def lose_engine(self) -> None:
        self.served = None
        self.loading = None

    def want(self, step: int, commands: list[Command]) -> None:
        if step <= self.covered and step <= self.last_step:
            raise TrainerMismatchError(
                f"the trainer asks for the batch of step {step}, but its checkpoints were reported to cover step"
                f" {self.covered} and the batch is deleted; put the checkpoint back, or start a new run"
            )
        if step > min(self.num_batches, self.last_step) + 1:
            raise TrainerMismatchError(
                f"the trainer asks for the batch of step {step}, but the ledger knows {self.num_batches} batches;"
                f" its checkpoints belong to another ledger: put that back, or start a new run"
            )
        self.wanted = step
        self.train_through(step - 1, commands)

    def train_through(self, step: int, commands: list[Command]) -> None:
        if step > self.trained:
            self.trained = step
            commands.append(MarkTrained(step))

    def publish(self, step: int, commands: list[Command]) -> None:
        self.published = max(self.published, step)
        self.train_through(step, commands)

    def cover(self, step: int, commands: list[Command]) -> None:
        if step > self.covered:
            self.covered = step
            commands.append(ForgetBatches(step))

    def finish(self, event: RolloutFinished, commands: list[Command]) -> None:
        group = self.groups.get(event.group)
        if group is None or group.pending.pop(event.attempt, None) is None:
            return  # the answer of a worker that was taken for dead
        self.num_running -= 1
        group.record(event.attempt, event.reward, event.min_version, event.agent_rewards)
        self._settle_group(event.group, group, commands)

    def fail(self, event: RolloutFailed, commands: list[Command]) -> None:
        group = self.groups.get(event.group)
        if group is None or event.attempt not in group.pending:
            return
        failures = group.pending[event.attempt] = counted(group.pending[event.attempt], event.kind)
        if event.kind is not FailureClass.CANCELLED:
            group.last_failure = event.kind
        if not event.is_final and self.limits.retries.permit(failures, event.kind):
            commands.append(RunAgain(event.group, event.attempt, failures))
            return
        del group.pending[event.attempt]
        self.num_running -= 1
        commands.append(GiveUpAttempt(event.group, event.attempt, event.kind))
        self._settle_group(event.group, group, commands)

    def finish_evaluation(self, event: EvaluationFinished, commands: list[Command]) -> None:
        if self.evaluating == event.version:
            self.evaluating = None
        self.evaluated = max(self.evaluated, event.version)
        goal = self.limits.stop_at_reward
        if goal is not None and event.reward >= goal:
            self._end_early(f"evaluation of version {event.version} reached reward {event.reward:.4g}", commands)

    def go_on(self, commands: list[Command]) -> None:
        """Everything that the state of affairs allows, after any events."""
        self._form(commands)
        self._offer(commands)
        self._load(commands)
        self._evaluate(commands)
        self._admit(commands)
        self._end(commands)

    @property
    def is_generating(self) -> bool:
        """Are there batches left to fill?"""
        return self.num_batches < self.last_step

    # Groups.

    def _settle_group(self, number: int, group: Group, commands: list[Command]) -> None:
        if not group.is_complete:
            return
        if len(group.rewards) < 2:
            self._leave_out(number, group, DropGroup(number, group.last_failure), commands)
        elif self.limits.filter_without_signal and not group.has_signal:
            self._leave_out(number, group, FilterGroup(number), commands)
        elif not self._move_deadline(group):
            self._leave_out(number, group, DropStaleGroup(number), commands)
        else:
            self.num_filtered_in_a_row = self.num_dropped_in_a_row = 0
            self.filtered_rewards = 0.0
            self._make_ready(number, self._true_deadline(group))
            commands.append(FinishGroup(number))

    def _leave_out(
        self, number: int, group: Group, command: FilterGroup | DropGroup | DropStaleGroup, commands: list[Command]
    ) -> None:
        self._count(self._deadline(group.version), -1)
        del self.groups[number]
        commands.append(command)
        if isinstance(command, FilterGroup):
            self.num_filtered_in_a_row += 1
            self.filtered_rewards += group.reward
        else:
            self.num_dropped_in_a_row += 1
        if self.num_filtered_in_a_row + self.num_dropped_in_a_row == BARREN_BATCHES * self.limits.groups_per_batch:
            self._stop_barren(group.last_failure, commands)

    def _stop_barren(self, kind: FailureClass | None, commands: list[Command]) -> None:
        filtered, dropped = self.num_filtered_in_a_row, self.num_dropped_in_a_row
        if self.offered and filtered >= dropped:
            reward = self.filtered_rewards / filtered
            if self.batched_reward is not None and reward < self.batched_reward - EQUAL_REWARDS:
                commands.append(GiveUpCollapsed(filtered, reward, self.batched_reward))
                return
            self._end_early(f"the last {filtered} groups had equal rewards: nothing left to learn from", commands)
        else:
            commands.append(GiveUpRun(filtered, dropped, kind))

    def _deadline(self, version: int) -> int:
        return version + 1 + self.limits.max_staleness

    def _true_deadline(self, group: Group) -> int:
        """By the versions that really sampled, once they are all known: usually later than the one of the admission."""
        return self._deadline(group.version if group.min_version is None else group.min_version)

    def _move_deadline(self, group: Group) -> bool:
        """Count a complete group under its true deadline; false, and nothing is changed, if there is no room in time.

        That can only be when the engine went back to older weights than it had acknowledged.
        """
        admitted, true = self._deadline(group.version), self._true_deadline(group)
        if true == admitted:
            return True
        self._count(admitted, -1)
        self._count(true, 1)
        if true > admitted or self._has_room():
            return True
        self._count(true, -1)
        self._count(admitted, 1)
        return False

    def _has_room(self) -> bool:
        num_due = 0
        for deadline in sorted(self.num_by_deadline):
            num_due += self.num_by_deadline[deadline]
            if num_due > (deadline - self.num_batches) * self.limits.groups_per_batch:
                return False
        return True

    def _count(self, deadline: int, change: int) -> None:
        count = self.num_by_deadline.get(deadline, 0) + change
        assert count >= 0, f"{count} groups with deadline {deadline}"
        if count:
            self.num_by_deadline[deadline] = count
        else:
            self.num_by_deadline.pop(deadline, None)

    def _make_ready(self, number: int, deadline: int) -> None:
        self.ready.setdefault(deadline, deque()).append(number)
        self.num_ready += 1

    # Batches.

    def _form(self, commands: list[Command]) -> None:
        while self.num_ready >= self.limits.groups_per_batch and self.is_generating:
            counts = self._choose()
            if counts is None:
                return
            self.num_batches += 1
            taken = [self._take(deadline) for deadline, count in counts for _ in range(count)]
            self.batched_reward = math.fsum(group.reward for _, group in taken) / len(taken)
            commands.append(FormBatch(self.num_batches, tuple(number for number, _ in taken)))

    def _choose(self) -> list[tuple[int, int]] | None:
        """How many ready groups of each deadline make the next batch; None if (I) would not hold after it."""
        size, step = self.limits.groups_per_batch, self.num_batches + 1
        chosen: list[tuple[int, int]] = []
        num_free, num_left = size, 0
        for deadline in sorted(self.num_by_deadline):
            take = min(num_free, len(self.ready.get(deadline, ())))
            num_free -= take
            num_left += self.num_by_deadline[deadline] - take
            if num_left > (deadline - step) * size:
                return None
            if take:
                chosen.append((deadline, take))
        return chosen

    def _take(self, deadline: int) -> tuple[int, Group]:
        number = self.ready[deadline].popleft()
        if not self.ready[deadline]:
            del self.ready[deadline]
        self.num_ready -= 1
        self._count(deadline, -1)
        return number, self.groups.pop(number)

    def _offer(self, commands: list[Command]) -> None:
        if self.wanted is None:
            return
        if self.wanted > self.last_step:
            commands.append(EndTraining(self.last_step))
            self.wanted = None
        elif self.wanted <= self.num_batches:
            commands.append(OfferBatch(self.wanted))
            self.offered = max(self.offered, self.wanted)
            self.wanted = None

    # The engine.

    @property
    def is_update_due(self) -> bool:
        return self.served is not None and self.published > self.served

    @property
    def is_idle(self) -> bool:
        """No rollout samples at the moment, neither for training nor for an evaluation."""
        return self.num_running == 0 and self.evaluating is None

    @property
    def _is_held(self) -> bool:
        """Nothing new starts while an update waits for what runs."""
        return self.is_update_due and not self.limits.in_flight_updates

    def _load(self, commands: list[Command]) -> None:
        if self.is_update_due and self.loading is None and (self.limits.in_flight_updates or self.is_idle):
            self.loading = self.published
            commands.append(LoadWeights(self.published))

    def _admit(self, commands: list[Command]) -> None:
        if self.served is None or not self.is_generating or self._is_held:
            return
        limits = self.limits
        num_steps = min(self.served + 1 + limits.max_staleness, self.last_step)
        room = (num_steps - self.num_batches) * limits.groups_per_batch - len(self.groups)
        room = min(room, (limits.max_concurrent - self.num_running) // limits.group_size)
        for _ in range(room):
            group = Group(self.served, dict.fromkeys(range(limits.group_size), NO_FAILURES))
            self.groups[self.next_group] = group
            self._count(self._deadline(group.version), 1)
            self.num_running += limits.group_size
            commands.append(StartGroup(self.next_group, self.served))
            self.next_group += 1

    # Evaluations and the end.

    def _evaluate(self, commands: list[Command]) -> None:
        every = self.limits.evaluate_every
        if every is None or self.served is None or self.evaluating is not None or self._is_held:
            return
        due = self.served // every * every
        if self.served >= self.last_step and self.trained >= self.last_step:
            due = self.last_step
        if due > self.evaluated:
            self.evaluating = due
            commands.append(StartEvaluation(due))

    def _end_early(self, reason: str, commands: list[Command]) -> None:
        if self.offered >= self.last_step:
            return
        self.last_step = self.offered
        commands.append(EndEarly(self.last_step, reason))
        for number in [number for number, group in self.groups.items() if group.pending]:
            group = self.groups.pop(number)
            self.num_running -= len(group.pending)
            self._count(self._deadline(group.version), -1)
            commands.append(CancelGroup(number))

    def _end(self, commands: list[Command]) -> None:
        is_evaluated = self.limits.evaluate_every is None or self.evaluated >= self.last_step
        if not self.ended and self.trained >= self.last_step and is_evaluated and self.evaluating is None:
            self.ended = True
            commands.append(EndRun())


def decide(state: State, *events: Event) -> tuple[State, list[Command]]:
    """What follows from events that arrived in the same moment. The state is changed and handed back; the old one is
    used up."""
    commands: list[Command] = []
    for event in events:
        _take(state, event, commands)
    state.go_on(commands)
    return state, commands


def _take(state: State, event: Event, commands: list[Command]) -> None:
    match event:
        case RolloutFinished():
            state.finish(event, commands)
        case RolloutFailed():
            state.fail(event, commands)
        case EngineServes(version):
            state.serve(version)
        case EngineLost():
            state.lose_engine()
        case BatchWanted():
            state.want(event.step, commands)
        case StepDone():
            state.publish(event.step, commands)
        case CheckpointSaved():
            state.train_through(event.step, commands)
            state.cover(event.covered, commands)
        case EvaluationFinished():
            state.finish_evaluation(event, commands)
        case Resumed():
            state.resume(commands)


def waiting_for(state: State) -> str:
    """One sentence for the person who wonders why nothing happens."""
    if state.ended:
        return "the trainer to export the result"
    if state.served is None:
        return "the inference server to answer"
    if state.evaluating is not None and state.trained >= state.last_step:
        return f"the evaluation of version {state.evaluating}"
    if state.loading is not None and state.num_running == 0:
        return f"the engine to load version {state.loading}"
    if state.num_running and state.is_generating:
        oldest = next(number for number, group in state.groups.items() if group.pending)
        return f"{state.num_running} rollouts, the oldest of group {oldest}"
    if state.wanted is None and state.offered <= state.trained:
        return f"the trainer to ask for the batch of step {state.trained + 1}"
    return f"the trainer to finish step {state.trained + 1}"
