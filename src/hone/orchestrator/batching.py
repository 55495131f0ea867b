"""Groups of traces to the training batch of a step, and the numbers that describe both."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from hone.config.recipe import RlSection
from hone.orchestrator.advantages import normalised
from hone.orchestrator.samples import Credit, agent_samples, credits_of
from hone.schema.batches import TrainingBatch
from hone.schema.rollouts import Heartbeat
from hone.schema.traces import FailureClass, Timing, Trace
from hone.transport.batches import batch_from


@dataclass(frozen=True, slots=True)
class MadeBatch:
    """A batch and what is measured of it."""

    batch: TrainingBatch
    metrics: dict[str, float]


def make_batch(step: int, groups: Sequence[Sequence[Trace]], section: RlSection) -> MadeBatch:
    """The batch of `step` from the valid traces of its groups: the same from the same traces, whenever it is made."""
    traces = [trace for group in groups for trace in group]
    credited = [found for group in groups for found in credits_of(group, section.advantage)]
    if section.batch_normalisation:
        credited = _normalised(credited)
    samples = [
        sample
        for trace, found in zip(traces, credited, strict=True)
        for sample in agent_samples(trace, found, section.sampling.temperature)
    ]
    values = [credit.advantage for found in credited for credit in found.values()]
    flat_rewards = [trace.reward for trace in traces]
    batch = batch_from(step, len(groups), samples)
    staleness = [step - 1 - sample.version for sample in samples]
    metrics = {
        "batch/reward_mean": _mean(flat_rewards),
        "batch/reward_std": _deviation(flat_rewards),
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


def _normalised(credited: Sequence[dict[str, Credit]]) -> list[dict[str, Credit]]:
    scaled = iter(normalised([credit.advantage for found in credited for credit in found.values()]))
    return [{name: Credit(credit.reward, next(scaled)) for name, credit in found.items()} for found in credited]


@dataclass(slots=True)
class Tally:
    """What happened since the last batch, trained or not."""

    num_filtered: int = 0
    num_dropped: int = 0
    num_stale: int = 0
    num_again: int = 0
    failures: Counter[FailureClass] = field(default_factory=Counter)
    given_up: Counter[FailureClass] = field(default_factory=Counter)
    environments: list[str] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    stalls: dict[str, float] = field(default_factory=dict)

    def note_stall(self, beat: Heartbeat) -> None:
        """The longest stall of any worker, and of each environment that was seen in one."""
        for area in {"", beat.stalled_environment}:
            self.stalls[area] = max(self.stalls.get(area, 0.0), beat.max_stall_seconds)

    def add(self, environment: str, trace: Trace, reward: float) -> None:
        """A valid rollout with its total reward; `environment` is the recipe's name for where it comes from."""
        self.environments.append(environment)
        self.traces.append(trace)
        self.rewards.append(reward)

    def metrics(self) -> dict[str, float]:
        counts = {
            "rollout/finished_count": float(len(self.traces)),
            "rollout/filtered_groups_count": self.num_filtered,
            "rollout/dropped_groups_count": self.num_dropped,
            "rollout/stale_groups_count": self.num_stale,
            "rollout/failed_count": self.failures.total(),
            "rollout/again_count": self.num_again,
            "rollout/given_up_count": self.given_up.total(),
        }
        failures = {f"rollout/failed_{kind}_count": count for kind, count in self.failures.items()}
        failures |= {f"rollout/given_up_{kind}_count": count for kind, count in self.given_up.items()}
        stalls = {
            f"rollout/{name}/stall_seconds_max" if name else "rollout/stall_seconds_max": seconds
            for name, seconds in self.stalls.items()
        }
        return counts | failures | stalls | (self._means() if self.traces else {})

    def timing(self) -> Timing:
        """From the first beginning to the last end, with the seconds that all rollouts together spent."""
        timings = [trace.timing for trace in self.traces]
        started_at = min((timing.started_at for timing in timings), default=0.0)
        ended_at = max((timing.started_at + timing.total_seconds for timing in timings), default=0.0)
        return Timing(
            started_at=started_at,
            total_seconds=ended_at - started_at,
            generate_seconds=sum(timing.generate_seconds for timing in timings),
            score_seconds=sum(timing.score_seconds for timing in timings),
            sandbox_seconds=sum(timing.sandbox_seconds for timing in timings),
        )

    def _means(self) -> dict[str, float]:
        traces = self.traces
        values: dict[str, list[float]] = defaultdict(list)
        values["rollout/reward_mean"] = self.rewards
        values["rollout/truncated_share"] = [trace.is_truncated for trace in traces]
        values["rollout/completion_tokens_mean"] = [trace.num_completion_tokens for trace in traces]
        values["rollout/duration_seconds"] = [trace.timing.total_seconds for trace in traces]
        values["rollout/sandbox_seconds"] = [trace.timing.sandbox_seconds for trace in traces]
        for environment, trace, reward in zip(self.environments, traces, self.rewards, strict=True):
            area = f"rollout/{environment}/"
            values[area + "reward_mean"].append(reward)
            for name, part in trace.rewards.items():
                values[area + "reward_" + name + "_mean"].append(part.value)
            for name, earned in trace.agent_rewards.items() if trace.agents else ():
                values[area + "agent_" + name + "_reward_mean"].append(earned)
            for name, metric in trace.metrics.items():
                values[area + "metric_" + name + "_mean"].append(metric)
        return {name: _mean(found) for name, found in values.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values]))
