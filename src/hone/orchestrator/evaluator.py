"""The evaluations of a run, one after the other: asks for their rollouts and writes down what they found."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping

from hone.config.recipe import EvaluationSection
from hone.envs.environment import Environment
from hone.envs.retries import Retries
from hone.observability.logs import fields
from hone.observability.metrics import Metrics
from hone.observability.spans import Spans
from hone.orchestrator.dispatch import Key
from hone.orchestrator.evaluation import Evaluation
from hone.orchestrator.events import EvaluationFinished
from hone.orchestrator.purposes import Submit, complaint_of
from hone.schema.rollouts import RolloutRequest
from hone.schema.traces import FailureClass, Trace
from hone.transport.folders import RunFolder
from hone.transport.traces import Location

logger = logging.getLogger("hone.orchestrator.evaluator")


class Evaluator:
    """The purpose of rollouts at held-out tasks. post: takes the event when an evaluation is complete and written."""

    min_valid = 1

    def __init__(
        self,
        folder: RunFolder,
        environments: Mapping[str, Environment],
        section: EvaluationSection,
        *,
        run_seed: int,
        retries: Retries,
        submit: Submit,
        post: Callable[[EvaluationFinished], None],
        spans: Spans,
        metrics: Metrics,
    ) -> None:
        self.group_size = section.num_attempts
        self._folder = folder
        self._environments = environments
        self._section = section
        self._run_seed = run_seed
        self._retries = retries
        self._submit = submit
        self._post = post
        self._spans = spans
        self._metrics = metrics
        self._evaluation: Evaluation | None = None
        self._began_at = 0.0

    def start(self, version: int) -> None:
        """Evaluate the policy that is served now under the name of `version`; the evaluation before is complete."""
        self._evaluation = Evaluation(
            version, self._environments, self._section, run_seed=self._run_seed, retries=self._retries
        )
        self._began_at = time.time()
        self._go_on(self._evaluation)

    # As a purpose of rollouts.

    def waits_for(self, key: Key) -> bool:
        return self._evaluation is not None and self._evaluation.waits_for(key)

    def environment_of(self, key: Key) -> str | None:
        return None if self._evaluation is None else self._evaluation.environment_of(key)

    def note_sent(self, request: RolloutRequest) -> None:
        """An evaluation that is interrupted begins anew: nothing is to be remembered."""

    def complaint_about(self, trace: Trace) -> tuple[FailureClass, str] | None:
        return None if trace.failure is None else (trace.failure.kind, complaint_of(trace.failure))

    def finish(self, key: Key, trace: Trace, location: Location) -> None:
        assert self._evaluation is not None, "results of no evaluation are not welcome"
        self._evaluation.finish(key, trace)
        self._go_on(self._evaluation)

    def fail(self, key: Key, kind: FailureClass, complaint: str, *, is_final: bool = False) -> None:
        evaluation = self._evaluation
        if evaluation is None or not evaluation.waits_for(key):
            return
        request = evaluation.fail(key, kind, is_final=is_final)
        if request is not None:
            self._submit(request, evaluation.num_failures(key))
        self._go_on(evaluation)

    def _go_on(self, evaluation: Evaluation) -> None:
        for request in evaluation.start():
            self._submit(request, 0)
        if evaluation.is_complete:
            self._evaluation = None
            self._end(evaluation)

    def _end(self, evaluation: Evaluation) -> None:
        seconds = time.time() - self._began_at
        path = self._folder.eval_of(evaluation.version)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(evaluation.report() | {"seconds": seconds}, indent=2))
        temporary.replace(path)
        self._metrics.write(evaluation.metrics() | {"eval/duration_seconds": seconds}, evaluation.version)
        self._spans.record("evaluate", self._began_at, seconds, version=evaluation.version)
        logger.info("evaluated", extra=fields(version=evaluation.version, reward=evaluation.reward))
        self._post(EvaluationFinished(evaluation.version, evaluation.reward))


def read_evaluated(folder: RunFolder) -> list[EvaluationFinished]:
    """What the complete evaluations of a run found, by version."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.evals.glob("v*.json"))]
    return [EvaluationFinished(report["version"], _reward(report["reward_mean"])) for report in reports]


def _reward(mean: float | None) -> float:
    """A report has null where an evaluation had no valid rollout."""
    return -math.inf if mean is None else mean
