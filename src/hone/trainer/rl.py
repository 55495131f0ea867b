"""Reinforcement learning: `python -m hone.trainer.rl RUN_FOLDER`, alone or under torchrun.

Trains the start policy of the run on batches from the orchestrator; publishes the weights of every step in R/weights,
resumes from R/checkpoints, ends with R/export. Rank 0 talks to the orchestrator, all ranks train.
"""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hone.config.recipe import RlSection
from hone.model.checkpoint import hugging_face_tensors
from hone.model.parallel import full_state
from hone.model.transformer import Transformer
from hone.observability.logs import fields
from hone.schema.batches import BatchReady, CheckpointSaved, StepDone, TrainingBatch
from hone.schema.wire import decode, encode
from hone.trainer.checkpoint import Checkpoints, Progress
from hone.trainer.exchange import Exchange
from hone.trainer.losses import PolicyLoss, kept_tokens, policy_loss, reference_kl
from hone.trainer.mismatch import mismatch_metrics
from hone.trainer.optim import learning_rate, set_learning_rate
from hone.trainer.packing import MicroBatch
from hone.trainer.ranks import Ranks
from hone.trainer.samples import Samples
from hone.trainer.start import Run, after, build_trainer, check_bad_steps, export, load_policy, run_process
from hone.trainer.step import StepOutcome, Trainer, hidden_states, token_logprobs, train_step
from hone.transport import weights
from hone.transport.addresses import load_addresses
from hone.transport.batches import read_batch

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 10.0
LEAST_SILENCE_SECONDS = 600.0


def main() -> int:
    return run_process(reinforce, sys.argv[1:])


def reinforce(run: Run) -> None:
    """Train until the orchestrator has no more batches, then export."""
    section = run.recipe.rl
    if section is None:
        raise ValueError("the recipe has no [rl] section; add one to reinforce")
    if run.folder.is_exported():
        logger.info("the result is exported already")  # by a process that died between the export and its end
        return
    start = run.folder.start_policy()
    trainer = build_trainer(run, start, section.optimizer)
    reference = load_reference(run) if section.loss.reference_kl else None
    checkpoints = Checkpoints(run.folder.checkpoints, run.recipe.trainer.keep_checkpoints, run.ranks)
    progress = checkpoints.resume(trainer) or Progress()
    logger.info("ready", extra=fields(step=progress.step, policy=str(start)))
    publish(run, trainer, progress.step)
    if run.ranks.leads:
        with Exchange(load_addresses(run.folder.addresses).trainer) as exchange:
            train(run, section, trainer, reference, checkpoints, progress, exchange)
    else:
        train(run, section, trainer, reference, checkpoints, progress, None)
    export(run, trainer, run.folder.export, tokenizer_from=start)


def load_reference(run: Run) -> Transformer:
    """The policy that RL starts from, frozen."""
    reference = load_policy(run, run.folder.start_policy())
    return reference.requires_grad_(False)


def train(
    run: Run,
    section: RlSection,
    trainer: Trainer,
    reference: Transformer | None,
    checkpoints: Checkpoints,
    progress: Progress,
    exchange: Exchange | None,
) -> None:
    """Consumes batches, publishes policy versions. Waits for the orchestrator; unblocked by BatchReady or NoMoreBatches."""
    loss = PolicyLoss.from_section(section.loss, section.sampling.max_tokens)
    saved = progress.step
    clock = Clock()
    while (samples := next_samples(run, section, progress.step + 1, exchange)) is not None:
        clock.lap("wait")
        lr = learning_rate(section.optimizer, progress.step + 1, section.num_steps)
        set_learning_rate(trainer.optimizers, lr)
        objective = PolicyObjective(loss, samples, reference)
        outcome = train_step(trainer, samples, objective)
        progress = after(progress, outcome)
        clock.lap("train")
        publish(run, trainer, progress.step)
        tell(exchange, StepDone(progress.step, run.folder.relative(run.folder.weights_of(progress.step))))
        clock.lap("broadcast")
        clock.record(run, progress.step)
        own = {"train/lr": lr, "train/num_bad_steps": progress.num_bad_steps} | objective.metrics(run.ranks)
        measure(
            run,
            progress.step,
            outcome,
            clock,
            own | batch_metrics(samples, progress.step) | loss_metrics(loss, outcome, samples),
        )
        check_bad_steps(run, progress, outcome, samples)
        if progress.step % run.recipe.trainer.checkpoint_every == 0:
            saved = save(checkpoints, trainer, progress, exchange)
        clock = Clock()
    if saved != progress.step:
        save(checkpoints, trainer, progress, exchange)
    if exchange is not None and not exchange.settle(SETTLE_SECONDS):
        logger.info("the orchestrator ended before it confirmed the last checkpoint")


def next_samples(run: Run, section: RlSection, step: int, exchange: Exchange | None) -> Samples | None:
    """The samples of one step on every rank; None when there are no more."""
    data = None if exchange is None else fetch_batch(run, section, step, exchange)
    shared = run.ranks.share(data)
    return Samples.from_batch(decode(shared, TrainingBatch)) if shared else None


def fetch_batch(run: Run, section: RlSection, step: int, exchange: Exchange) -> bytes:
    # A batch may take as long as it takes. Code of an environment may keep an orchestrator without env workers from
    # saying so, but not for longer than a rollout.
    answer = exchange.next_batch(step, max(LEAST_SILENCE_SECONDS, 2 * section.rollout_timeout_seconds))
    if not isinstance(answer, BatchReady):
        return b""
    batch = read_batch(run.folder.resolve(answer.path))
    if batch.step != step:
        raise ValueError(f"{answer.path} holds the batch of step {batch.step}, not of step {step}")
    return encode(batch)


class PolicyObjective:
    """The policy loss over one step's denominators; adds up the KL to the reference where it counts."""

    def __init__(self, loss: PolicyLoss, samples: Samples, reference: Transformer | None) -> None:
        self._loss = loss
        self._denominators = samples.denominators()
        self._reference = reference
        self._reference_kl = torch.zeros(())

    def __call__(self, logprobs_T: Tensor, part: MicroBatch) -> Tensor:
        if self._reference is None:
            return policy_loss(logprobs_T, part.sampled, self._loss, self._denominators)
        reference_logprobs_T = frozen_logprobs(self._reference, part)
        self._reference_kl += reference_kl(logprobs_T.detach(), reference_logprobs_T).sum().cpu()
        return policy_loss(logprobs_T, part.sampled, self._loss, self._denominators, reference_logprobs_T)

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """A collective call."""
        if self._reference is None:
            return {}
        return {"train/reference_kl": ranks.sum(self._reference_kl).item() / self._denominators.num_tokens}


@torch.no_grad()
def frozen_logprobs(model: Transformer, part: MicroBatch) -> Tensor:
    return token_logprobs(model, hidden_states(model, part), part)


def publish(run: Run, trainer: Trainer, version: int) -> None:
    """Write the weights of a policy version for the engines: a collective call."""
    state = full_state(trainer.model)
    if run.ranks.leads:
        config = trainer.model.config
        described = config.to_hugging_face() | {"dtype": run.recipe.model.dtype}
        weights.publish(hugging_face_tensors(state, config), described, run.folder.weights, version)


def save(checkpoints: Checkpoints, trainer: Trainer, progress: Progress, exchange: Exchange | None) -> int:
    checkpoints.save(trainer, progress)
    tell(exchange, CheckpointSaved(progress.step, checkpoints.covered()))
    return progress.step


def tell(exchange: Exchange | None, report: StepDone | CheckpointSaved) -> None:
    if exchange is not None:
        exchange.report(report)


@dataclass(slots=True)
class Clock:
    """Splits one step into its spans."""

    seconds: dict[str, float] = field(default_factory=dict)
    started_at: dict[str, float] = field(default_factory=dict)
    _unix: float = field(default_factory=time.time)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """What happened since the last lap is `name`."""
        now = time.perf_counter()
        self.seconds[name], self.started_at[name] = now - self._last, self._unix
        self._last, self._unix = now, time.time()

    def record(self, run: Run, step: int) -> None:
        for name, seconds in self.seconds.items():
            run.spans.record(name, self.started_at[name], seconds, step=step)


def measure(run: Run, step: int, outcome: StepOutcome, clock: Clock, others: Mapping[str, float]) -> None:
    """All metrics of a step, in one line."""
    numbers = {
        "train/loss": outcome.loss,
        "train/grad_norm": outcome.grad_norm,
        "train/num_micro_batches": outcome.num_micro_batches,
        "train/step_seconds": clock.seconds["train"],
        "train/wait_seconds": clock.seconds["wait"],
        "train/broadcast_seconds": clock.seconds["broadcast"],
        "train/tokens_per_second": others["train/num_tokens"] / clock.seconds["train"],
        "train/samples_per_second": others["train/num_samples"] / sum(clock.seconds.values()),
    }
    run.metrics.write(numbers | dict(others), step)


def batch_metrics(samples: Samples, step: int) -> dict[str, float]:
    """What the batch of a step was made of; step s trains policy version s - 1."""
    staleness_S = step - 1 - samples.versions_S
    num_trained = samples.denominators().num_tokens
    return {
        "train/num_samples": len(samples.lengths_S),
        "train/num_tokens": samples.num_tokens,
        "train/num_trained_tokens": num_trained,
        "train/staleness_min": int(staleness_S.min()),
        "train/staleness_mean": float(staleness_S.mean()),
        "train/staleness_max": int(staleness_S.max()),
        "train/reward_mean": float(samples.rewards_S.mean()),
        "train/reward_std": float(samples.rewards_S.std()),
        "train/advantage_abs_mean": float(np.abs(samples.advantages_N[samples.trains_N]).sum() / num_trained),
    }


def loss_metrics(loss: PolicyLoss, outcome: StepOutcome, samples: Samples) -> dict[str, float]:
    """How far the policy is from the one that sampled, and how much of the batch the loss left out."""
    tokens = samples.trained_tokens()
    if not len(outcome.logprobs_T):
        return {"train/masked_share": 0.0}
    kept_T = kept_tokens(outcome.logprobs_T, tokens, loss)
    masked_share = 1 - kept_T.float().mean().item()
    return {"train/masked_share": masked_share, **mismatch_metrics(outcome.logprobs_T, tokens.sampler_logprobs_T)}


if __name__ == "__main__":
    sys.exit(main())
