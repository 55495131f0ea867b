"""In strict numerics trainer and engine give a sampled token the same logprob, bit for bit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hone.config.recipe import EngineSection, OptimizerSection
from hone.inference.engine.engine import Engine
from hone.model import ops
from hone.model.families import ModelConfig
from hone.model.transformer import Transformer
from hone.schema.batches import TrainingSample
from hone.schema.sampling import Generate, Generated, SamplingParameters
from hone.trainer import step
from hone.trainer.mismatch import mismatch_metrics
from hone.trainer.optim import build_optimizers
from hone.trainer.packing import MicroBatch, Samples
from hone.trainer.ranks import Ranks
from hone.trainer.step import StepOutcome, Trainer, cut, train_step
from hone.transport.batches import batch_from

VOCABULARY = 90
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
GLM4_MOE = SIZES | EXPERTS | {"n_routed_experts": 8, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "glm4_moe": GLM4_MOE | {"model_type": "glm4_moe", "n_shared_experts": 1, "use_qk_norm": True},
    "glm4_moe with groups": GLM4_MOE
    | {"model_type": "glm4_moe", "n_group": 2, "topk_group": 1, "attention_bias": True},
    "qwen3": SIZES | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_moe": SIZES | EXPERTS | {"model_type": "qwen3_moe", "num_experts": 6},
    "llama": SIZES | {"model_type": "llama", "attention_bias": True},
}
ENGINES: dict[str, dict[str, Any]] = {
    "all at once": {"prefix_cache": False},
    "in chunks of few tokens": {"max_batch_tokens": 7, "max_running": 5, "prefix_cache": False},
    "with a prefix cache": {},
    "in chunks with a prefix cache": {"max_batch_tokens": 9, "max_running": 9},
    "with too few blocks": {"num_blocks": 24},
}
NUM_GROUPS, GROUP_SIZE = 4, 3


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    torch.set_num_threads(1)
    try:
        with ops.use_backend("native"):
            yield
    except ValueError as error:
        pytest.skip(str(error))


def build_model(name: str) -> Transformer:
    """Random weights, norms and biases included."""
    model = Transformer(ModelConfig.from_hugging_face(MODELS[name])).initialize(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.empty_like(tensor).normal_(0, 0.1, generator=generator))
    return model


def build_trainer(model: Transformer, micro_batch_tokens: int = 4096) -> Trainer:
    optimizers = build_optimizers(model, OptimizerSection(lr=1e-2))
    return Trainer(model, optimizers, Ranks.alone(torch.device("cpu")), micro_batch_tokens, max_grad_norm=1.0)


def build_engine(model: Transformer, **changes: Any) -> Engine:
    copied = Transformer(model.config)
    copied.load_state_dict(model.state_dict())
    settings = {"num_blocks": 512, "block_size": 4, "max_running": 32} | changes
    return Engine(copied, [1], EngineSection(**settings))


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
        advantages = [0.5 * trains for trains in self.loss_mask]
        return TrainingSample(self.token_ids, self.loss_mask, self.logprobs, advantages, self.temperature, version=0)


def play(engine: Engine, temperatures: Sequence[float] = (1.0,), num_turns: int = 2) -> list[Rollout]:
    """Groups of rollouts over a few turns; all prompts begin alike."""
    generator = torch.Generator().manual_seed(3)

    def text(length: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    start = text(13)
    prompts = [start + text(1 + 5 * group) for group in range(NUM_GROUPS)]
    rollouts = [
        Rollout(temperatures[index % len(temperatures)], list(prompts[index // GROUP_SIZE]))
        for index in range(NUM_GROUPS * GROUP_SIZE)
    ]
    for turn in range(num_turns):
        for rollout in rollouts:
            rollout.token_ids += text(3) if turn else []
        for rollout, generated in zip(rollouts, sample(engine, rollouts, f"turn {turn}"), strict=True):
            rollout.take(generated)
    return rollouts


def samples_of(rollouts: Sequence[Rollout]) -> Samples:
    """As the trainer reads them."""
    return Samples.from_batch(batch_from(1, NUM_GROUPS, [rollout.sample() for rollout in rollouts]))


def sample(engine: Engine, rollouts: Sequence[Rollout], turn: str) -> list[Generated]:
    names = [f"{turn} of {index}" for index in range(len(rollouts))]
    for index, (name, rollout) in enumerate(zip(names, rollouts, strict=True)):
        sampling = SamplingParameters(temperature=rollout.temperature, max_tokens=4 + 3 * (index % 5))
        engine.add(Generate(name, rollout.token_ids, sampling))
    done: dict[str, Generated] = {}
    while engine.has_work:
        done |= {finished.generated.request_id: finished.generated for finished in engine.step().finished}
    return [done[name] for name in names]


def train(trainer: Trainer, samples: Samples) -> StepOutcome:
    def objective(logprobs_T: torch.Tensor, part: MicroBatch) -> torch.Tensor:
        return -(part.sampled.advantages_T * logprobs_T).mean()

    return train_step(trainer, samples, objective)


def assert_equal_bits(outcome: StepOutcome, samples: Samples) -> None:
    sampler_logprobs_T = samples.trained_tokens().sampler_logprobs_T
    assert len(sampler_logprobs_T) > 50
    assert sampler_logprobs_T.unique().numel() > 40
    metrics = mismatch_metrics(outcome.logprobs_T, sampler_logprobs_T)
    assert metrics["train/logprob_difference_max"] == 0.0
    assert (metrics["train/mismatch_kl"], metrics["train/ess"]) == (0.0, 1.0)


@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES.keys())
@pytest.mark.parametrize("name", MODELS)
def test_however_the_engine_batches_cuts_caches_and_preempts(name: str, settings: dict[str, Any]) -> None:
    model = build_model(name)
    engine = build_engine(model, **settings)
    rollouts = play(engine, temperatures=(1.0, 0.7, 1.3))
    assert (engine.num_preemptions > 0) == ("num_blocks" in settings)
    assert any(rollout.num_cached for rollout in rollouts) == settings.get("prefix_cache", True)
    samples = samples_of(rollouts)
    assert_equal_bits(train(build_trainer(model), samples), samples)


@pytest.mark.parametrize("name", MODELS)
def test_however_the_trainer_cuts_and_shares(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(name)
    samples = samples_of(play(build_engine(model)))
    whole, pieces = build_trainer(model), build_trainer(model, micro_batch_tokens=150)
    assert [part.attend.shared is not None for part in cut(whole, samples)] == [True]
    assert len(cut(pieces, samples)) > 3
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcomes = []
    for trainer, checkpointed, max_logits in ((pieces, False, 2**26), (whole, True, 2**26), (whole, False, 2000)):
        model.load_state_dict(start)
        model.activation_checkpointing = checkpointed
        monkeypatch.setattr(step, "MAX_LOGITS", max_logits)
        outcomes.append(train(trainer, samples))
    for outcome in outcomes:
        assert_equal_bits(outcome, samples)


def test_at_every_version_of_the_weights_that_an_engine_takes_over() -> None:
    model = build_model("glm4_moe")
    trainer, engine = build_trainer(model), build_engine(model)
    losses = []
    for version in range(1, 4):
        samples = samples_of(play(engine))
        outcome = train(trainer, samples)
        assert_equal_bits(outcome, samples)
        losses.append(outcome.loss)
        engine.load_weights(model.state_dict(), version)
    assert len(set(losses)) == 3


def test_without_strict_numerics_rounding_shows() -> None:
    model = build_model("glm4_moe")
    with ops.use_backend("torch"):
        samples = samples_of(play(build_engine(model)))
        outcome = train(build_trainer(model), samples)
    metrics = mismatch_metrics(outcome.logprobs_T, samples.trained_tokens().sampler_logprobs_T)
    assert 0.0 < metrics["train/logprob_difference_max"] < 1e-3
