"""One evaluation during training: held-out tasks, a bounded number at once, scored as `hone eval` scores them."""

import logging
from collections import defaultdict, deque
from collections.abc import Mapping
from itertools import chain
from typing import Protocol

import msgspec

from hone.config.recipe import EvaluationSection
from hone.envs.retries import NO_FAILURES, Failures, Retries, counted, total
from hone.evals.asked import HeldOut, draw_held_out, sampling_parameters
from hone.evals.results import EvalResult, Outcome, Usage, outcome_of, summarise
from hone.evals.statistics import Estimate, estimate_mean
from hone.orchestrator.dispatch import Key
from hone.schema.rollouts import RolloutRequest
from hone.schema.seeds import derive_seed
from hone.schema.traces import FailureClass, Trace

logger = logging.getLogger("hone.orchestrator.evaluation")

PREFIX = "eval-"
"""How the names of evaluation groups begin."""


class Evaluated(HeldOut, Protocol):
    """What an evaluation needs of an environment."""

    @property
    def version(self) -> str: ...

    @property
    def scores_groups(self) -> bool: ...

    def is_solved(self, trace: Trace) -> bool: ...


class Evaluation:
    """The rollouts of one evaluation; `version` is its name, the tokens tell what really sampled."""

    def __init__(
        self,
        version: int,
        environments: Mapping[str, Evaluated],
        section: EvaluationSection,
        *,
        run_seed: int,
        retries: Retries,
    ) -> None:
        self.version = version
        self._environments = environments
        self._attempts = section.num_attempts
        self._max_concurrent = section.max_concurrent
        self._retries = retries
        self._outcomes: dict[str, list[Outcome]] = {name: [] for name in environments}
        self._usage = {name: Usage() for name in environments}
        self._versions: set[int] = set()
        self._requests = deque(self._plan(section, run_seed))
        self._num_wanted = dict.fromkeys(environments, 0)
        for request in self._requests:
            self._num_wanted[request.environment] += len(request.attempts)
        for name, outcomes in self._outcomes.items():  # the attempts at tasks that could not be made
            self._num_wanted[name] += len(outcomes)
        self._running: dict[Key, RolloutRequest] = {}
        self._failures: dict[Key, Failures] = {}

    def _plan(self, section: EvaluationSection, run_seed: int) -> list[RolloutRequest]:
        # The same seed for every version: what differs between two evaluations is the policy alone.
        seed = derive_seed(run_seed, "evaluation")
        sampling = sampling_parameters(section.sampling)
        requests = []
        for name, environment in self._environments.items():
            drawn = draw_held_out(environment, section.num_tasks)
            for index, error in drawn.errors.items():
                logger.warning("environment %r gives no held-out task %d: %s", name, index, error)
                self._outcomes[name] += [
                    Outcome(f"held-out task {index}", attempt, FailureClass.ENVIRONMENT)
                    for attempt in range(section.num_attempts)
                ]
            requests += [
                RolloutRequest(f"{PREFIX}{self.version:06d}-{name}-{index}", name, task, attempts, sampling, seed)
                for index, task in drawn.tasks.items()
                for attempts in _requests_of(environment, section.num_attempts)
            ]
        return requests

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
        name = self._running.pop(key).environment
        self._outcomes[name].append(outcome_of(trace, self._environments[name].is_solved))
        self._usage[name].add(trace)
        self._versions.update(run.version for turn in trace.turns for run in turn.versions)

    def fail(self, key: Key, kind: FailureClass, *, is_final: bool = False) -> RolloutRequest | None:
        """The request to send for this attempt, or None when the rollout is given up, as one that is final is."""
        failures = self._failures[key] = counted(self._failures.get(key, NO_FAILURES), kind)
        if not is_final and self._retries.permit(failures, kind):
            return msgspec.structs.replace(self._running[key], attempts=[key[1]])
        request = self._running.pop(key)
        self._outcomes[request.environment].append(Outcome(request.task.key, key[1], kind))
        return None

    def num_failures(self, key: Key) -> int:
        return total(self._failures[key])

    @property
    def reward(self) -> float:
        """The mean reward over the tasks of all environments; minus infinity when there is no valid rollout."""
        tasks: defaultdict[str, list[float]] = defaultdict(list)
        for name, outcome in chain.from_iterable(((n, o) for o in found) for n, found in self._outcomes.items()):
            if outcome.failure is None:
                tasks[f"{name} {outcome.task}"].append(outcome.reward)
        estimate = estimate_mean(tasks)
        return float("-inf") if estimate is None else estimate.mean

    def results(self) -> dict[str, EvalResult]:
        """By environment, what `hone eval` would write as its result.json."""
        return {
            name: summarise(
                outcomes,
                environment=name,
                version=self._environments[name].version,
                attempts=self._attempts,
                model=f"v{self.version:06d}",
                num_wanted=self._num_wanted[name],
                usage=self._usage[name],
            )
            for name, outcomes in self._outcomes.items()
        }

    def report(self) -> dict[str, object]:
        """What is kept in the run's `evals` folder."""
        return {
            "version": self.version,
            "min_version": min(self._versions, default=None),
            "max_version": max(self._versions, default=None),
            "reward_mean": self.reward if self.reward > float("-inf") else None,
            "environments": {
                name: msgspec.to_builtins(result, str_keys=True) for name, result in self.results().items()
            },
        }

    def metrics(self) -> dict[str, float]:
        """The same as flat metrics."""
        values: dict[str, float] = {}
        for name, result in self.results().items():
            values[f"eval/{name}/failed_count"] = result.num_failed
            values |= {f"eval/{name}/{key}_mean": e.mean for key, e in _means(result).items() if e is not None}
        return values


def _requests_of(environment: Evaluated, attempts: int) -> list[list[int]]:
    """The attempts of each request: all in one where they are scored together."""
    numbers = list(range(attempts))
    return [numbers] if environment.scores_groups else [[number] for number in numbers]


def _means(result: EvalResult) -> dict[str, Estimate | None]:
    return {
        "reward": result.reward,
        "solved": result.pass_at.get(1),
        "truncated": result.truncated,
        "completion_tokens": result.completion_tokens,
        **{f"reward_{name}": estimate for name, estimate in result.rewards.items()},
        **{f"metric_{name}": estimate for name, estimate in result.metrics.items()},
    }
