"""The optimizer step that SFT and RL share.

N flat tokens, D width, V vocabulary, T trained tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from hone.model import ops
from hone.model.transformer import Transformer
from hone.trainer.packing import MicroBatch, micro_batch, plan_micro_batches
from hone.trainer.ranks import Ranks
from hone.trainer.samples import Samples

# 256 MiB of float32 logits; more of them are computed in parts, and again in the backward pass.
MAX_LOGITS = 2**26

Objective = Callable[[Tensor, MicroBatch], Tensor]
"""A micro-batch's part of the step's loss, from the logprobs of its trained tokens."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """The policy that is trained, and how a step changes it."""

    model: Transformer
    optimizers: Sequence[Optimizer]
    ranks: Ranks
    micro_batch_tokens: int
    max_grad_norm: float


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step did; equal on all ranks. `logprobs_T`: of all trained tokens of the step, before the update."""

    loss: float
    grad_norm: float
    logprobs_T: Tensor
    num_micro_batches: int

    @property
    def is_finite(self) -> bool:
        """Whether the step changed the policy; a loss or gradient that is not finite leaves it as it was."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(trainer: Trainer, samples: Samples, objective: Objective) -> StepOutcome:
    """One optimizer step on all of the samples: a collective call, each rank trains its share."""
    micro_batches = cut(trainer, samples)
    parts = [forward_backward(trainer, part, objective) for part in micro_batches]
    loss, logprobs_T = combine(parts, micro_batches, samples, trainer.ranks)
    grad_norm = clip_gradients(trainer.model, trainer.max_grad_norm)
    outcome = StepOutcome(loss, grad_norm, logprobs_T, len(micro_batches))
    for optimizer in trainer.optimizers:
        if outcome.is_finite:
            optimizer.step()
        optimizer.zero_grad()
    return outcome


@torch.no_grad()
def score(trainer: Trainer, samples: Samples) -> Tensor:
    """Logprobs of the tokens that would train, in the order of the samples, under the present policy: collective."""
    micro_batches = cut(trainer, samples)
    parts = [
        Part(torch.zeros(()), token_logprobs(trainer.model, hidden_states(trainer.model, part), part))
        for part in micro_batches
    ]
    _, logprobs_T = combine(parts, micro_batches, samples, trainer.ranks)
    return logprobs_T


@dataclass(frozen=True, slots=True)
class Part:
    """What one micro-batch adds to the step: its share of the loss and its logprobs, both without gradient."""

    loss: Tensor
    logprobs_T: Tensor


def cut(trainer: Trainer, samples: Samples) -> list[MicroBatch]:
    """This rank's micro-batches."""
    plan = plan_micro_batches(samples, trainer.micro_batch_tokens, trainer.ranks.num_ranks)
    return [micro_batch(samples, chosen, trainer.ranks.device) for chosen in plan[trainer.ranks.rank]]


def forward_backward(trainer: Trainer, part: MicroBatch, objective: Objective) -> Part:
    hidden_ND = hidden_states(trainer.model, part)
    logprobs_T = token_logprobs(trainer.model, hidden_ND, part)
    loss = objective(logprobs_T, part)
    if not len(part.targets_T):
        # A rank without work still has gradients to add to every collective of the backward pass: zeros.
        loss = loss + 0.0 * trainer.model.unembed(hidden_ND[:1]).sum()
    # FSDP averages gradients over ranks, while the objective's denominators already count all ranks.
    (loss * trainer.ranks.num_ranks).backward()  # type: ignore[no-untyped-call]
    return Part(loss.detach(), logprobs_T.detach())


def hidden_states(model: Transformer, part: MicroBatch) -> Tensor:
    """Hidden states of all tokens of a micro-batch, after the final norm."""
    hidden_ND: Tensor = model(part.token_ids_N, part.positions_N, part.attend)
    return hidden_ND


def token_logprobs(model: Transformer, hidden_ND: Tensor, part: MicroBatch) -> Tensor:
    """Logprobs of the trained tokens alone: no logits are computed for the others, and never too many at once."""
    hidden_TD = hidden_ND.index_select(0, part.rows_T)
    rows = max(1, MAX_LOGITS // model.config.vocabulary_size)
    if len(hidden_TD) <= rows:
        return _logprobs(model, hidden_TD, part.targets_T, part.temperatures_T)
    columns = (hidden_TD, part.targets_T, part.temperatures_T)
    chunks = zip(*(torch.split(column, rows) for column in columns), strict=True)
    return torch.cat([_recomputed_logprobs(model, *chunk) for chunk in chunks])


def combine(
    parts: Sequence[Part], micro_batches: Sequence[MicroBatch], samples: Samples, ranks: Ranks
) -> tuple[float, Tensor]:
    """The loss of the step and the logprobs of all its trained tokens in the order of the samples, on every rank."""
    total = torch.zeros(1 + int(samples.trains_N.sum()))
    for part, source in zip(parts, micro_batches, strict=True):
        total[0] += part.loss.cpu()
        total[1 + source.places_T.cpu()] = part.logprobs_T.cpu()
    total = ranks.sum(total)
    return total[0].item(), total[1:]


def clip_gradients(model: Transformer, max_norm: float) -> float:
    """Scale the gradients down to `max_norm`; returns the norm over all ranks that they had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _logprobs(model: Transformer, hidden_TD: Tensor, targets_T: Tensor, temperatures_T: Tensor) -> Tensor:
    return ops.token_logprobs(model.unembed(hidden_TD), targets_T, temperatures_T)


def _recomputed_logprobs(model: Transformer, hidden_TD: Tensor, targets_T: Tensor, temperatures_T: Tensor) -> Tensor:
    kept = checkpoint(_logprobs, model, hidden_TD, targets_T, temperatures_T, use_reentrant=False)
    assert isinstance(kept, Tensor)
    return kept
