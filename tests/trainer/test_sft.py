"""Supervised fine-tuning end to end on a tiny model, in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hone.config.load import load_recipe
from hone.model.checkpoint import load_model
from hone.model.layers.attention import PackedAttention
from hone.observability.metrics import read_metrics
from hone.observability.spans import read_spans
from hone.schema.messages import Message
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone.trainer import sft
from hone.trainer.start import run_process
from hone.transport.folders import RunFolder


def fine_tune(folder: RunFolder) -> int:
    return run_process(sft.fine_tune, [str(folder.path)])


def losses(folder: RunFolder) -> dict[int, float]:
    return {int(line["step"]): float(line["sft/loss"]) for line in read_metrics(folder.metrics) if "sft/loss" in line}


def test_sft_learns_and_exports_a_model_that_loads(run_folder: Callable[..., RunFolder]) -> None:
    folder = run_folder(sft={"epochs": 4.0})
    assert fine_tune(folder) == 0
    curve = losses(folder)
    assert list(curve) == list(range(1, len(curve) + 1))
    assert curve[len(curve)] < 0.5 * curve[1]
    trained, base = load_model(folder.sft_export), load_model(folder.model)
    assert not torch.equal(trained.embedding, base.embedding)
    assert Tokenizer.load(folder.sft_export).chat_template == Tokenizer.load(folder.model).chat_template


def test_sft_stops_when_validation_answers_have_become_likely_enough(run_folder: Callable[..., RunFolder]) -> None:
    section = {"epochs": 40.0, "validation_conversations": 8, "validate_every": 2, "stop_at_likelihood": 0.5}
    folder = run_folder(sft=section)
    assert fine_tune(folder) == 0
    measured = [line for line in read_metrics(folder.metrics) if "sft/validation_likelihood" in line]
    likelihoods = [float(line["sft/validation_likelihood"]) for line in measured]
    assert [line["step"] for line in measured] == list(range(2, 2 * len(measured) + 1, 2))
    assert likelihoods[-1] >= 0.5 > max(likelihoods[:-1])
    assert max(losses(folder)) == measured[-1]["step"]
    assert folder.sft_export.exists()


def test_the_validation_likelihood_is_the_probability_to_sample_the_whole_answer(
    run_folder: Callable[..., RunFolder],
) -> None:
    folder = run_folder(sft={"max_steps": 1, "validation_conversations": 3, "validate_every": 1})
    assert fine_tune(folder) == 0
    (found,) = (
        float(line["sft/validation_likelihood"])
        for line in read_metrics(folder.metrics)
        if "sft/validation_likelihood" in line
    )
    model, renderer = load_model(folder.sft_export), Renderer(Tokenizer.load(folder.model))
    rows = [
        json.loads(line)["messages"] for line in Path(load_recipe(folder.config).sft.data).read_text().splitlines()[-3:]
    ]
    likelihoods = []
    for row in rows:
        rendered = renderer.render_for_training([Message(**message) for message in row])
        ids, mask = torch.tensor(rendered.token_ids), torch.tensor(rendered.loss_mask, dtype=torch.bool)
        attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        logprobs = model.unembed(model(ids, torch.arange(len(ids)), attend)).log_softmax(-1)[:-1]
        likelihoods.append(logprobs[torch.arange(len(ids) - 1), ids[1:]][mask[1:]].sum().exp().item())
    assert found == pytest.approx(sum(likelihoods) / 3, rel=1e-4)


def test_every_step_writes_its_metrics_in_one_line_and_a_span(run_folder: Callable[..., RunFolder]) -> None:
    folder = run_folder(sft={"max_steps": 2})
    assert fine_tune(folder) == 0
    lines = [line for line in read_metrics(folder.metrics) if "step" in line]
    assert len(lines) == 2
    assert {"sft/grad_norm", "sft/lr", "sft/tokens_per_second", "sft/num_tokens"} <= lines[0].keys()
    assert [span["step"] for span in read_spans(folder.spans) if span["name"] == "train"] == [1, 2]


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    run_folder: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sft": {"max_steps": 6, "optimizer": {"schedule": "cosine", "lr": 5e-3}}}
    whole, halved = run_folder("whole", **settings), run_folder("halved", **settings, trainer={"checkpoint_every": 3})
    assert fine_tune(whole) == 0

    class Killed(BaseException):
        pass

    real_step, calls = sft.train_step, []

    def dies_in_the_fifth_step(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return real_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sft, "train_step", dies_in_the_fifth_step)
    with pytest.raises(Killed):
        fine_tune(halved)
    assert not halved.sft_export.exists()
    assert fine_tune(halved) == 0
    assert len(calls) == 5 + 3  # resumed after step 3
    assert losses(halved) == losses(whole)
    expected = load_model(whole.sft_export).state_dict()
    for name, tensor in load_model(halved.sft_export).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_finished_stage_is_not_done_again(run_folder: Callable[..., RunFolder]) -> None:
    folder = run_folder(sft={"max_steps": 1})
    assert fine_tune(folder) == 0
    folder.metrics.unlink()
    assert fine_tune(folder) == 0
    assert not losses(folder)


def test_other_data_than_the_checkpoints_is_refused(
    run_folder: Callable[..., RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(sft={"max_steps": 1})
    assert fine_tune(folder) == 0
    folder.sft_export.rename(tmp_path / "moved")
    rows = (tmp_path / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join(rows[1:]))
    assert fine_tune(folder) == 2
    assert "other data" in capsys.readouterr().err


def test_gold_answers_of_environments_are_read_from_the_run(
    run_folder: Callable[..., RunFolder], tmp_path: Path
) -> None:
    folder = run_folder(sft={"data": "environments", "num_conversations": 8})
    folder.sft.mkdir()
    (tmp_path / "data.jsonl").rename(folder.sft_conversations)
    assert fine_tune(folder) == 0


def test_muon_and_checkpointed_activations_train_too(run_folder: Callable[..., RunFolder]) -> None:
    folder = run_folder(
        sft={"epochs": 4.0, "optimizer": {"kind": "muon", "lr": 5e-3}}, trainer={"activation_checkpointing": True}
    )
    assert fine_tune(folder) == 0
    curve = losses(folder)
    assert curve[len(curve)] < 0.5 * curve[1]


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"sft": {"data": "missing.jsonl"}}, "cannot read missing.jsonl"),
        ({"sft": {"max_length": 3}}, "nothing to train on"),
        ({"trainer": {"micro_batch_tokens": 10}}, "raise it or lower sft.max_length"),
        ({"trainer": {"num_ranks": 2}}, "1 processes were started"),
    ],
)
def test_what_cannot_work_ends_with_one_readable_line(
    run_folder: Callable[..., RunFolder],
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, dict[str, object]],
    complaint: str,
) -> None:
    folder = run_folder(**sections)
    assert fine_tune(folder) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_a_loss_that_is_not_finite_is_skipped_until_it_is_too_often(
    run_folder: Callable[..., RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(trainer={"max_bad_steps": 2})
    poison(folder)
    assert fine_tune(folder) == 2
    assert "trainer.max_bad_steps allows 2" in capsys.readouterr().err
    assert sorted(path.name for path in (folder.path / "bad_batches").iterdir()) == [
        f"step_{step:06d}.batch" for step in (1, 2, 3)
    ]
    counts = [line["sft/num_bad_steps"] for line in read_metrics(folder.metrics) if "sft/num_bad_steps" in line]
    assert counts == [1, 2, 3]


def poison(folder: RunFolder) -> None:
    from hone.model.checkpoint import save_model

    model = load_model(folder.model)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    config = model.config
    target = folder.path / "poisoned"
    save_model(model, config, target, tokenizer_from=folder.model)
    folder.model.rename(folder.path / "healthy")
    target.rename(folder.model)
    assert json.loads((folder.model / "config.json").read_text())
