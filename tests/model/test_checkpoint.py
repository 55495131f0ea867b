import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from hone.model import checkpoint
from hone.model.checkpoint import CheckpointError


@pytest.fixture
def model(glm4_moe, random_model):
    return random_model(glm4_moe)


@pytest.fixture
def folder(model, tmp_path):
    checkpoint.save_model(model, model.config, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def test_a_model_survives_the_way_to_disk_and_back(variant, random_model, tmp_path):
    model = random_model(variant)
    checkpoint.save_model(model, model.config, tmp_path / "model")
    loaded = checkpoint.load_model(tmp_path / "model")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_shards_hold_every_tensor_once_and_none_is_larger_than_asked(model, tmp_path):
    checkpoint.save_model(model, model.config, tmp_path / "model", shard_bytes=30_000)
    index = json.loads((tmp_path / "model" / checkpoint.INDEX_FILE).read_text())
    files = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    held = {name: file for file in files for name in load_file(tmp_path / "model" / file)}
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert held == index["weight_map"]
    assert all((tmp_path / "model" / file).stat().st_size < 40_000 for file in files)
    torch.testing.assert_close(checkpoint.load_model(tmp_path / "model").state_dict(), model.state_dict())


def test_a_state_of_another_rank_or_process_can_be_saved_without_a_model(model, folder, tmp_path):
    checkpoint.save_model(model.state_dict(), model.config, tmp_path / "copy")
    torch.testing.assert_close(
        load_file(tmp_path / "copy" / "model.safetensors"), load_file(folder / "model.safetensors")
    )


def test_saving_in_bfloat16_keeps_the_router_correction_exact(model, tmp_path):
    checkpoint.save_model(model.to(torch.bfloat16), model.config, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    exact = [name for name, tensor in tensors.items() if tensor.dtype is torch.float32]
    assert {name.rsplit(".", 1)[1] for name in exact} == {"e_score_correction_bias"}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = checkpoint.load_model(tmp_path / "model", dtype=torch.bfloat16)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_tokenizer_files_travel_with_the_model(model, tmp_path):
    source = tmp_path / "base"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("hello")
    (source / "training_args.bin").write_text("not a tokenizer file")
    checkpoint.save_model(model, model.config, tmp_path / "model", tokenizer_from=source)
    saved = {file.name for file in (tmp_path / "model").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= saved
    assert "training_args.bin" not in saved


def test_saving_again_replaces_the_whole_folder(model, folder):
    (folder / "stale.txt").write_text("of the model before")
    checkpoint.save_model(model, model.config, folder)
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_missing_and_extra_tensors_are_listed_together(folder):
    def change(tensors):
        tensors["model.layers.1.self_attn.gizmo.weight"] = tensors.pop("model.norm.weight")
        return tensors

    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"model\.norm\.weight missing; .*gizmo\.weight not part of it"):
        checkpoint.load_model(folder)


def test_a_long_list_of_missing_tensors_stays_readable(folder):
    rewrite(folder, lambda tensors: {"model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(ValueError, match=r"and \d+ more missing") as caught:
        checkpoint.load_model(folder)
    assert len(str(caught.value)) < 1000


def test_wrong_shapes_are_listed_with_both_shapes(folder):
    def change(tensors):
        name = "model.layers.0.self_attn.k_proj.weight"
        return tensors | {name: tensors[name][:5].clone(), "lm_head.weight": torch.zeros(95, 32)}

    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[95, 32\], not .*k_proj\.weight has shape \[5"):
        checkpoint.load_model(folder)


def test_a_model_that_does_not_fit_stays_as_it_was(model, folder):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = load_file(folder / "model.safetensors")
    changed = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape"):
        checkpoint.load_hugging_face_tensors(model, changed | {"lm_head.weight": torch.zeros(1, 1)})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_next_token_layers_of_published_models_are_left_aside(folder, model):
    rewrite(folder, lambda tensors: tensors | {"model.layers.3.eh_proj.weight": torch.zeros(2)})
    torch.testing.assert_close(checkpoint.load_model(folder).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-100]
            ),
            "not a complete safetensors file",
        ),
        (
            lambda folder: (folder / checkpoint.INDEX_FILE).write_text('{"weight_map": {"a": "gone.safetensors"}}'),
            "missing",
        ),
        (lambda folder: (folder / checkpoint.INDEX_FILE).write_text("{}"), "has no weight_map"),
    ],
)
def test_a_damaged_folder_is_named_with_its_damage(folder, damage, complaint):
    damage(folder)
    with pytest.raises((CheckpointError, ValueError), match=complaint):
        checkpoint.load_model(folder)


def test_a_shard_that_the_index_names_must_exist(model, tmp_path):
    checkpoint.save_model(model, model.config, tmp_path / "model", shard_bytes=60_000)
    next((tmp_path / "model").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-.* is missing"):
        checkpoint.load_model(tmp_path / "model")


def test_a_full_disk_is_reported_and_leaves_the_folder_of_before(model, folder):
    before = (folder / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=f"{folder.name}.*(too large|full)"):
            checkpoint.save_model(model, model.config, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_state_that_lacks_a_tensor_is_refused_before_a_file_is_written(model, tmp_path):
    state = model.state_dict()
    del state["layers.2.mlp.down"]
    with pytest.raises(ValueError, match=r"no layers\.2\.mlp\.down"):
        checkpoint.save_model(state, model.config, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
