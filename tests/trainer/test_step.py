"""The shared optimizer step: gradients, independence of how a step is cut, and steps that are not finite."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hone.model import ops
from hone.model.layers.attention import PackedAttention
from hone.model.transformer import Transformer
from hone.schema.batches import TrainingSample
from hone.trainer import step as step_module
from hone.trainer.losses import PolicyLoss, policy_loss, supervised_loss
from hone.trainer.packing import MicroBatch
from hone.trainer.samples import Samples
from hone.trainer.step import Objective, Trainer, cut, forward_backward, train_step
from hone.transport.batches import batch_from


def supervised(samples: Samples) -> Objective:
    denominators = samples.denominators()
    return lambda logprobs_T, part: supervised_loss(logprobs_T, denominators)


def by_policy(samples: Samples, kind: str, reducer: str = "token_mean") -> Objective:
    loss = PolicyLoss(kind, 0.5, 5.0, 1e-5, reducer, max_tokens=20, kl_tau=0.01)  # type: ignore[arg-type]
    denominators = samples.denominators()

    def objective(logprobs_T: Tensor, part: MicroBatch) -> Tensor:
        return policy_loss(logprobs_T, part.sampled, loss, denominators)

    return objective


def gradients(trainer: Trainer, samples: Samples, objective: Objective) -> dict[str, Tensor]:
    trainer.model.zero_grad()
    for part in cut(trainer, samples):
        forward_backward(trainer, part, objective)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_the_supervised_gradient_is_that_of_cross_entropy_sample_by_sample(
    trainer: Trainer, random_samples: Callable[..., Samples]
) -> None:
    samples = random_samples(9, 4, 17)
    found = gradients(trainer, samples, supervised(samples))
    trainer.model.zero_grad()
    plain_cross_entropy(trainer.model, samples).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_prompt_that_is_forwarded_once_for_its_group_gets_the_gradients_of_all_its_rollouts(
    trainer: Trainer,
) -> None:
    random = np.random.default_rng(5)
    samples = []
    for _ in range(3):
        prompt = random.integers(1, 61, size=7).tolist()
        for length in (3, 1, 5, 4):
            answer = random.integers(1, 61, size=length).tolist()
            mask = [0] * 7 + [1] * length
            samples.append(TrainingSample(prompt + answer, mask, [0.0] * len(mask), [0.0] * len(mask), 1.0, 0))
    step = Samples.from_batch(batch_from(1, 3, samples))
    assert all(part.attend.shared is not None for part in cut(trainer, step))
    found = gradients(trainer, step, supervised(step))
    trainer.model.zero_grad()
    plain_cross_entropy(trainer.model, step).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def plain_cross_entropy(model: Transformer, samples: Samples) -> Tensor:
    losses = []
    for start, length in zip(samples.starts, samples.lengths_S, strict=False):
        ids = torch.tensor(samples.token_ids_N[start : start + length])
        attend = PackedAttention(torch.tensor([0, length], dtype=torch.int32), int(length))
        logits = model.unembed(model(ids, torch.arange(int(length)), attend))
        trains = torch.tensor(samples.trains_N[start + 1 : start + length])
        losses.append(functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[trains])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("kind", ["icepop", "gspo", "cispo"])
@pytest.mark.parametrize("reducer", ["token_mean", "sequence_mean"])
def test_gradients_do_not_depend_on_the_micro_batches(
    trainer: Trainer, random_samples: Callable[..., Samples], kind: str, reducer: str
) -> None:
    samples = random_samples(9, 4, 17, 23, 2, 11)
    objective = by_policy(samples, kind, reducer)
    reference = gradients(trainer, samples, objective)
    for budget in (23, 30, 1000):
        other = gradients(dataclasses.replace(trainer, micro_batch_tokens=budget), samples, objective)
        for name, gradient in reference.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_reports_loss_and_logprobs_in_the_order_of_the_samples(
    trainer: Trainer, random_samples: Callable[..., Samples]
) -> None:
    samples = random_samples(9, 4, 17, 23)
    expected = plain_cross_entropy(trainer.model, samples).item()
    outcome = train_step(trainer, samples, supervised(samples))
    assert outcome.loss == pytest.approx(expected, rel=1e-5)
    assert -outcome.logprobs_T.mean().item() == pytest.approx(expected, rel=1e-5)
    assert outcome.num_micro_batches == 1


def test_training_on_one_batch_lowers_its_loss(trainer: Trainer, random_samples: Callable[..., Samples]) -> None:
    samples = random_samples(9, 4, 17, 23)
    losses = [train_step(trainer, samples, supervised(samples)).loss for _ in range(20)]
    assert losses[-1] < 0.3 * losses[0]


def test_logits_in_parts_give_the_same_gradients(
    trainer: Trainer, random_samples: Callable[..., Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = random_samples(9, 40)
    at_once = gradients(trainer, samples, supervised(samples))
    monkeypatch.setattr(step_module, "MAX_LOGITS", 7 * trainer.model.config.vocabulary_size)
    in_parts = gradients(trainer, samples, supervised(samples))
    for name, gradient in at_once.items():
        torch.testing.assert_close(in_parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_activation_checkpointing_gives_the_same_gradients(
    trainer: Trainer, random_samples: Callable[..., Samples]
) -> None:
    samples = random_samples(9, 30)
    kept = gradients(trainer, samples, supervised(samples))
    trainer.model.activation_checkpointing = True
    recomputed = gradients(trainer, samples, supervised(samples))
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_temperature_divides_the_logits(trainer: Trainer, random_samples: Callable[..., Samples]) -> None:
    samples = random_samples(12)
    hot = dataclasses.replace(samples, temperatures_S=np.array([2.0], np.float32))
    part = cut(trainer, hot)[0]
    hidden_ND = step_module.hidden_states(trainer.model, part)
    logits_TV = trainer.model.unembed(hidden_ND)[part.rows_T] / 2.0
    expected = logits_TV.log_softmax(-1).gather(1, part.targets_T[:, None])[:, 0]
    torch.testing.assert_close(step_module.token_logprobs(trainer.model, hidden_ND, part), expected)


@pytest.mark.parametrize("poison", ["advantages_N", "sampler_logprobs_N"])
def test_a_step_that_is_not_finite_changes_nothing(
    trainer: Trainer, random_samples: Callable[..., Samples], poison: str
) -> None:
    samples = random_samples(9, 14)
    values = getattr(samples, poison).copy()
    values[np.flatnonzero(samples.trains_N)[3]] = np.nan
    bad = dataclasses.replace(samples, **{poison: values})
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    outcome = train_step(trainer, bad, by_policy(bad, "icepop"))
    assert not outcome.is_finite
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert train_step(trainer, samples, by_policy(samples, "icepop")).is_finite


def test_gradients_are_clipped_to_the_norm(trainer: Trainer, random_samples: Callable[..., Samples]) -> None:
    samples = random_samples(9, 14)
    gradients(trainer, samples, supervised(samples))
    norm = step_module.clip_gradients(trainer.model, 0.01)
    assert norm > 0.01
    assert step_module.clip_gradients(trainer.model, 1.0) == pytest.approx(0.01, rel=1e-3)


def test_a_sample_without_trained_tokens_leaves_gradients_of_zero(
    trainer: Trainer, random_samples: Callable[..., Samples]
) -> None:
    samples = random_samples(9)
    idle = dataclasses.replace(samples, trains_N=np.zeros(9, np.bool_))
    found = gradients(trainer, idle, supervised(idle))
    assert set(found) == dict(trainer.model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in found.values())


def test_native_logprobs_are_the_same_bits_however_a_step_is_cut(
    trainer: Trainer, random_samples: Callable[..., Samples]
) -> None:
    if not native_is_there():
        pytest.skip("no native kernels on this machine")
    samples = random_samples(9, 4, 17, 23, 2, 11)
    with ops.use_backend("native"):
        whole, parts = (logprobs(dataclasses.replace(trainer, micro_batch_tokens=m), samples) for m in (1000, 23))
    assert torch.equal(whole, parts)


def native_is_there() -> bool:
    try:
        with ops.use_backend("native"):
            return True
    except ValueError:
        return False


def logprobs(trainer: Trainer, samples: Samples) -> Tensor:
    micro_batches = cut(trainer, samples)
    parts = [forward_backward(trainer, part, supervised(samples)) for part in micro_batches]
    return step_module.combine(parts, micro_batches, samples, trainer.ranks)[1]
