"""The layout of a run's folder."""

from pathlib import Path

from hone.transport.folders import RunFolder


def test_rl_starts_from_the_sft_export_when_there_is_one(tmp_path):
    run = RunFolder(tmp_path)
    assert run.start_policy() == tmp_path / "model"
    run.sft_export.mkdir(parents=True)
    assert run.start_policy() == tmp_path / "sft" / "export"


def test_only_complete_versions_are_published(tmp_path):
    run = RunFolder(tmp_path)
    assert run.published_versions() == []
    for name in ("v000000", "v000010", "v000002", "v000011.tmp", ".tmp-v000012", "notes"):
        (run.weights / name).mkdir(parents=True)
    assert run.published_versions() == [0, 2, 10]
    assert run.newest_weights() == (10, run.weights_of(10))


def test_before_anything_is_published_the_newest_weights_are_the_start_policy(tmp_path):
    assert RunFolder(tmp_path).newest_weights() == (0, tmp_path / "model")


def test_paths_in_messages_are_relative_to_the_folder():
    run = RunFolder(Path("/somewhere/run"))
    assert run.relative(run.batch_of(7)) == "batches/step_000007.batch"
    assert run.resolve("batches/step_000007.batch") == run.batch_of(7)


def test_checkpoints_are_listed_by_step(tmp_path):
    run = RunFolder(tmp_path)
    for step in (100, 50):
        run.checkpoint_of(step).mkdir(parents=True)
    (run.checkpoints / "step_000150.tmp").mkdir()
    assert run.saved_steps() == [50, 100]
