"""Pools and levels: which task comes next, and that the ledger alone says so after any crash."""

import copy
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.config.recipe import CurriculumSection, EnvironmentSection, PoolsSection
from hone.orchestrator.curriculum import Curriculum, Levels, Outcome, check_curriculum, curriculum_of, solve_rate
from hone.orchestrator.ledger import Ledger
from hone.orchestrator.mixture import Mixture
from hone.orchestrator.recovery import restore_mixture
from hone.schema.messages import Message
from hone.schema.tasks import Task
from hone.transport.traces import Location

POOLS = PoolsSection(easy_share=0.2, hard_share=0.1, easy_from=0.75, hard_to=0.25, retire_after=2)
LEVELS = CurriculumSection(start_share=0.25, step_share=0.25, advance_at=0.5, window=4)


class Numbers:
    """Tasks of which the number is the difficulty."""

    def __init__(self, count, has_difficulty=True):
        self.num_train_tasks = count
        self.has_difficulty = has_difficulty

    def train_task(self, index):
        return Task(prompt=(Message("user", str(index)),))

    def difficulty(self, task):
        return float(task.prompt[0].content)


def curriculum(count=20, pools=POOLS, levels=None, seed=0):
    return Curriculum(count, seed, pools, None if levels is None else Levels(levels, range(count), seed))


def play(one, draws, rate_of):
    """Draw and finish one group after the other; the draws."""
    drawn = []
    for _ in range(draws):
        drawn.append(one.draw())
        one.record(Outcome(drawn[-1], rate_of(drawn[-1])))
    return drawn


def test_the_solve_rate_counts_rewards_that_are_at_least_the_one_of_a_solved_task():
    assert solve_rate([1.0, 0.5, 1 - 1e-12, 0.0], 1.0) == 0.5
    assert solve_rate([1.0, 0.5, 0.2, 0.0], 0.5) == 0.5


def test_every_task_comes_once_before_any_comes_again_while_all_are_normal():
    drawn = play(curriculum(), 60, lambda index: 0.5)
    for start in (0, 20, 40):
        assert sorted(drawn[start : start + 20]) == list(range(20))
    assert len({tuple(drawn[start : start + 20]) for start in (0, 20, 40)}) == 3


def test_each_pool_has_its_share_of_the_turns_when_it_has_tasks():
    one = curriculum(30, PoolsSection(easy_share=0.2, hard_share=0.1))
    rates = [1.0] * 10 + [0.5] * 10 + [0.0] * 10
    play(one, 60, rates.__getitem__)
    drawn = Counter(index // 10 for index in play(one, 1000, rates.__getitem__))
    assert (drawn[0], drawn[1], drawn[2]) == (200, 700, 100)
    assert one.sizes() == {"normal": 10, "hard": 10, "easy": 10, "retired": 0, "unseen": 0, "closed": 0}


def test_turns_of_an_empty_pool_go_to_normal_tasks_and_unseen_ones_are_normal():
    one = curriculum(10)
    assert sorted(one.draw() for _ in range(10)) == list(range(10))


@pytest.mark.parametrize(
    ("rates", "pool"),
    [([0.75], "easy"), ([0.25], "hard"), ([0.26], "normal"), ([1.0, 0.0], "hard"), ([0.0, 0.5], "normal")],
)
def test_a_task_is_in_the_pool_of_its_latest_group(rates, pool):
    one = curriculum(1)
    for rate in rates:
        play(one, 1, lambda index, rate=rate: rate)
    assert one.sizes()[pool] == 1


def test_no_task_is_drawn_twice_at_once_while_there_are_others():
    one = curriculum(20)
    play(one, 40, lambda index: 1.0 if index else 0.5)  # one normal task, all others are retired
    under_way = [one.draw() for _ in range(20)]
    assert sorted(under_way) == list(range(20))
    assert sorted(one.draw() for _ in range(20)) == list(range(20))
    one = curriculum(20)
    under_way = [one.draw() for _ in range(20)]
    one.leave_out(under_way[7])
    assert one.draw() == under_way[7]


def test_a_task_that_is_always_solved_is_retired():
    one = curriculum(10)
    play(one, 200, lambda index: 1.0 if index < 5 else 0.5)
    assert one.sizes()["retired"] == 5
    assert min(play(one, 200, lambda index: 0.5)) >= 5


def test_a_failure_in_between_keeps_a_task_from_being_retired():
    one = curriculum(1)
    play(one, 1, lambda index: 1.0)
    play(one, 1, lambda index: 0.9)
    play(one, 1, lambda index: 1.0)
    assert one.sizes()["retired"] == 0
    assert one.sizes()["easy"] == 1


def test_when_all_are_retired_they_come_again_and_may_return():
    one = curriculum(3)
    play(one, 20, lambda index: 1.0)
    assert one.sizes()["retired"] == 3
    [returned] = play(one, 1, lambda index: 0.5)
    assert (one.sizes()["retired"], one.sizes()["normal"]) == (2, 1)
    assert play(one, 1, lambda index: 0.5) == [returned]


def test_levels_open_from_easy_to_hard_as_the_solve_rate_rises():
    one = curriculum(20, None, LEVELS)
    assert set(play(one, 30, lambda index: 0.4)) == set(range(5))
    assert one.sizes()["closed"] == 15
    play(one, 1, lambda index: 1.0)  # the latest four: 0.4, 0.4, 0.4, 1.0
    assert set(play(one, 5, lambda index: 0.0)) == set(range(5, 10))
    play(one, 200, lambda index: 1.0)
    assert one.sizes()["closed"] == 0


def test_a_level_is_shuffled_and_opens_whole():
    one = curriculum(400, None, LEVELS)
    drawn = [one.draw() for _ in range(100)]
    assert sorted(drawn) == list(range(100))
    assert drawn != sorted(drawn)


@pytest.mark.parametrize(("start", "step", "sizes"), [(0.3, 0.3, [3, 6, 9, 10]), (0.01, 0.99, [1, 10])])
def test_every_task_is_on_a_level(start, step, sizes):
    section = CurriculumSection(start_share=start, step_share=step, advance_at=0.5, window=1)
    levels, found = Levels(section, range(10), 0), []
    for _ in sizes:
        found.append(levels.num_open)
        levels.record(1.0)
    levels.record(1.0)
    assert found == sizes
    assert levels.num_open == 10


def test_pools_and_levels_work_together():
    one = curriculum(20, POOLS, LEVELS)
    assert max(play(one, 40, lambda index: 0.25)) < 5
    assert one.sizes() == {"normal": 0, "hard": 5, "easy": 0, "retired": 0, "unseen": 0, "closed": 15}


HISTORIES = st.tuples(
    st.integers(1, 12), st.sampled_from([POOLS, None]), st.sampled_from([LEVELS, None]), st.integers(0, 2**32)
)


@given(HISTORIES, st.integers(0, 80))
def test_draws_and_outcomes_alone_say_how_it_goes_on(history, length):
    """Groups end in any order, some without an outcome; a curriculum that is told of them later is the same."""
    count, pools, levels, seed = history
    dice = random.Random(seed)
    live, drawn, running, outcomes = curriculum(count, pools, levels), [], [], []
    for _ in range(length):
        if running and dice.random() < 0.5:
            index = running.pop(dice.randrange(len(running)))
            if dice.random() < 0.9:
                outcomes.append(Outcome(index, dice.choice([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])))
                live.record(outcomes[-1])
            else:
                live.leave_out(index)
        else:
            drawn.append(live.draw())
            running.append(drawn[-1])
    resumed = curriculum(count, pools, levels)
    resumed.restore(sorted(drawn), sorted(running), outcomes)
    assert resumed.sizes() == live.sizes()
    assert [resumed.draw() for _ in range(30)] == [live.draw() for _ in range(30)]


SECTIONS = (
    EnvironmentSection(name="math", weight=0.7, pools=POOLS),
    EnvironmentSection(name="code", weight=0.2, pools=POOLS, curriculum=LEVELS, solved_reward=0.5),
    EnvironmentSection(name="plain", weight=0.1),
)
ENVIRONMENTS = {"math": Numbers(15), "code": Numbers(8), "plain": Numbers(4)}
SOLVED = {section.name: section.reward_of_solved for section in SECTIONS}


def make_mixture():
    curricula = {section.name: curriculum_of(section, ENVIRONMENTS[section.name], 7) for section in SECTIONS}
    weights = {section.name: section.weight for section in SECTIONS}
    return Mixture(weights, ENVIRONMENTS, 7, {name: one for name, one in curricula.items() if one is not None})


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_a_mixture_with_curricula_is_found_again_in_the_ledger_at_every_commit(tmp_path_factory, seed):
    """Groups are filtered, batched, dropped and cancelled, attempts fail; after each commit the run may be killed."""
    dice = random.Random(seed)
    path = tmp_path_factory.mktemp("run") / "ledger.sqlite"
    live, running, ready, steps = make_mixture(), {}, [], 0
    with Ledger(path, {}) as ledger:
        for number in range(120):
            draw = live.draw()
            ledger.admit(number, draw, "key", 0, 3)
            ledger.run(number, [0, 1, 2])
            running[number] = draw
            while running and dice.random() < 0.5:
                end_a_group(dice, ledger, live, running, ready)
            if len(ready) >= 4:
                steps += 1
                ledger.batch(steps, [ready.pop() for _ in range(4)], 12)
            if dice.random() < 0.2:
                ledger.commit()
                resumed = make_mixture()
                restore_mixture(resumed, ledger, SOLVED)
                same = copy.deepcopy(live)
                assert [resumed.draw() for _ in range(25)] == [same.draw() for _ in range(25)]


def end_a_group(dice, ledger, live, running, ready):
    """As the loop does it for FinishGroup, FilterGroup, DropGroup and CancelGroup."""
    number = dice.choice(sorted(running))
    draw = running.pop(number)
    end = dice.choice(["finish", "finish", "filter", "drop"])
    rewards = [1.0] * 3 if end == "filter" else [dice.choice([0.0, 0.6, 1.0]) for _ in range(dice.choice([2, 3]))]
    for attempt, reward in enumerate(rewards):
        ledger.finish(number, attempt, reward, 0, Location(0, 0))
    if len(rewards) == 2:
        ledger.fail(number, 2, "tool")
    if end == "drop":
        if draw.environment in live.curricula:
            live.curricula[draw.environment].leave_out(draw.index)
        ledger.fail_group(number, "cancelled")
        return
    if draw.environment in live.curricula:
        rate = solve_rate(rewards, SOLVED[draw.environment])
        live.curricula[draw.environment].record(Outcome(draw.index, rate))
    ledger.filter_group(number) if end == "filter" else ledger.finish_group(number)
    ready += [number] if end == "finish" else []


@pytest.mark.parametrize("fields", [{"pools": POOLS}, {"curriculum": LEVELS}])
def test_endless_tasks_have_no_pools_and_no_levels(fields):
    with pytest.raises(ValueError, match=r"of 'math': its train tasks are endless"):
        check_curriculum(EnvironmentSection(name="math", **fields), Numbers(None))


def test_a_curriculum_needs_difficulties_that_are_numbers():
    section = EnvironmentSection(name="math", curriculum=LEVELS)
    with pytest.raises(ValueError, match="declares no difficulty"):
        check_curriculum(section, Numbers(3, has_difficulty=False))

    class Odd(Numbers):
        def difficulty(self, task):
            return {"0": 1.0, "1": float("nan")}[task.prompt[0].content]

    with pytest.raises(ValueError, match="train task 1 has difficulty nan"):
        curriculum_of(section, Odd(2), 0)
    Odd.difficulty = lambda self, task: {"0": 1.0, "1": 2.0}[task.prompt[0].content]
    with pytest.raises(ValueError, match=r"does not tell the difficulty of train task 2: KeyError"):
        curriculum_of(section, Odd(3), 0)


def test_without_sections_there_is_no_curriculum():
    assert curriculum_of(EnvironmentSection(name="math"), Numbers(3), 0) is None


def test_a_ledger_with_tasks_that_are_gone_is_refused():
    with pytest.raises(ValueError, match="train task 5 of an environment that now has 3"):
        curriculum(3).restore([0, 5], [], [])
