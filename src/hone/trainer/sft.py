"""Supervised fine-tuning: `python -m hone.trainer.sft RUN_FOLDER`, alone or under torchrun.

Trains the model in R/model on conversations into R/sft/export; that folder is the mark that SFT is done. Resumes from
R/sft/checkpoints.
"""

import logging
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hone.config.recipe import SftSection
from hone.observability.logs import fields
from hone.schema.seeds import derive_seed
from hone.text.rendering import Rendered, Renderer
from hone.text.tokenizer import Tokenizer
from hone.trainer.checkpoint import Checkpoints, Progress
from hone.trainer.data import (
    Conversation,
    Conversations,
    plan_steps,
    read_conversations,
    render_conversations,
)
from hone.trainer.losses import supervised_loss
from hone.trainer.optim import learning_rate, set_learning_rate
from hone.trainer.samples import Integers, Samples
from hone.trainer.start import Run, after, build_trainer, check_bad_steps, export, run_process
from hone.trainer.step import Objective, StepOutcome, Trainer, score, train_step

logger = logging.getLogger(__name__)

DEFAULT_VALIDATE_EVERY = 10


def main() -> int:
    return run_process(fine_tune, sys.argv[1:])


def fine_tune(run: Run) -> None:
    """From the base model to R/sft/export; does nothing when that is there."""
    if run.folder.sft_export.exists():
        return
    section = run.recipe.sft
    if section is None:
        raise ValueError("the recipe has no [sft] section; add one to fine-tune")
    conversations = load_conversations(run, section)
    num_trained = len(conversations.lengths_S) - section.validation_conversations
    if num_trained < 1:
        raise ValueError(
            f"sft.validation_conversations {section.validation_conversations} leaves nothing to train"
            f" of {len(conversations.lengths_S)} sequences"
        )
    steps = plan_steps(
        conversations.lengths_S[:num_trained],
        section.batch_tokens,
        section.epochs,
        derive_seed(run.recipe.run.seed, "sft"),
    )[: section.max_steps]
    trainer = build_trainer(run, run.folder.model, section.optimizer)
    checkpoints = Checkpoints(run.folder.sft_checkpoints, run.recipe.trainer.keep_checkpoints, run.ranks)
    progress = resume(checkpoints, trainer, data_identity(conversations, section, run.recipe.run.seed))
    train(run, trainer, checkpoints, progress, conversations, steps)
    export(run, trainer, run.folder.sft_export, tokenizer_from=run.folder.model)


def load_conversations(run: Run, section: SftSection) -> Conversations:
    """All conversations of the recipe's data, rendered with the model's tokenizer and template."""
    source = run.folder.sft_conversations if section.data == "environments" else section.data
    renderer = Renderer(Tokenizer.load(run.folder.model))

    def render(conversation: Conversation) -> Iterable[Rendered]:
        return renderer.render_branches(conversation.messages, conversation.tools)

    with run.spans.span("render"):
        found = render_conversations(read_conversations(source, section.num_conversations), render, section.max_length)
    longest, budget = int(found.lengths_S.max()), run.recipe.trainer.micro_batch_tokens
    if longest > budget:
        raise ValueError(
            f"a conversation has {longest} tokens, trainer.micro_batch_tokens is {budget}; raise it or lower sft.max_length"
        )
    logger.info(
        "rendered conversations",
        extra=fields(
            sequences=len(found.lengths_S),
            tokens=len(found.token_ids_N),
            too_long=found.num_too_long,
            without_answer=found.num_without_answer,
        ),
    )
    return found


def data_identity(conversations: Conversations, section: SftSection, seed: int) -> dict[str, int | str]:
    """What a number of steps is a position in."""
    return {
        "conversations": conversations.fingerprint,
        "batch_tokens": section.batch_tokens,
        "epochs": f"{section.epochs:g}",
        "seed": seed,
    }


def resume(checkpoints: Checkpoints, trainer: Trainer, data: dict[str, int | str]) -> Progress:
    """Progress of the newest checkpoint, loaded into the trainer, or a new beginning."""
    progress = checkpoints.resume(trainer)
    if progress is None:
        return Progress(data=data)
    if progress.data != data:
        raise ValueError(
            f"{checkpoints.folder} was made with other data ({progress.data}, now {data});"
            " give the run another name, or delete that folder to start over"
        )
    logger.info("resumed", extra=fields(step=progress.step))
    return progress


def train(
    run: Run,
    trainer: Trainer,
    checkpoints: Checkpoints,
    progress: Progress,
    conversations: Conversations,
    steps: list[Integers],
) -> None:
    """The remaining optimizer steps, with a checkpoint every so often and one at the end."""
    assert run.recipe.sft is not None
    section, every = run.recipe.sft.optimizer, run.recipe.trainer.checkpoint_every
    validation = Validation.of(run.recipe.sft, conversations)
    run.metrics.write({"sft/num_steps": len(steps)})
    while progress.step < len(steps):
        started = time.perf_counter()
        step = progress.step + 1
        samples = conversations.samples(steps[progress.step])
        lr = learning_rate(section, step, len(steps))
        set_learning_rate(trainer.optimizers, lr)
        with run.spans.span("train", step=step):
            outcome = train_step(trainer, samples, supervised(samples))
        progress = after(progress, outcome)
        extent = {"sft/lr": lr, "sft/num_steps": len(steps), "sft/step_seconds": time.perf_counter() - started}
        measure(run, progress, outcome, samples, extent)
        check_bad_steps(run, progress, outcome, samples)
        is_enough = validation is not None and validation.is_enough(run, trainer, step)
        if step % every == 0 or step == len(steps) or is_enough:
            checkpoints.save(trainer, progress)
        if is_enough:
            return


@dataclass(frozen=True, slots=True)
class Validation:
    """Conversations that are not trained, measured now and then."""

    samples: Samples
    every: int
    stop_at_likelihood: float | None

    @classmethod
    def of(cls, section: SftSection, conversations: Conversations) -> "Validation | None":
        count, size = section.validation_conversations, len(conversations.lengths_S)
        if not count:
            return None
        samples = conversations.samples(np.arange(size - count, size))
        return cls(samples, section.validate_every or DEFAULT_VALIDATE_EVERY, section.stop_at_likelihood)

    def is_enough(self, run: Run, trainer: Trainer, step: int) -> bool:
        """Measure when it is time; whether the likelihood that SFT shall stop at is reached.

        The likelihood of an answer is the probability to sample it token for token at temperature 1.
        """
        if step % self.every:
            return False
        logprobs_T, tokens = score(trainer, self.samples), self.samples.trained_tokens()
        logprobs_S = torch.zeros(tokens.num_sequences).index_add_(0, tokens.sequence_ids_T, logprobs_T)
        likelihood = logprobs_S.exp().mean().item()
        run.metrics.write(
            {"sft/validation_loss": -logprobs_T.mean().item(), "sft/validation_likelihood": likelihood}, step=step
        )
        return self.stop_at_likelihood is not None and likelihood >= self.stop_at_likelihood


def supervised(samples: Samples) -> Objective:
    denominators = samples.denominators()
    return lambda logprobs_T, _: supervised_loss(logprobs_T, denominators)


def measure(run: Run, progress: Progress, outcome: StepOutcome, samples: Samples, extent: Mapping[str, float]) -> None:
    """All metrics of a step, in one line."""
    run.metrics.write(
        {
            "sft/loss": outcome.loss,
            "sft/grad_norm": outcome.grad_norm,
            "sft/num_tokens": samples.num_tokens,
            "sft/num_trained_tokens": len(outcome.logprobs_T),
            "sft/num_sequences": len(samples.lengths_S),
            "sft/num_micro_batches": outcome.num_micro_batches,
            "sft/num_bad_steps": progress.num_bad_steps,
            "sft/tokens_per_second": samples.num_tokens / extent["sft/step_seconds"],
        }
        | dict(extent),
        step=progress.step,
    )


if __name__ == "__main__":
    sys.exit(main())
