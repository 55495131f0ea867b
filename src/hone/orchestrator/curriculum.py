"""Which task of an environment comes next, by what its rollouts earned: pools by solve rate, levels of difficulty."""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from hone.config.load import ConfigError
from hone.config.recipe import CurriculumSection, EnvironmentSection, PoolsSection
from hone.envs.permutation import permuted
from hone.orchestrator.quotas import Quotas
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task

SLACK = 1e-9
"""What falls short of a threshold by no more than this was only rounded."""

NORMAL, HARD, EASY, RETIRED = "normal", "hard", "easy", "retired"
IN_NEED = (NORMAL, HARD, EASY, RETIRED)
"""Where a task is taken from when the pool whose turn it is has none."""


class Levelled(Protocol):
    """What a curriculum needs of an environment."""

    @property
    def num_train_tasks(self) -> int | None: ...

    @property
    def has_difficulty(self) -> bool: ...

    def train_task(self, index: int) -> Task: ...

    def difficulty(self, task: Task) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """A group that has ended: its task, and the share of its valid rollouts that solved it."""

    index: int
    solve_rate: float


def solve_rate(rewards: Sequence[float], solved_reward: float) -> float:
    """The share of the rollouts whose reward is at least that of a solved task."""
    return sum(reward >= solved_reward - SLACK for reward in rewards) / len(rewards)


def check_curriculum(section: EnvironmentSection, environment: Levelled) -> None:
    """Refuse pools and a curriculum for an environment that cannot have them."""
    for field, wanted in (("pools", section.pools), ("curriculum", section.curriculum)):
        if wanted is not None and environment.num_train_tasks is None:
            raise ConfigError(
                f"environments.{field} of {section.name!r}: its train tasks are endless, so none comes again and nothing"
                f" is known of the next; limit their number in environments.arguments, or remove environments.{field}"
            )
    if section.curriculum is not None and not environment.has_difficulty:
        raise ConfigError(
            f"environments.curriculum of {section.name!r}: the environment declares no difficulty of its tasks;"
            f" give its constructor one, or use environments.pools"
        )


def curriculum_of(section: EnvironmentSection, environment: Levelled, run_seed: int) -> "Curriculum | None":
    """The curriculum that a recipe wants for an environment; None where its tasks come in a shuffled order."""
    if section.pools is None and section.curriculum is None:
        return None
    check_curriculum(section, environment)
    seed = derive_seed(run_seed, "tasks", section.name)
    count = environment.num_train_tasks
    assert count is not None, "checked above"
    levels = None
    if section.curriculum is not None:
        levels = Levels(section.curriculum, _difficulties(section.name, environment, count), seed)
    return Curriculum(count, seed, section.pools, levels)


def _difficulties(name: str, environment: Levelled, count: int) -> list[float]:
    found = []
    for index in range(count):
        try:
            difficulty = environment.difficulty(environment.train_task(index))
        except Exception as error:  # code of an environment may raise anything
            raise ConfigError(
                f"environment {name!r} does not tell the difficulty of train task {index}: {error!r}"
            ) from error
        if not isinstance(difficulty, int | float) or not math.isfinite(difficulty):
            raise ConfigError(
                f"environment {name!r} says that train task {index} has difficulty {difficulty!r}; give a finite number"
            )
        found.append(float(difficulty))
    return found


class Levels:
    """Tasks open up from the easiest to the hardest, a level at a time, as the solve rate of what is open rises."""

    def __init__(self, section: CurriculumSection, difficulties: Sequence[float], seed: int) -> None:
        self._advance_at = section.advance_at
        self._recent: deque[float] = deque(maxlen=section.window)
        self._bounds = _bounds(section, len(difficulties))
        self._level = 0
        ranked = sorted(range(len(difficulties)), key=lambda index: (difficulties[index], index))
        self._order = [
            index
            for start, end in itertools.pairwise([0, *self._bounds])
            for index in sorted(ranked[start:end], key=lambda index: derive_seed(seed, "level", index))
        ]

    @property
    def num_open(self) -> int:
        """How many tasks may be drawn now."""
        return self._bounds[self._level]

    def index(self, position: int) -> int:
        """The task at a position of the order from easy to hard, in which a level is shuffled."""
        return self._order[position]

    def record(self, rate: float) -> None:
        """The solve rate of another group; `window` of them that are good enough on average open the next level."""
        if self._level == len(self._bounds) - 1:
            return
        self._recent.append(rate)
        is_full = len(self._recent) == self._recent.maxlen
        if is_full and math.fsum(self._recent) / len(self._recent) >= self._advance_at - SLACK:
            self._level += 1
            self._recent.clear()


def _bounds(section: CurriculumSection, num_tasks: int) -> list[int]:
    """How many tasks are open on each level."""
    share, step = Fraction(str(section.start_share)), Fraction(str(section.step_share))
    bounds = [math.ceil(num_tasks * share)]
    while bounds[-1] < num_tasks:
        share += step
        bounds.append(min(math.ceil(num_tasks * share), num_tasks))
    return bounds


class Curriculum:
    """Which of the tasks of one environment comes next.

    Among the tasks of a pool it is the one that was drawn least often, so every open task comes once before any comes
    again; unseen tasks are normal, and none is drawn while a group of it is under way, unless all are. The choice
    depends on which tasks were drawn, which are under way and on the outcomes in their order, and on nothing else: all
    of it is in the ledger, so a resumed run chooses what the interrupted one would have.
    """

    def __init__(self, num_tasks: int, seed: int, pools: PoolsSection | None, levels: Levels | None) -> None:
        self._num_tasks = num_tasks
        self._seed = seed
        self._pools = pools
        self._levels = levels
        self._turns = None if pools is None else Quotas(_shares(pools))
        self._seen: dict[int, _Seen] = {}
        self._free: dict[str, list[_Place]] = {pool: [] for pool in IN_NEED}
        self._sizes = dict.fromkeys(IN_NEED, 0)

    def sizes(self) -> dict[str, int]:
        """How many tasks are in each pool; `unseen` are those that may be drawn and were not yet, `closed` those of
        levels to come."""
        return self._sizes | {
            "unseen": self._num_open - len(self._seen),
            "closed": self._num_tasks - self._num_open,
        }

    def draw(self) -> int:
        """The index of the next task; `record` or `leave_out` says when its group has ended."""
        wanted = NORMAL if self._turns is None else self._turns.take()
        for pool in (wanted, *IN_NEED):
            index = self._least_drawn(pool)
            if index is not None:
                break
        else:
            index = min(self._seen, key=self._order_under_way)
        self._count(index).num_running += 1
        return index

    def record(self, outcome: Outcome) -> None:
        """A group has ended with a solve rate."""
        self._learn(outcome)
        self.leave_out(outcome.index)

    def leave_out(self, index: int) -> None:
        """A group of this task is not under way any more; without an outcome it says nothing about the task."""
        task = self._seen[index]
        task.num_running -= 1
        if not task.num_running:
            self._set_free(index, task)

    def restore(self, drawn: Iterable[int], under_way: Iterable[int], outcomes: Iterable[Outcome]) -> None:
        """Go on after these draws, in any order, of which some are under way, and these outcomes, as they came."""
        for index in drawn:
            if index >= self._num_tasks:
                raise ConfigError(
                    f"the ledger has train task {index} of an environment that now has {self._num_tasks};"
                    f" give it the data that the run began with, or start a new run with another run.name"
                )
            self._count(index)
            if self._turns is not None:
                self._turns.take()
        for index in under_way:
            self._seen[index].num_running += 1
        for outcome in outcomes:
            self._learn(outcome)
        for index, task in self._seen.items():
            if not task.num_running:
                self._set_free(index, task)

    @property
    def _num_open(self) -> int:
        return self._num_tasks if self._levels is None else self._levels.num_open

    def _least_drawn(self, pool: str) -> int | None:
        if pool == NORMAL and len(self._seen) < self._num_open:
            return self._unseen(len(self._seen))
        free = self._free[pool]
        return heapq.heappop(free)[2] if free else None

    def _unseen(self, position: int) -> int:
        if self._levels is not None:
            return self._levels.index(position)
        return permuted(position, self._num_tasks, derive_seed(self._seed, "unseen"))

    def _count(self, index: int) -> "_Seen":
        task = self._seen.get(index)
        if task is None:
            task = self._seen[index] = _Seen()
            self._sizes[task.pool] += 1
        task.num_drawn += 1
        return task

    def _learn(self, outcome: Outcome) -> None:
        if self._levels is not None:
            self._levels.record(outcome.solve_rate)
        if self._pools is None:
            return
        task = self._seen[outcome.index]
        task.streak = task.streak + 1 if outcome.solve_rate == 1 else 0
        self._sizes[task.pool] -= 1
        task.pool = _pool(self._pools, outcome.solve_rate, task.streak)
        self._sizes[task.pool] += 1

    def _set_free(self, index: int, task: "_Seen") -> None:
        heapq.heappush(self._free[task.pool], self._place(index, task))

    def _place(self, index: int, task: "_Seen") -> "_Place":
        return task.num_drawn, derive_seed(self._seed, "drawn", index, task.num_drawn), index

    def _order_under_way(self, index: int) -> tuple[int, bool, "_Place"]:
        """Whose turn it is when a group of every task is under way."""
        task = self._seen[index]
        return task.num_running, task.pool == RETIRED, self._place(index, task)


_Place = tuple[int, int, int]
"""A task's place in its pool: how often it was drawn, a number derived from the seed, its index."""


@dataclass(slots=True)
class _Seen:
    """A task that was drawn. num_running: its groups under way. streak: groups in a row that every rollout solved."""

    num_drawn: int = 0
    num_running: int = 0
    streak: int = 0
    pool: str = NORMAL


def _shares(pools: PoolsSection) -> dict[str, Fraction]:
    easy, hard = Fraction(str(pools.easy_share)), Fraction(str(pools.hard_share))
    shares = {NORMAL: 1 - easy - hard, EASY: easy, HARD: hard}
    return {pool: share for pool, share in shares.items() if share}


def _pool(pools: PoolsSection, rate: float, streak: int) -> str:
    if pools.retire_after is not None and streak >= pools.retire_after:
        return RETIRED
    return EASY if rate >= pools.easy_from else HARD if rate <= pools.hard_to else NORMAL
