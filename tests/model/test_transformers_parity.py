"""Our logits, gradients and files beside those of transformers, for every family."""

import pytest
import torch

from hone.model import checkpoint

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 1, 40, 17)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def oracle(variant):
    """transformers' own model with every parameter random, so that none can be left out unnoticed."""
    config = transformers.AutoConfig.for_model(**variant)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers(recurse=True)):
            if tensor.is_floating_point() and tensor.shape and "inv_freq" not in names_of(model, tensor):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def names_of(model, tensor):
    return " ".join(name for name, buffer in model.named_buffers() if buffer is tensor)


def oracle_logits(oracle, packed):
    sequences = packed.token_ids.split(packed.starts.diff().tolist())
    return torch.cat([oracle(input_ids=token_ids[None]).logits[0] for token_ids in sequences])


def test_logits_equal_those_of_transformers(oracle, pack, tmp_path, backend):
    oracle.save_pretrained(tmp_path)
    packed = pack(*LENGTHS)

    with torch.no_grad():
        logits = packed.logits(checkpoint.load_model(tmp_path))

        torch.testing.assert_close(logits, oracle_logits(oracle, packed), **TOLERANCE)


def test_a_saved_model_gives_the_same_logits_in_transformers(variant, random_model, pack, tmp_path):
    model, packed = random_model(variant), pack(*LENGTHS)
    checkpoint.save_model(model, model.config, tmp_path / "model", shard_bytes=40_000)

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager", output_loading_info=True
    )

    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(packed.logits(model), oracle_logits(loaded, packed), **TOLERANCE)


def test_gradients_equal_those_of_transformers(oracle, pack, tmp_path, backend):
    oracle.save_pretrained(tmp_path)
    packed, model = pack(*LENGTHS), checkpoint.load_model(tmp_path)
    targets = packed.token_ids.roll(-1)

    torch.nn.functional.cross_entropy(packed.logits(model), targets).backward()
    torch.nn.functional.cross_entropy(oracle_logits(oracle, packed), targets).backward()

    for parameter in oracle.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    oracle.save_pretrained(tmp_path / "gradients")
    with checkpoint.SafetensorsFolder(tmp_path / "gradients") as expected:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        biases = {name: tensor for name, tensor in model.named_buffers() if name not in gradients}
        for name, gradient in checkpoint.hugging_face_tensors(gradients | biases, model.config):
            if "e_score_correction_bias" not in name:
                torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
