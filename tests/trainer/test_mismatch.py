"""The metrics of trainer-sampler mismatch against their definitions."""

import numpy as np
import pytest
import torch

from hone.trainer.mismatch import mismatch_metrics


def test_metrics_follow_their_formulas() -> None:
    rng = np.random.default_rng(0)
    sampler = -rng.random(500) * 3
    trainer = sampler + rng.normal(scale=0.1, size=500)
    metrics = mismatch_metrics(torch.tensor(trainer), torch.tensor(sampler))
    ratios = np.exp(trainer - sampler)
    assert metrics["train/mismatch_kl"] == pytest.approx(np.mean(ratios - np.log(ratios) - 1))
    assert metrics["train/ess"] == pytest.approx(ratios.sum() ** 2 / (500 * (ratios**2).sum()))
    assert metrics["train/logprob_difference_max"] == pytest.approx(np.abs(trainer - sampler).max())
    assert metrics["train/logprob_difference_p99"] == np.sort(np.abs(trainer - sampler))[495]
    assert metrics["train/entropy"] == pytest.approx(-sampler.mean())


def test_agreement_shows_as_exact_zeros_and_a_full_sample() -> None:
    logprobs = torch.tensor([-0.3, -2.0, -1e-7])
    metrics = mismatch_metrics(logprobs, logprobs.clone())
    assert metrics["train/mismatch_kl"] == metrics["train/logprob_difference_max"] == 0
    assert metrics["train/ess"] == 1


def test_one_runaway_token_leaves_an_effective_sample_of_one() -> None:
    sampler = torch.full((100,), -30.0)
    trainer = sampler.clone()
    trainer[0] = -1.0
    assert mismatch_metrics(trainer, sampler)["train/ess"] == pytest.approx(0.01, rel=1e-3)
