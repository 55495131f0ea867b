"""Groups of traces to the training batch of a step, and the numbers that describe both."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from hone.config.recipe import RlSection
from hone.orchestrator.advantages import advantages, normalised
from hone.orchestrator.samples import training_samples
from hone.schema.batches import TrainingBatch
from hone.schema.traces import FailureClass, Trace
from hone.transport.batches import batch_from


@dataclass(frozen=True, slots=True)
class MadeBatch:
    """A batch and what is measured of it."""

    batch: TrainingBatch
    metrics: dict[str, float]


def make_batch(step: int, groups: Sequence[Sequence[Trace]], section: RlSection) -> MadeBatch:
    """The batch of `step` from the valid traces of its groups: the same from the same traces, whenever it is made."""
    per_group = [advantages(section.advantage, [trace.reward for trace in group]) for group in groups]
    values = [value for group in per_group for value in group]
    if section.batch_normalisation:
        values = normalised(values)
    traces = [trace for group in groups for trace in group]
    samples = [
        sample
        for trace, value in zip(traces, values, strict=True)
        for sample in training_samples(trace, value, section.sampling.temperature)
    ]
    batch = batch_from(step, len(groups), samples)
    staleness = [step - 1 - sample.version for sample in samples]
    rewards = [trace.reward for trace in traces]
    metrics = {
        "batch/reward_mean": _mean(rewards),
        "batch/reward_std": _deviation(rewards),
        "batch/advantage_std": _deviation(values),
        "batch/advantage_max": max(values),
        "batch/advantage_min": min(values),
        "batch/staleness_max": max(staleness),
        "batch/staleness_mean": _mean(staleness),
        "batch/groups_count": len(groups),
        "batch/samples_count": len(samples),
        "batch/tokens_count": batch.num_tokens,
        "batch/trained_tokens_count": batch.loss_mask.count(1),
        "batch/truncated_share": _mean([trace.is_truncated for trace in traces]),
    }
    return MadeBatch(batch, metrics)


@dataclass(slots=True)
class Tally:
    """What happened since the last batch, trained or not."""

    num_filtered: int = 0
    num_dropped: int = 0
    failures: Counter[FailureClass] = field(default_factory=Counter)
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    started_at: float = math.inf
    ended_at: float = 0.0
    generate_seconds: float = 0.0
    score_seconds: float = 0.0

    def add(self, trace: Trace) -> None:
        """A valid rollout."""
        values, timing = self.values, trace.timing
        values["rollout/reward_mean"].append(trace.reward)
        values[f"rollout/{trace.environment}/reward_mean"].append(trace.reward)
        for name, reward in trace.rewards.items():
            values[f"rollout/{trace.environment}/reward_{name}_mean"].append(reward.value)
        for name, metric in trace.metrics.items():
            values[f"rollout/{trace.environment}/metric_{name}_mean"].append(metric)
        values["rollout/truncated_share"].append(trace.is_truncated)
        values["rollout/completion_tokens_mean"].append(trace.num_completion_tokens)
        values["rollout/duration_seconds"].append(timing.total_seconds)
        self.started_at = min(self.started_at, timing.started_at)
        self.ended_at = max(self.ended_at, timing.started_at + timing.total_seconds)
        self.generate_seconds += timing.generate_seconds
        self.score_seconds += timing.score_seconds

    def metrics(self) -> dict[str, float]:
        metrics = {name: _mean(found) for name, found in self.values.items()}
        metrics["rollout/finished_count"] = len(self.values["rollout/reward_mean"])
        metrics["rollout/filtered_groups_count"] = self.num_filtered
        metrics["rollout/dropped_groups_count"] = self.num_dropped
        metrics["rollout/failed_count"] = self.failures.total()
        metrics |= {f"rollout/failed_{kind}_count": count for kind, count in self.failures.items()}
        return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values]))
