"""Training is fast: SFT of the same tiny mixture of experts by hone, by the Hugging Face Trainer, by a plain loop.

All sides train the same weights on the same batches of mixed lengths with the same AdamW and must arrive at the same
losses (except in bfloat16, and where the Trainer batches similar lengths, which are other batches); what counts is real
tokens per second, padding not included. The fastest setting of each peer counts. Rounds are interleaved, every round starts at the same
weights and first takes steps that are not timed.

    python benchmarks/train_vs_transformers.py [--quick] [--threads 1]
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
import tiny_model
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from hone.config.recipe import OptimizerSection
from hone.model.checkpoint import load_model, save_model
from hone.model.families import ModelConfig
from hone.model.transformer import Transformer
from hone.trainer.losses import supervised_loss
from hone.trainer.memory import keep_freed_memory
from hone.trainer.optim import build_optimizers
from hone.trainer.packing import pack
from hone.trainer.ranks import Ranks
from hone.trainer.samples import Samples
from hone.trainer.step import Trainer, train_step

CONFIG = tiny_model.CONFIG
SEQUENCES_PER_STEP = 32
SHORTEST, LONGEST = 16, 128
ROW_TOKENS = 512
LR, BETAS, MAX_GRAD_NORM = 1e-3, (0.9, 0.95), 1.0
NUM_WARM_UP_STEPS = 2
LOSS_TOLERANCE = 2e-3
TARGET_TRAINER, TARGET_LOOP = 1.6, 2.0

Batch = list[list[int]]


@dataclass
class Side:
    """One way of training: a function from a model's folder and batches to what every step took and lost."""

    name: str
    train: Callable[[Path, list[Batch]], "Curve"]
    is_same_training: bool = True
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass
class Curve:
    """Seconds and loss of every step, and its real tokens where the side makes its own batches."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def make_batches(num_steps: int) -> list[Batch]:
    """Batches of random lengths; tokens follow a Zipf law and repeat, so that there is something to learn."""
    rng = np.random.default_rng(0)

    def sequence() -> list[int]:
        motif = rng.zipf(1.3, size=8) % tiny_model.VOCABULARY
        return np.resize(motif, rng.integers(SHORTEST, LONGEST + 1)).tolist()

    return [[sequence() for _ in range(SEQUENCES_PER_STEP)] for _ in range(num_steps)]


def train_hone(folder: Path, batches: list[Batch]) -> Curve:
    model = load_model(folder)
    section = OptimizerSection(lr=LR, betas=BETAS)
    trainer = Trainer(model, build_optimizers(model, section), Ranks.alone(torch.device("cpu")), 16384, MAX_GRAD_NORM)
    curve = Curve()
    for batch in batches:
        started = time.perf_counter()
        samples = samples_of(batch)
        denominators = samples.denominators()
        outcome = train_step(trainer, samples, lambda logprobs_T, _, d=denominators: supervised_loss(logprobs_T, d))
        curve.seconds.append(time.perf_counter() - started)
        curve.losses.append(outcome.loss)
    return curve


def samples_of(batch: Batch) -> Samples:
    lengths_S = np.array([len(sequence) for sequence in batch])
    trains_N = np.ones(lengths_S.sum(), np.bool_)
    trains_N[np.cumsum(lengths_S) - lengths_S] = False
    zeros_S, zeros_N = np.zeros(len(batch), np.float32), np.zeros(len(trains_N), np.float32)
    return Samples(
        lengths_S=lengths_S,
        versions_S=np.zeros(len(batch), np.int64),
        temperatures_S=zeros_S + 1,
        rewards_S=zeros_S,
        token_ids_N=np.concatenate([np.array(sequence) for sequence in batch]),
        trains_N=trains_N,
        sampler_logprobs_N=zeros_N,
        advantages_N=zeros_N,
    )


def train_loop(folder: Path, batches: list[Batch], experts: str) -> Curve:
    """transformers in a plain loop on packed rows; positions that start again separate the sequences of a row."""
    model = their_model(folder, experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    curve = Curve()
    for batch in batches:
        started = time.perf_counter()
        ids, positions = packed_rows(batch)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        trains = positions[:, 1:] > 0
        loss = functional.cross_entropy(logits[:, :-1][trains], ids[:, 1:][trains])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(loss.item())
        curve.seconds.append(time.perf_counter() - started)
    return curve


def packed_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows of at most ROW_TOKENS; what is left of a row is filled with sequences of one token, which do not train."""
    (rows,) = pack([len(sequence) for sequence in batch], ROW_TOKENS)
    width = max(sum(len(batch[index]) for index in row) for row in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens = [token for index in row for token in batch[index]]
        ids[number, : len(tokens)] = torch.tensor(tokens)
        positions[number, : len(tokens)] = torch.cat([torch.arange(len(batch[index])) for index in row])
    return ids, positions


def train_trainer(folder: Path, batches: list[Batch], experts: str, bf16: bool, group: bool = False) -> Curve:
    """The Hugging Face Trainer with padded batches in the given order."""
    curve = Curve()

    class Stopwatch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            curve.seconds.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            curve.seconds[-1] = time.perf_counter() - curve.seconds[-1]

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                curve.losses.append(logs["loss"])

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=SEQUENCES_PER_STEP,
        max_steps=len(batches),
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length" if group else "sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=bf16,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        # The loader fetches one batch ahead, so by the end every step has its count.
        curve.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return padded(rows)

    rows = [{"input_ids": sequence} for batch in batches for sequence in batch]
    trainer = transformers.Trainer(
        model=their_model(folder, experts),
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[Stopwatch()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return curve


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        sequence = torch.tensor(row["input_ids"])
        ids[index, : len(sequence)] = labels[index, : len(sequence)] = sequence
        mask[index, : len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def their_model(folder: Path, experts: str) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=experts
    )
    return model.train()


def measure(sides: list[Side], folder: Path, batches: list[Batch], num_rounds: int) -> None:
    tokens = [sum(map(len, batch)) for batch in batches]
    for round_index in range(num_rounds):
        for side in rotated(sides, round_index):
            curve = side.train(folder, batches)
            timed = slice(NUM_WARM_UP_STEPS, None)
            side.rates.append(sum((curve.tokens or tokens)[: len(tokens)][timed]) / sum(curve.seconds[timed]))
            side.losses = curve.losses


def rotated(sides: list[Side], by: int) -> Iterator[Side]:
    """Another side goes first in every round, so that none always follows the same one."""
    shift = by % len(sides)
    yield from sides[shift:] + sides[:shift]


def check_losses(sides: list[Side]) -> float:
    """The greatest difference of any exact side's losses from ours; refuses a comparison of different trainings."""
    ours = np.array(sides[0].losses)
    worst = 0.0
    for side in sides[1:]:
        if not side.is_same_training:
            continue
        difference = float(np.abs(np.array(side.losses) - ours).max())
        worst = max(worst, difference)
        if difference > LOSS_TOLERANCE:
            raise SystemExit(f"{side.name} has other losses than hone: they differ by up to {difference:.2g}")
    return worst


def build_model(folder: Path) -> None:
    config = ModelConfig.from_hugging_face(CONFIG)
    save_model(Transformer(config).initialize(seed=0), config, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads of every side")
    options = parser.parse_args()
    num_rounds, num_steps = (2, 8) if options.quick else (5, 22)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in hone's trainer; every side gains from it
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    sides = [
        Side("hone", train_hone),
        Side("Trainer, eager experts", lambda f, b: train_trainer(f, b, "eager", bf16=False)),
        Side("Trainer, grouped experts", lambda f, b: train_trainer(f, b, "grouped_mm", bf16=False)),
        Side("Trainer, bf16", lambda f, b: train_trainer(f, b, "grouped_mm", bf16=True), is_same_training=False),
        Side(
            "Trainer, similar lengths batched",
            lambda f, b: train_trainer(f, b, "grouped_mm", bf16=False, group=True),
            is_same_training=False,
        ),
        Side("plain loop, eager experts", lambda f, b: train_loop(f, b, "eager")),
        Side("plain loop, grouped experts", lambda f, b: train_loop(f, b, "grouped_mm")),
    ]
    batches = make_batches(num_steps)
    with tempfile.TemporaryDirectory() as folder:
        build_model(Path(folder))
        measure(sides, Path(folder), batches, num_rounds)
    worst = check_losses(sides)
    report(sides, worst, options.threads, batches)


def report(sides: list[Side], worst: float, threads: int, batches: list[Batch]) -> None:
    rates = {side.name: harness.summary(side.rates) for side in sides}
    ours = rates["hone"]["median"]
    rows = [
        (name, rate["median"], rate["min"], rate["max"], ours / rate["median"], side.losses[0], side.losses[-1])
        for side, (name, rate) in zip(sides, rates.items(), strict=True)
    ]
    columns = ["side", "tokens/s", "min", "max", "hone is faster by", "first loss", "last loss"]
    harness.show_table(f"SFT of a tiny mixture of experts, real tokens per second, {threads} thread(s)", columns, rows)
    real = sum(len(sequence) for batch in batches for sequence in batch)
    filled = real / sum(len(batch) * max(map(len, batch)) for batch in batches)
    best_trainer = max(rate["median"] for name, rate in rates.items() if name.startswith("Trainer"))
    best_loop = max(rate["median"] for name, rate in rates.items() if name.startswith("plain"))
    result = {
        "claim": f"training: >= {TARGET_TRAINER} x the Hugging Face Trainer, >= {TARGET_LOOP} x a plain loop",
        "ratio": {"trainer": ours / best_trainer, "plain_loop": ours / best_loop},
        "holds": ours / best_trainer >= TARGET_TRAINER and ours / best_loop >= TARGET_LOOP,
        "tokens_per_second": rates,
        "largest_loss_difference": worst,
        "share_of_padded_tokens_that_are_real": filled,
        "threads": threads,
    }
    harness.finish("train_vs_transformers", result, "torch", "transformers", "accelerate")


if __name__ == "__main__":
    main()
