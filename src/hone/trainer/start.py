"""What the two trainer processes share: start-up, the policy with its optimizer, publishing, and how they end."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hone.config.load import load_recipe
from hone.config.recipe import OptimizerSection, Recipe
from hone.model import ops
from hone.model.checkpoint import CheckpointError, load_model, save_model
from hone.model.parallel import full_state, shard
from hone.model.transformer import Transformer
from hone.observability import logs
from hone.observability.disk import disk_complaint, is_disk_trouble
from hone.observability.metrics import Metrics
from hone.observability.spans import Spans
from hone.trainer.checkpoint import Progress
from hone.trainer.memory import keep_freed_memory
from hone.trainer.optim import build_optimizers
from hone.trainer.ranks import Ranks
from hone.trainer.samples import Samples
from hone.trainer.step import StepOutcome, Trainer
from hone.transport.batches import write_batch
from hone.transport.folders import RunFolder

logger = logging.getLogger(__name__)

WILL_NEVER_WORK = 2


class Diverged(RuntimeError):
    """Too many steps had a loss or gradient that is not finite; training on would not help."""


@dataclass(frozen=True, slots=True)
class Run:
    """One trainer process of a run: its recipe, its folder, its place among the ranks, where it writes numbers."""

    recipe: Recipe
    folder: RunFolder
    ranks: Ranks
    metrics: Metrics
    spans: Spans

    def close(self) -> None:
        self.metrics.close()
        self.spans.close()
        self.ranks.leave()


def run_process(body: Callable[[Run], None], arguments: list[str]) -> int:
    """Run `body` for the folder in `arguments`; returns the exit code: 0 done, 2 will never work."""
    if len(arguments) != 1:
        return _complain("give the run's folder, and nothing else")
    folder = RunFolder(Path(arguments[0]))
    rank = int(os.environ.get("RANK", "0"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    logs.configure("trainer" if rank == 0 else f"trainer-{rank}", folder.path)
    try:
        with contextlib.closing(join_run(folder)) as run:
            body(run)
    except (ValueError, CheckpointError, Diverged) as error:
        return _complain(str(error))
    except OSError as error:
        if not is_disk_trouble(error):
            raise
        return _complain(disk_complaint(error, folder.path))
    return 0


def die_with_parent() -> None:
    """torchrun gives each rank a session of its own: without this, a rank outlives a torchrun that is killed."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def join_run(folder: RunFolder) -> Run:
    """Read the recipe, join the other ranks, set what is set once per process."""
    recipe = load_recipe(folder.config)
    section = recipe.trainer
    keep_freed_memory()
    if section.threads is not None:
        torch.set_num_threads(max(1, section.threads // section.num_ranks))
    if section.numerics == "strict":
        ops.set_backend("native")
    # Computing in another type than the weights is done by FSDP, also on a single rank.
    ranks = Ranks.join(recipe.device, always=section.autocast != "none")
    if ranks.num_ranks != section.num_ranks:
        raise ValueError(
            f"trainer.num_ranks is {section.num_ranks}, but {ranks.num_ranks} processes were started;"
            " start them with torchrun --nproc-per-node"
        )
    nowhere = Path(os.devnull)
    return Run(
        recipe,
        folder,
        ranks,
        Metrics(folder.metrics if ranks.leads else nowhere, "trainer", port=_metrics_port(recipe, ranks)),
        Spans(folder.spans if ranks.leads else nowhere, "trainer"),
    )


def build_trainer(run: Run, policy: Path, optimizer: OptimizerSection) -> Trainer:
    """The policy in `policy` with a fresh optimizer."""
    model = load_policy(run, policy)
    model.activation_checkpointing = run.recipe.trainer.activation_checkpointing
    return Trainer(
        model=model,
        optimizers=build_optimizers(model, optimizer),
        ranks=run.ranks,
        micro_batch_tokens=run.recipe.trainer.micro_batch_tokens,
        max_grad_norm=optimizer.max_grad_norm,
    )


def load_policy(run: Run, folder: Path) -> Transformer:
    """A model from a folder in the Hugging Face layout, sharded where there are ranks to shard over."""
    model = load_model(folder, dtype=getattr(torch, run.recipe.model.dtype), device=run.ranks.device)
    if run.ranks.mesh is None:
        return model
    autocast = run.recipe.trainer.autocast
    return shard(model, run.ranks.mesh, None if autocast == "none" else getattr(torch, autocast))


def export(run: Run, trainer: Trainer, target: Path, tokenizer_from: Path) -> None:
    """Write the policy in the Hugging Face layout with its tokenizer: a collective call."""
    state = full_state(trainer.model)
    if run.ranks.leads:
        save_model(state, trainer.model.config, target, tokenizer_from=tokenizer_from)
    run.ranks.wait_for_all()


def after(progress: Progress, outcome: StepOutcome) -> Progress:
    """Progress with one more step."""
    return Progress(progress.step + 1, progress.num_bad_steps + (not outcome.is_finite), progress.data)


def check_bad_steps(run: Run, progress: Progress, outcome: StepOutcome, samples: Samples) -> None:
    """Keep the batch of a step that was skipped; raise `Diverged` when there were too many of them."""
    if outcome.is_finite:
        return
    path = run.folder.path / "bad_batches" / f"step_{progress.step:06d}.batch"
    if run.ranks.leads:
        write_batch(path, samples.to_batch(progress.step))
    what = f"step {progress.step}: loss {outcome.loss}, gradient norm {outcome.grad_norm}; its batch is kept in {path}"
    if progress.num_bad_steps > run.recipe.trainer.max_bad_steps:
        raise Diverged(
            f"{what}; {progress.num_bad_steps} steps were not finite, trainer.max_bad_steps allows"
            f" {run.recipe.trainer.max_bad_steps}; lower the learning rate or look at the batch"
        )
    logger.warning("%s; the step is skipped", what)


def _metrics_port(recipe: Recipe, ranks: Ranks) -> int | None:
    return recipe.run.metrics_port if ranks.leads else None


def _complain(message: str) -> int:
    logger.error("%s", message)
    print(f"error: {message}", file=sys.stderr)
    return WILL_NEVER_WORK
