"""One evaluation during training: held-out tasks, a bounded number at once, and what their rollouts add up to."""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from hone.config.recipe import EvaluationSection
from hone.orchestrator.dispatch import Key
from hone.schema.rollouts import RolloutRequest
from hone.schema.sampling import SamplingParameters
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, Trace

logger = logging.getLogger("hone.orchestrator.evaluation")

PREFIX = "eval-"
"""How the names of evaluation groups begin."""


class HeldOut(Protocol):
    """What an evaluation needs of an environment."""

    @property
    def num_held_out_tasks(self) -> int | None: ...

    @property
    def scores_groups(self) -> bool: ...

    def held_out_task(self, index: int) -> Task: ...

    def is_solved(self, trace: Trace) -> bool: ...


@dataclass(slots=True)
class _Tally:
    is_solved: Callable[[Trace], bool]
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_failed: int = 0
    versions: set[int] = field(default_factory=set)

    def add(self, trace: Trace) -> None:
        try:
            is_solved = float(self.is_solved(trace))
        except Exception as error:  # code of an environment may raise anything
            logger.warning("environment %r cannot tell whether a rollout solved its task: %r", trace.environment, error)
            self.num_failed += 1
            return
        self.values["reward"].append(trace.reward)
        self.values["solved"].append(is_solved)
        self.values["truncated"].append(float(trace.is_truncated))
        self.values["completion_tokens"].append(trace.num_completion_tokens)
        for name, reward in trace.rewards.items():
            self.values[f"reward_{name}"].append(reward.value)
        for name, metric in trace.metrics.items():
            self.values[f"metric_{name}"].append(metric)
        self.versions.update(run.version for turn in trace.turns for run in turn.versions)


class Evaluation:
    """The rollouts of one evaluation; `version` is its name, the tokens tell what really sampled."""

    def __init__(
        self,
        version: int,
        environments: dict[str, HeldOut],
        section: EvaluationSection,
        *,
        run_seed: int,
        max_attempts: int,
    ) -> None:
        self.version = version
        self._max_concurrent = section.max_concurrent
        self._max_attempts = max_attempts
        self._tallies = {name: _Tally(environment.is_solved) for name, environment in environments.items()}
        # The same seed for every version: what differs between two evaluations is the policy alone.
        seed = derive_seed(run_seed, "evaluation")
        sampling = section.sampling
        parameters = SamplingParameters(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
        )
        self._requests = deque(
            RolloutRequest(
                group=f"{PREFIX}{version:06d}-{name}-{index}",
                environment=name,
                task=task,
                attempts=attempts,
                sampling=parameters,
                seed=seed,
            )
            for name, environment in environments.items()
            for index, task in self._tasks_of(name, environment, section)
            for attempts in _requests_of(environment, section.attempts)
        )
        self._running: dict[Key, RolloutRequest] = {}
        self._failures: dict[Key, int] = defaultdict(int)

    def _tasks_of(self, name: str, environment: HeldOut, section: EvaluationSection) -> Iterator[tuple[int, Task]]:
        for index in range(_num_tasks(environment, section.num_tasks)):
            try:
                yield index, environment.held_out_task(index)
            except Exception as error:  # code of an environment may raise anything
                logger.warning("environment %r gives no held-out task %d: %r", name, index, error)
                self._tallies[name].num_failed += section.attempts

    @property
    def is_complete(self) -> bool:
        return not self._requests and not self._running

    def waits_for(self, key: Key) -> bool:
        return key in self._running

    def start(self) -> list[RolloutRequest]:
        """What may start now."""
        started = []
        while self._requests and self._has_room_for(self._requests[0]):
            request = self._requests.popleft()
            self._running |= {(request.group, attempt): request for attempt in request.attempts}
            started.append(request)
        return started

    def _has_room_for(self, request: RolloutRequest) -> bool:
        """A group that is larger than what may run at once runs alone."""
        return not self._running or len(self._running) + len(request.attempts) <= self._max_concurrent

    def environment_of(self, key: Key) -> str:
        """Whose rollout this is, by the name in the recipe."""
        return self._running[key].environment

    def finish(self, key: Key, trace: Trace) -> None:
        self._tallies[self._running.pop(key).environment].add(trace)

    def fail(self, key: Key, kind: FailureClass, *, is_final: bool = False) -> RolloutRequest | None:
        """The request to send for this attempt, or None when the rollout is given up, as one that is final is."""
        self._failures[key] += kind is not FailureClass.CANCELLED
        if not is_final and self._failures[key] < self._max_attempts:
            return msgspec.structs.replace(self._running[key], attempts=[key[1]])
        self._tallies[self._running.pop(key).environment].num_failed += 1
        return None

    def num_failures(self, key: Key) -> int:
        return self._failures[key]

    @property
    def reward(self) -> float:
        """The mean reward over all valid rollouts; minus infinity when there is none."""
        rewards = [reward for tally in self._tallies.values() for reward in tally.values["reward"]]
        return _mean(rewards) if rewards else float("-inf")

    def report(self) -> dict[str, object]:
        """What is kept in the run's `evals` folder."""
        versions = set().union(*(tally.versions for tally in self._tallies.values()))
        return {
            "version": self.version,
            "min_version": min(versions, default=None),
            "max_version": max(versions, default=None),
            "reward_mean": self.reward if self.reward > float("-inf") else None,
            "environments": {
                name: {
                    "num_rollouts": len(tally.values["reward"]),
                    "num_failed": tally.num_failed,
                    **{f"{key}_mean": _mean(values) for key, values in tally.values.items() if values},
                }
                for name, tally in self._tallies.items()
            },
        }

    def metrics(self) -> dict[str, float]:
        """The same as flat metrics."""
        values: dict[str, float] = {}
        for name, tally in self._tallies.items():
            values[f"eval/{name}/failed_count"] = tally.num_failed
            values |= {f"eval/{name}/{key}_mean": _mean(found) for key, found in tally.values.items() if found}
        return values


def _requests_of(environment: HeldOut, attempts: int) -> list[list[int]]:
    """The attempts of each request: all in one where they are scored together."""
    numbers = list(range(attempts))
    return [numbers] if environment.scores_groups else [[number] for number in numbers]


def _num_tasks(environment: HeldOut, wanted: int) -> int:
    count = environment.num_held_out_tasks
    return wanted if count is None else min(wanted, count)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
