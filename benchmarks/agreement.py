"""Trainer and engine agree: logprobs of the same sampled tokens from both, compared bit for bit.

A tiny mixture of experts with random weights plays two turns in groups that share prompts. The engine has few KV blocks
and a small step, so that it cuts prompts into chunks, finds prefixes in its cache and preempts; the trainer packs what
was sampled into micro-batches with shared prompts. Strict numerics must agree exactly; the other rows show what that is
worth.

    python benchmarks/agreement.py [--quick]
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import harness
import numpy as np
import tiny_model
import torch
from torch import Tensor

from hone.config.recipe import EngineSection
from hone.inference.engine.engine import Engine
from hone.model import ops
from hone.model.families import ModelConfig
from hone.model.transformer import Transformer
from hone.schema.batches import TrainingSample
from hone.schema.sampling import Generate, Generated, SamplingParameters
from hone.trainer.mismatch import mismatch_metrics
from hone.trainer.packing import MicroBatch, Samples, micro_batch, plan_micro_batches
from hone.trainer.step import hidden_states, token_logprobs
from hone.transport.batches import batch_from

CONFIG = tiny_model.CONFIG | {
    "use_qk_norm": True,
    "initializer_range": 0.15,  # far from uniform: 512 equally likely tokens would have an entropy of 6.2 nats
}
# A step holds fewer tokens than most prompts beside a full set of decodes, and the KV blocks less than may run.
ENGINE = EngineSection(num_blocks=1000, block_size=4, max_running=128, max_batch_tokens=192)
MICRO_BATCH_TOKENS = 8192
TEMPERATURES = (1.0, 0.7, 1.3)
NUM_GROUPS, GROUP_SIZE, NUM_TURNS = 120, 8, 2
SHORTEST, LONGEST = 16, 96


@dataclass(frozen=True)
class Setting:
    """How engine and trainer compute, the trainer always in float32; `share` of the groups: torch is slower."""

    name: str
    backend: ops.Backend
    share: float = 1.0
    engine_dtype: torch.dtype = torch.float32


SETTINGS = (
    Setting("strict", "native"),
    Setting("fast float32, torch kernels", "torch", 0.1),
    Setting("fast, engine in bfloat16", "auto", 0.1, torch.bfloat16),
)


@dataclass
class Rollout:
    """The tokens of one rollout over its turns."""

    temperature: float
    token_ids: list[int]
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_cached: int = 0

    def take(self, generated: Generated) -> None:
        context, count = len(self.token_ids) - len(self.loss_mask), len(generated.token_ids)
        self.token_ids += generated.token_ids
        self.loss_mask += [0] * context + [1] * count
        self.logprobs += [0.0] * context + generated.logprobs
        self.num_cached += generated.num_cached_tokens

    def sample(self) -> TrainingSample:
        advantages = [0.0] * len(self.token_ids)
        return TrainingSample(self.token_ids, self.loss_mask, self.logprobs, advantages, self.temperature, version=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the tokens; nothing is saved")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    num_groups = NUM_GROUPS // 20 if quick else NUM_GROUPS
    results = {setting.name: compare(setting, int(num_groups * setting.share) or 1) for setting in SETTINGS}
    show(results)
    strict = results["strict"]
    result = {
        "claim": "strict numerics: trainer and engine logprobs of >= 100,000 sampled tokens are bitwise equal",
        "ratio": strict["equal_share"],
        "bars_met": {
            "exact": strict["difference_max"] == 0.0,
            "tokens": strict["sampled_tokens"] >= 100_000,
            "preempted_and_cached": strict["preemptions"] > 0 and strict["prefix_cached_tokens"] > 0,
        },
        "settings": results,
    }
    if quick:
        print(json.dumps(result))
    else:
        harness.finish("agreement", result, "torch", "numpy")


def compare(setting: Setting, num_groups: int) -> dict[str, float]:
    """Sample in the engine, compute the same logprobs in the trainer."""
    with ops.use_backend(setting.backend):
        model = Transformer(ModelConfig.from_hugging_face(CONFIG)).initialize(seed=0)
        engine = Engine(copy_of(model).to(setting.engine_dtype), [1], ENGINE)
        started = time.perf_counter()
        rollouts = play(engine, num_groups)
        sampled = time.perf_counter()
        samples = Samples.from_batch(batch_from(1, num_groups, [rollout.sample() for rollout in rollouts]))
        parts = micro_batches(samples)
        logprobs_T = trainer_logprobs(model, samples, parts)
    ended = time.perf_counter()
    sampler_logprobs_T = samples.trained_tokens().sampler_logprobs_T
    mismatch = mismatch_metrics(logprobs_T, sampler_logprobs_T)
    return {
        "sampled_tokens": len(logprobs_T),
        "difference_max": mismatch["train/logprob_difference_max"],
        "difference_p99": mismatch["train/logprob_difference_p99"],
        "mismatch_kl": mismatch["train/mismatch_kl"],
        "equal_share": (logprobs_T == sampler_logprobs_T).float().mean().item(),
        "entropy": mismatch["train/entropy"],
        "prefix_cached_tokens": sum(rollout.num_cached for rollout in rollouts),
        "preemptions": engine.num_preemptions,
        "micro_batches": len(parts),
        "engine_seconds": sampled - started,
        "trainer_seconds": ended - sampled,
    }


def copy_of(model: Transformer) -> Transformer:
    copied = Transformer(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


def play(engine: Engine, num_groups: int) -> list[Rollout]:
    """Groups of rollouts over a few turns; prompts are of many lengths and begin alike."""
    rng = np.random.default_rng(0)

    def text(length: int) -> list[int]:
        return rng.integers(2, tiny_model.VOCABULARY, length).tolist()

    start, rollouts = text(40), []
    for _ in range(num_groups):
        prompt = start + text(rng.integers(1, 160))
        rollouts += [Rollout(TEMPERATURES[attempt % 3], list(prompt)) for attempt in range(GROUP_SIZE)]
    for turn in range(NUM_TURNS):
        lengths = rng.integers(SHORTEST, LONGEST + 1, len(rollouts)).tolist()
        for index, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
            rollout.token_ids += text(7) if turn else []
            sampling = SamplingParameters(temperature=rollout.temperature, max_tokens=length, ignore_eos=True)
            engine.add(Generate(f"{turn} {index}", rollout.token_ids, sampling))
        while engine.has_work:
            for finished in engine.step().finished:
                index = int(finished.generated.request_id.split()[1])
                rollouts[index].take(finished.generated)
    return rollouts


def micro_batches(samples: Samples) -> list[MicroBatch]:
    [plan] = plan_micro_batches(samples, MICRO_BATCH_TOKENS)
    return [micro_batch(samples, chosen, torch.device("cpu")) for chosen in plan]


def trainer_logprobs(model: Transformer, samples: Samples, parts: Sequence[MicroBatch]) -> Tensor:
    """Of all trained tokens, by the forward pass of a step (the one that keeps what gradients need)."""
    logprobs_T = torch.zeros(int(samples.trains_N.sum()))
    for part in parts:
        logprobs_T[part.places_T] = token_logprobs(model, hidden_states(model, part), part).detach()
    return logprobs_T


def show(results: Mapping[str, Mapping[str, float]]) -> None:
    columns = ["sampled_tokens", "difference_max", "difference_p99", "mismatch_kl", "equal_share", "preemptions"]
    seconds = ["engine_seconds", "trainer_seconds"]
    rows = [[name, *(result[column] for column in columns + seconds)] for name, result in results.items()]
    harness.show_table(
        "Logprobs of trainer and engine", ["numerics", *(c.replace("_", " ") for c in columns + seconds)], rows
    )


if __name__ == "__main__":
    main()
