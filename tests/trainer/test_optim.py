"""Schedules by their corner points, AdamW's groups, and Muon against formula and reference."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from hone.config.recipe import OptimizerSection
from hone.model.transformer import Transformer
from hone.trainer.optim import Muon, build_optimizers, learning_rate, orthogonalise


def rates(num_steps: int, **fields: object) -> list[float]:
    section = OptimizerSection.model_validate({"lr": 1.0} | fields)
    return [learning_rate(section, step, num_steps) for step in range(1, num_steps + 1)]


def test_a_constant_schedule_warms_up_linearly() -> None:
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_schedule_ends_one_step_above_its_end() -> None:
    assert rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(4, schedule="linear", min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_a_cosine_schedule_is_halfway_in_the_middle() -> None:
    found = rates(10, schedule="cosine", warmup_steps=2, min_lr_ratio=0.1)
    assert found[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert found[6] == pytest.approx(0.55)
    assert all(a > b for a, b in itertools.pairwise(found[2:]))


def test_weight_decay_is_for_matrices_only(model: Transformer) -> None:
    (optimizer,) = build_optimizers(model, OptimizerSection(weight_decay=0.1))
    for group in optimizer.param_groups:
        assert all((parameter.ndim >= 2) == (group["weight_decay"] > 0) for parameter in group["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_muon_takes_matrices_and_leaves_tables_and_vectors_to_adamw(model: Transformer) -> None:
    muon, adamw = build_optimizers(model, OptimizerSection(kind="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    assert {"embedding", "unembedding", "norm.weight"} <= by_adamw
    assert "layers.1.mlp.gate_up" in by_muon


def quintic_singular_values(matrix: np.ndarray) -> np.ndarray:
    """The iteration on the singular values alone, which is what Newton-Schulz computes without an SVD."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(matrix)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_orthogonalising_applies_the_quintic_to_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    found = orthogonalise(torch.tensor(matrix, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(found, quintic_singular_values(matrix), atol=2e-5)
    assert np.linalg.svd(found, compute_uv=False).min() > 0.6


def test_a_stack_of_experts_is_orthogonalised_expert_by_expert() -> None:
    stack = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))
    stack[1] *= 100
    torch.testing.assert_close(orthogonalise(stack), torch.stack([orthogonalise(one) for one in stack]))


def test_muon_agrees_with_torchs_up_to_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 16, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    our_muon = Muon([ours], lr=0.01, momentum=0.9, weight_decay=0.1)
    their_muon = torch.optim.Muon([theirs], lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(24, 16, generator=generator)
        theirs.grad = ours.grad.clone()
        our_muon.step()
        their_muon.step()
    # torch iterates in bfloat16 (8 bits), ours in float32.
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()
