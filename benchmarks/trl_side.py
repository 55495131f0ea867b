"""The peer's side of rl_vs_trl.py: TRL's GRPOTrainer on the same checkpoint and task; prints one JSON line with its curve.

Evaluation time is taken out of the clock.
"""

import argparse
import json
import random
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

from hone.envs import load_environment
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone_reverse_text.rewards import similarity

NUM_PROMPTS = 60_000
EVALUATE_EVERY = 10
NUM_HELD_OUT = 512
PARTIAL_CREDIT = 0.5
"""The default of reverse_text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--environment", type=json.loads, required=True, help="arguments of reverse_text as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--deadline-seconds", type=float, default=200.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    print(json.dumps(train(arguments)))


def train(arguments: argparse.Namespace) -> dict[str, object]:
    environment = load_environment("reverse_text", **arguments.environment)
    renderer = Renderer(Tokenizer.load(arguments.model))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def row(task):
        ids = renderer.prompt(task.prompt)
        return {"prompt": tokenizer.decode(ids), "answer": task.reference}

    prompts = [row(environment.train_task(index)) for index in range(NUM_PROMPTS)]
    random.Random(arguments.seed).shuffle(prompts)
    held_out = [row(environment.held_out_task(index)) for index in range(NUM_HELD_OUT)]
    assert (
        renderer.prompt(environment.train_task(0).prompt)
        == tokenizer(row(environment.train_task(0))["prompt"]).input_ids
    )

    def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
        pairs = zip(map(said, completions), answer, strict=True)
        return [1.0 if text == wanted else PARTIAL_CREDIT * similarity(text, wanted) ** 2 for text, wanted in pairs]

    clock = Clock(held_out, tokenizer, arguments)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(prompts),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=str(arguments.model.parent / "trl"),
            use_cpu=True,
            bf16=False,
            seed=arguments.seed,
            learning_rate=arguments.lr,
            lr_scheduler_type="constant",
            per_device_train_batch_size=arguments.prompts_per_step * 8,
            num_generations=8,
            max_completion_length=arguments.max_tokens,
            temperature=1.0,
            beta=0.0,
            max_steps=100_000,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
    )
    trainer.train()
    return {
        "curve": clock.curve,
        "seconds_to_target": clock.seconds_to_target,
        "samples_per_second": clock.samples / clock.training_seconds,
        "samples": clock.samples,
    }


def said(completion: str) -> str:
    """What is left of a completion without its reasoning block, as the other side's parser leaves it."""
    return completion.rpartition("</think>")[2].strip()


class Clock(TrainerCallback):
    """Counts samples and training seconds, evaluates the held-out strings now and then, ends at the target."""

    def __init__(self, held_out, tokenizer, arguments: argparse.Namespace) -> None:
        self.held_out, self.tokenizer, self.arguments = held_out, tokenizer, arguments
        self.curve: list[tuple[float, int, float]] = []
        self.seconds_to_target: float | None = None
        self.training_seconds = 0.0
        self.samples = 0
        self._resumed_at = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._resumed_at = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        self.samples += self.arguments.prompts_per_step * 8
        if state.global_step % EVALUATE_EVERY:
            return
        self.training_seconds += time.perf_counter() - self._resumed_at
        exact = self._exact(model)
        self.curve.append((round(self.training_seconds, 2), self.samples, exact))
        if exact >= self.arguments.target:
            self.seconds_to_target = self.training_seconds
            control.should_training_stop = True
        if self.training_seconds > self.arguments.deadline_seconds:
            control.should_training_stop = True
        self._resumed_at = time.perf_counter()

    @torch.no_grad()
    def _exact(self, model) -> float:
        self.tokenizer.padding_side = "left"
        inputs = self.tokenizer([row["prompt"] for row in self.held_out], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        output = model.generate(
            **inputs, max_new_tokens=self.arguments.max_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        texts = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        hits = sum(said(text) == row["answer"] for text, row in zip(texts, self.held_out, strict=True))
        return hits / len(self.held_out)


if __name__ == "__main__":
    main()
