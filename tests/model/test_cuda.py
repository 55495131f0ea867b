"""The same model on a CUDA device: float32 and bfloat16 beside float32 on the CPU."""

import pytest
import torch

from hone.model.layers.attention import PackedAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (37, 5, 64, 64, 1)


def run(model, packed, device):
    """Logits and gradients of the embedding, on the CPU."""
    model.zero_grad()
    model.to(device)
    attend = PackedAttention(packed.starts.to(device), max(LENGTHS))
    logits = model.unembed(model(packed.token_ids.to(device), packed.positions.to(device), attend))
    logits.square().mean().backward()
    return logits.detach().cpu(), model.embedding.grad.float().cpu()


def test_float32_on_cuda_equals_the_cpu(variant, random_model, pack):
    model, packed = random_model(variant), pack(*LENGTHS)
    expected = run(model, packed, "cpu")
    torch.testing.assert_close(run(model, packed, "cuda"), expected, rtol=2e-3, atol=2e-3)


def test_bfloat16_on_cuda_is_close_to_the_cpu(variant, random_model, pack):
    packed = pack(*LENGTHS)
    expected = run(random_model(variant), packed, "cpu")
    found = run(random_model(variant).to(torch.bfloat16), packed, "cuda")
    # A rounded router may send a token elsewhere, so compare the bulk.
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).abs().median() < 0.05 * exact.std()
