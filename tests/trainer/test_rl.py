"""The RL process against an orchestrator in a thread, with batches sampled from the published policy."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import zmq
from safetensors.torch import load_file

from hone.model.checkpoint import load_hugging_face_tensors, load_model
from hone.model.layers.attention import PackedAttention
from hone.model.transformer import Transformer
from hone.observability.metrics import read_metrics
from hone.observability.spans import read_spans
from hone.schema.batches import (
    TRAINER_CHANNEL,
    Acknowledged,
    BatchReady,
    BatchWanted,
    CheckpointSaved,
    NoMoreBatches,
    StepDone,
    TrainingSample,
)
from hone.schema.wire import Wire
from hone.trainer import rl
from hone.trainer.start import run_process
from hone.transport.addresses import Addresses, save_addresses
from hone.transport.batches import batch_from, write_batch
from hone.transport.folders import RunFolder

LENGTH = 10
GOOD_TOKENS = 5


@dataclass
class Orchestrator:
    """Serves `num_steps` batches of completions sampled from the newest weights; likes tokens under GOOD_TOKENS."""

    folder: RunFolder
    num_steps: int
    reports: list[msgspec.Struct] = field(default_factory=list)
    poisoned: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._wire = Wire(*TRAINER_CHANNEL)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        save_addresses(Addresses(*[""] * 3, trainer=address, workers=""), self.folder.addresses)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(timeout=10)
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        while not self._over.is_set():
            if self._socket.poll(20):
                peer, data = self._socket.recv_multipart()
                self._socket.send_multipart([peer, self._wire.encode(self._answer(self._wire.decode(data)))])

    def _answer(self, message: msgspec.Struct) -> msgspec.Struct:
        if not isinstance(message, BatchWanted):
            self.reports.append(message)
            return Acknowledged.of(message)  # type: ignore[arg-type]
        if message.step > self.num_steps:
            return NoMoreBatches(self.num_steps)
        path = self.folder.batch_of(message.step)
        if not path.exists():
            samples = sample_completions(self.folder, message.step)
            if message.step in self.poisoned:
                samples[0] = msgspec.structs.replace(samples[0], advantages=[float("nan")] * LENGTH)
            write_batch(path, batch_from(message.step, 2, samples))
        return BatchReady(message.step, self.folder.relative(path))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def sample_completions(folder: RunFolder, step: int, num: int = 8) -> list[TrainingSample]:
    version, published = folder.newest_weights()
    model = load_model(folder.model)
    load_hugging_face_tensors(model, read_weights(published))
    return [sample_completion(model, version, seed=100 * step + index) for index in range(num)]


@torch.no_grad()
def sample_completion(model: Transformer, version: int, seed: int) -> TrainingSample:
    generator = torch.Generator().manual_seed(seed)
    ids, logprobs = [1], [0.0]
    while len(ids) < LENGTH:
        attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        hidden_ND = model(torch.tensor(ids), torch.arange(len(ids)), attend)
        distribution = model.unembed(hidden_ND)[-1].log_softmax(-1)
        ids.append(int(torch.multinomial(distribution.exp(), 1, generator=generator)))
        logprobs.append(distribution[ids[-1]].item())
    reward = float(np.mean([token < GOOD_TOKENS for token in ids[1:]]))
    mask = [0] + [1] * (LENGTH - 1)
    advantages = [0.0, *(1.0 if token < GOOD_TOKENS else -0.5 for token in ids[1:])]
    return TrainingSample(ids, mask, logprobs, advantages, 1.0, version, reward=reward)


@pytest.fixture
def orchestrator() -> Iterator[Callable[..., Orchestrator]]:
    running: list[Orchestrator] = []

    def build(folder: RunFolder, num_steps: int, **fields: frozenset[int]) -> Orchestrator:
        running.append(Orchestrator(folder, num_steps, **fields))  # type: ignore[arg-type]
        return running[-1]

    yield build
    for one in running:
        one.close()


RunFolders = Callable[..., RunFolder]
Orchestrators = Callable[..., Orchestrator]


def reinforce(folder: RunFolder) -> int:
    return run_process(rl.reinforce, [str(folder.path)])


def lines(folder: RunFolder) -> list[dict[str, float]]:
    return [line for line in read_metrics(folder.metrics) if "train/lr" in line]  # type: ignore[misc]


def test_rewards_rise_on_policy_and_the_result_is_exported(run_folder: RunFolders, orchestrator: Orchestrators) -> None:
    folder = run_folder(rl={"num_steps": 12, "optimizer": {"lr": 1e-2}})
    orchestrator(folder, 12)
    assert reinforce(folder) == 0
    found = lines(folder)
    assert [line["step"] for line in found] == list(range(1, 13))
    assert found[-1]["train/reward_mean"] > found[0]["train/reward_mean"] + 0.3
    exported, published = load_model(folder.export), read_weights(folder.weights_of(12))
    assert torch.equal(exported.embedding, published["model.embed_tokens.weight"])


def test_on_policy_batches_agree_with_the_trainer(run_folder: RunFolders, orchestrator: Orchestrators) -> None:
    folder = run_folder(rl={"num_steps": 2})
    orchestrator(folder, 2)
    assert reinforce(folder) == 0
    for line in lines(folder):
        assert line["train/mismatch_kl"] < 1e-6
        assert line["train/logprob_difference_max"] < 1e-4
        assert line["train/ess"] == pytest.approx(1, abs=1e-4)
        assert line["train/masked_share"] == 0
        assert line["train/staleness_max"] == line["train/staleness_mean"] == 0


def test_every_step_is_published_and_reported_then_checkpointed(
    run_folder: RunFolders, orchestrator: Orchestrators
) -> None:
    folder = run_folder(rl={"num_steps": 6}, trainer={"checkpoint_every": 4, "keep_checkpoints": 1})
    served = orchestrator(folder, 6)
    assert reinforce(folder) == 0
    steps = [StepDone(step, f"weights/v{step:06d}") for step in range(1, 7)]
    assert served.reports == [*steps[:4], CheckpointSaved(4, 4), *steps[4:], CheckpointSaved(6, 6)]
    assert folder.published_versions() == [3, 4, 5, 6]
    assert folder.saved_steps() == [6]
    names = {span["name"] for span in read_spans(folder.spans)}
    assert {"wait", "train", "broadcast"} <= names


def test_after_a_crash_training_goes_on_from_the_checkpoint_with_the_same_result(
    run_folder: RunFolders, orchestrator: Orchestrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_folder("whole", rl={"num_steps": 5})
    orchestrator(whole, 5)
    assert reinforce(whole) == 0

    class Killed(BaseException):
        pass

    broken = run_folder("broken", rl={"num_steps": 5}, trainer={"checkpoint_every": 2})
    orchestrator(broken, 5)
    real_publish = rl.publish

    def dies_at_version_three(run: rl.Run, trainer: rl.Trainer, version: int) -> None:
        if version == 3 and not broken.weights_of(3).exists():
            real_publish(run, trainer, version)
            raise Killed
        real_publish(run, trainer, version)

    monkeypatch.setattr(rl, "publish", dies_at_version_three)
    with pytest.raises(Killed):
        reinforce(broken)
    assert reinforce(broken) == 0
    assert [line["step"] for line in lines(broken)] == [1, 2, 3, 4, 5]
    expected = load_model(whole.export).state_dict()
    for name, tensor in load_model(broken.export).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_batches_after_the_oldest_checkpoint_are_not_given_up(
    run_folder: RunFolders, orchestrator: Orchestrators
) -> None:
    folder = run_folder(rl={"num_steps": 3}, trainer={"checkpoint_every": 1, "keep_checkpoints": 2})
    served = orchestrator(folder, 3)
    assert reinforce(folder) == 0
    saved = [report for report in served.reports if isinstance(report, CheckpointSaved)]
    assert saved == [CheckpointSaved(1, 0), CheckpointSaved(2, 1), CheckpointSaved(3, 2)]


def test_a_trainer_whose_result_is_exported_ends_at_once(run_folder: RunFolders, orchestrator: Orchestrators) -> None:
    folder = run_folder(rl={"num_steps": 1})
    served = orchestrator(folder, 1)
    assert reinforce(folder) == 0
    served.close()
    assert reinforce(folder) == 0


def test_a_finished_run_that_is_made_longer_goes_on_from_its_last_checkpoint(
    run_folder: RunFolders, orchestrator: Orchestrators
) -> None:
    folder = run_folder(rl={"num_steps": 2})
    orchestrator(folder, 2)
    assert reinforce(folder) == 0
    folder.export.rename(folder.path / "export.before")
    served = orchestrator(folder, 4)
    assert reinforce(folder) == 0
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
    assert served.reports[0] == StepDone(3, "weights/v000003")
    assert folder.is_exported()


def test_the_result_of_sft_is_where_rl_starts(run_folder: RunFolders, orchestrator: Orchestrators) -> None:
    folder = run_folder(rl={"num_steps": 1})
    folder.sft.mkdir()
    folder.sft_export.symlink_to(folder.model)
    orchestrator(folder, 0)
    assert reinforce(folder) == 0
    start = load_model(folder.sft_export)
    assert torch.equal(read_weights(folder.weights_of(0))["model.embed_tokens.weight"], start.embedding)


def test_a_bad_batch_is_skipped_counted_and_published_all_the_same(
    run_folder: RunFolders, orchestrator: Orchestrators
) -> None:
    folder = run_folder(rl={"num_steps": 3})
    orchestrator(folder, 3, poisoned=frozenset({2}))
    assert reinforce(folder) == 0
    assert [line["train/num_bad_steps"] for line in lines(folder)] == [0, 1, 1]
    before, after = read_weights(folder.weights_of(1)), read_weights(folder.weights_of(2))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in (folder.path / "bad_batches").iterdir()] == ["step_000002.batch"]


def test_too_many_bad_batches_end_the_run_with_the_reason(
    run_folder: RunFolders, orchestrator: Orchestrators, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(rl={"num_steps": 5}, trainer={"max_bad_steps": 1})
    orchestrator(folder, 5, poisoned=frozenset({2, 3}))
    assert reinforce(folder) == 2
    assert "trainer.max_bad_steps allows 1" in capsys.readouterr().err
    assert not folder.export.exists()


def test_a_strong_reference_kl_holds_the_policy_back(run_folder: RunFolders, orchestrator: Orchestrators) -> None:
    moved = {}
    for weight in (0.0, 5.0):
        folder = run_folder(f"kl{weight}", rl={"num_steps": 6, "loss": {"reference_kl": weight}})
        orchestrator(folder, 6)
        assert reinforce(folder) == 0
        moved[weight] = distance(load_model(folder.export), load_model(folder.model))
        assert ("train/reference_kl" in lines(folder)[-1]) == (weight > 0)
    assert moved[5.0] < moved[0.0]


def distance(one: Transformer, other: Transformer) -> float:
    with torch.no_grad():
        ids, positions = torch.arange(LENGTH), torch.arange(LENGTH)
        attend = PackedAttention(torch.tensor([0, LENGTH], dtype=torch.int32), LENGTH)
        first, second = (model.unembed(model(ids, positions, attend)).log_softmax(-1) for model in (one, other))
        return float((first.exp() * (first - second)).sum(-1).mean())


@pytest.mark.slow
def test_two_ranks_train_the_same_policy_as_one(run_folder: RunFolders, orchestrator: Orchestrators) -> None:
    sections = {"rl": {"num_steps": 3, "loss": {"reference_kl": 0.1, "reducer": "sequence_mean"}}}
    one, two = run_folder("one", **sections), run_folder("two", **sections, trainer={"num_ranks": 2})
    orchestrator(one, 3)
    assert reinforce(one) == 0
    # The very batches of the first run, so that a rounding difference does not sample another token.
    shutil.copytree(one.batches, two.batches)
    served = orchestrator(two, 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*command, "hone.trainer.rl", str(two.path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [type(report) for report in served.reports] == [StepDone] * 3 + [CheckpointSaved]
    for first, second in zip(lines(one), lines(two), strict=True):
        for name in ("train/loss", "train/grad_norm", "train/reference_kl", "train/masked_share"):
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    expected = load_model(one.export).state_dict()
    for name, tensor in load_model(two.export).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)
