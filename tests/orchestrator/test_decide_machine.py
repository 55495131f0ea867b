"""An adversarial world around the decisions: no order of events breaks the bound, loses a group, or gets stuck."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from hone.envs.retries import DEFAULT, NO_FAILURES
from hone.orchestrator import decide as d
from hone.orchestrator import events as e
from hone.schema.batches import BatchWanted, CheckpointSaved, StepDone
from hone.schema.traces import FailureClass

KINDS = [FailureClass.SANDBOX, FailureClass.ENVIRONMENT, FailureClass.CANCELLED, FailureClass.WORKER]

LIMITS = st.builds(
    d.Limits,
    groups_per_batch=st.integers(1, 4),
    group_size=st.integers(2, 3),
    max_staleness=st.integers(0, 4),
    num_steps=st.integers(1, 12),
    max_concurrent=st.integers(3, 80),
    in_flight_updates=st.booleans(),
    filter_without_signal=st.booleans(),
    evaluate_every=st.sampled_from([None, 1, 3]),
)


class World:
    """Engine, trainer, workers and ledger as the decisions see them. Any of `actions()` may happen next.

    `engine` is the version that really samples; it may be ahead of what was acknowledged. A running attempt remembers
    the version at which it was issued and finishes with any from there to the engine's.
    """

    def __init__(self, limits):
        self.limits = limits
        self.state = d.State(limits)
        self.engine = 0
        self.to_load = None
        self.running = {}  # (group, attempt) -> lowest version that may have sampled a token of it
        self.groups = {}  # the ledger's view of outstanding groups
        self.complete = []  # those that wait for a batch, in order of completion
        self.outcomes = {}  # what became of the others
        self.versions = {}  # group -> lowest version of its valid rollouts
        self.batches = {}
        self.published = self.checkpoint = self.trainer_step = 0
        self.has_batch = None
        self.asked = self.trainer_ended = self.run_ended = False
        self.evaluating = None
        self.evaluated = []
        self.tell(e.EngineServes(0))

    def tell(self, event):
        self.state, commands = d.decide(self.state, event)
        for command in commands:
            self.perform(command)
        self.check()

    def perform(self, command):
        match command:
            case e.StartGroup(group, version):
                assert group not in self.groups
                assert group not in self.outcomes
                assert version <= self.engine
                self.groups[group] = d.Group(version, dict.fromkeys(range(self.limits.group_size), NO_FAILURES))
                self.running |= {(group, attempt): self.engine for attempt in range(self.limits.group_size)}
                assert self.limits.in_flight_updates or self.to_load is None
            case e.RunAgain(group, attempt, failures):
                assert all(count <= DEFAULT[kind] for kind, count in failures.items())
                self.groups[group].pending[attempt] = failures
                self.running[group, attempt] = self.engine
            case e.GiveUpAttempt(group, attempt):
                del self.groups[group].pending[attempt]
            case e.FinishGroup(group):
                assert not self.groups[group].pending
                self.complete.append(group)
            case e.FilterGroup(group) | e.DropGroup(group):
                assert not self.groups[group].pending
                self.leave(group, type(command).__name__)
            case e.FormBatch(step, groups):
                self.form(step, groups)
            case e.OfferBatch(step):
                assert step in self.batches
                assert step == self.trainer_step + 1
                self.has_batch, self.asked = step, False
            case e.EndTraining(last_step):
                assert last_step == self.limits.num_steps == self.trainer_step
                self.trainer_ended, self.asked = True, False
            case e.LoadWeights(version):
                assert self.to_load is None
                assert self.limits.in_flight_updates or (not self.running and self.evaluating is None)
                self.to_load = version
            case e.StartEvaluation(version):
                assert self.evaluating is None
                assert self.limits.in_flight_updates or self.to_load is None
                self.evaluating = version
            case e.EndRun():
                self.run_ended = True
            case e.MarkTrained(step) | e.ForgetBatches(step):
                assert step <= len(self.batches)
            case _:
                raise AssertionError(command)

    def form(self, step, groups):
        assert step == len(self.batches) + 1
        assert len(set(groups)) == self.limits.groups_per_batch
        deadlines = [self.versions[group] for group in groups]
        assert max(step - 1 - version for version in deadlines) <= self.limits.max_staleness
        order = [(self.versions[group], self.complete.index(group)) for group in groups]
        assert order == sorted(order), "not the earliest deadline first, then in order of completion"
        left = [self.versions[group] for group in self.complete if group not in groups]
        assert not left or max(deadlines) <= min(left)
        for group in groups:
            self.complete.remove(group)
            self.leave(group, "batched")
        self.batches[step] = groups

    def leave(self, group, outcome):
        assert group not in self.outcomes
        del self.groups[group]
        self.outcomes[group] = outcome

    def check(self):
        state = self.state
        assert state.num_running == sum(len(group.pending) for group in state.groups.values())
        assert state.num_running <= self.limits.max_concurrent
        assert sum(state.num_by_deadline.values()) == len(state.groups)
        assert state.num_ready == sum(map(len, state.ready.values())) == len(self.complete)
        assert set(state.groups) == set(self.groups)
        assert set(self.running) == {(n, attempt) for n, group in state.groups.items() for attempt in group.pending}
        assert state._has_room(), "an outstanding group has no place in time"
        size = self.limits.groups_per_batch
        assert len(self.batches) * size + len(self.groups) <= self.limits.num_steps * size

    # What may happen.

    def actions(self):
        possible = [self.engine_restarts, self.trainer_restarts, self.orchestrator_restarts]
        possible += [self.rollout_finishes, self.rollout_fails] if self.running else []
        possible += [self.late_answer] if self.outcomes else []
        possible += [self.engine_swaps, self.engine_acknowledges] if self.to_load is not None else []
        possible += [self.evaluation_ends] if self.evaluating is not None else []
        possible += [self.trainer_steps] if self.has_batch else []
        possible += [self.trainer_asks] if not self.has_batch and not self.trainer_ended else []
        return possible

    def rollout_finishes(self, dice):
        # Leaning to the young ones makes stragglers.
        key = max(dice.choices(sorted(self.running), k=2))
        version = dice.randint(self.running.pop(key), self.engine)
        group, attempt = key
        reward = float(dice.random() < 0.5)
        del self.groups[group].pending[attempt]
        self.groups[group].record(attempt, reward, version)
        self.versions[group] = min(version, self.versions.get(group, version))
        self.tell(e.RolloutFinished(group, attempt, reward, version))

    def rollout_fails(self, dice):
        key = dice.choice(sorted(self.running))
        del self.running[key]
        self.tell(e.RolloutFailed(*key, dice.choice(KINDS), is_final=dice.random() < 0.2))

    def late_answer(self, dice):
        group = dice.choice(sorted(self.outcomes))
        before = len(self.outcomes), len(self.batches)
        self.tell(e.RolloutFinished(group, 0, 1.0, 0))
        self.tell(e.RolloutFailed(group, 0, FailureClass.WORKER))
        assert (len(self.outcomes), len(self.batches)) == before

    def engine_restarts(self, dice):
        self.tell(e.EngineLost())
        self.engine, self.to_load = self.published, None
        self.tell(e.EngineServes(self.engine))

    def engine_swaps(self, dice):
        self.engine = self.to_load

    def engine_acknowledges(self, dice):
        self.engine, self.to_load = self.to_load, None
        self.tell(e.EngineServes(self.engine))

    def evaluation_ends(self, dice):
        version, self.evaluating = self.evaluating, None
        self.evaluated.append(version)
        self.tell(e.EvaluationFinished(version, 0.5))

    def trainer_asks(self, dice):
        self.asked = True
        self.tell(BatchWanted(self.trainer_step + 1))

    def trainer_steps(self, dice):
        self.trainer_step, self.has_batch = self.has_batch, None
        self.published = max(self.published, self.trainer_step)
        self.tell(StepDone(self.trainer_step, f"weights/v{self.trainer_step}"))
        if dice.random() < 0.3:
            self.checkpoint = self.trainer_step
            self.tell(CheckpointSaved(self.trainer_step, self.trainer_step))

    def trainer_restarts(self, dice):
        self.trainer_step, self.has_batch, self.trainer_ended = self.checkpoint, None, False
        self.trainer_asks(dice)

    def orchestrator_restarts(self, dice):
        state = d.State(self.limits)
        for number in [*(number for number in self.groups if number not in self.complete), *self.complete]:
            group = self.groups[number]
            copy = d.Group(group.version, dict(group.pending), dict(group.rewards), min_version=group.min_version)
            state.restore_group(number, copy)
        state.next_group = len(self.groups) + len(self.outcomes)
        state.num_batches = len(self.batches)
        state.trained, state.covered, state.offered = self.state.trained, self.state.covered, self.state.offered
        state.published = self.published
        state.evaluated = max(self.evaluated, default=-1)
        self.state = state
        self.running = {}
        self.evaluating = self.to_load = None
        self.tell(e.Resumed())
        self.tell(e.EngineServes(self.engine))
        if self.asked:
            self.tell(BatchWanted(self.trainer_step + 1))

    # The end.

    def cooperate(self):
        """Liveness: from any state, a world in which everything that runs ends brings the run to its end."""
        dice = random.Random(0)
        self.engine_restarts(dice)
        others = {self.engine_restarts, self.trainer_restarts, self.orchestrator_restarts, self.rollout_fails}
        others |= {self.late_answer, self.trainer_asks}
        for _ in range(20_000):
            if self.run_ended and self.trainer_ended:
                break
            useful = [action for action in self.actions() if action not in others]
            if useful:
                dice.choice(useful)(dice)
            else:
                self.trainer_asks(dice)
                assert {*self.actions()} - others or self.trainer_ended, d.waiting_for(self.state)
        assert self.run_ended, "it never ends"
        assert sorted(self.batches) == list(range(1, self.limits.num_steps + 1))
        assert not self.groups, "finished groups were left over"
        trained = [group for groups in self.batches.values() for group in groups]
        assert sorted(trained) == sorted(group for group, outcome in self.outcomes.items() if outcome == "batched")
        assert len(trained) == len(set(trained))
        assert not self.limits.evaluate_every or self.evaluated[-1] == self.limits.num_steps


class Machine(RuleBasedStateMachine):
    """Short histories, chosen action by action: these shrink to something readable."""

    @initialize(limits=LIMITS)
    def begin(self, limits):
        self.world = World(limits)

    @rule(data=st.data(), seed=st.integers(0, 3))
    def something_happens(self, data, seed):
        actions = {action.__name__: action for action in self.world.actions()}
        actions[data.draw(st.sampled_from(sorted(actions)))](random.Random(seed))

    def teardown(self):
        if hasattr(self, "world"):
            self.world.cooperate()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(LIMITS, st.integers(0, 2**32), st.integers(0, 1500))
def test_long_histories_keep_the_bound_and_end(limits, seed, length):
    dice = random.Random(seed)
    world = World(limits)
    weights = {}  # every history has its own character: calm, crashing, slow to train, slow to generate ...
    for _ in range(length):
        actions = world.actions()
        for action in actions:
            weights.setdefault(action.__name__, dice.choice([0.02, 0.3, 1.0, 5.0]))
        [action] = dice.choices(actions, [weights[action.__name__] for action in actions])
        action(dice)
    world.cooperate()
