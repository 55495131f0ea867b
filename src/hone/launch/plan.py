"""Which processes a stage needs, as pure data."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hone.config.recipe import Recipe
from hone.envs.remote import interpreter


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process: its name in logs and metrics, its command, what it adds to the environment.

    ends_stage: the stage is over when all processes with this mark have ended with exit code 0.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    ends_stage: bool = False


def plan_sft(recipe: Recipe, folder: Path) -> list[ProcessPlan]:
    """SFT is one trainer with all cores."""
    return [_trainer("hone.trainer.sft", recipe, folder, threads=recipe.trainer.threads or num_cores())]


def plan_rl(recipe: Recipe, folder: Path) -> list[ProcessPlan]:
    """RL is an inference server, env workers, the orchestrator and a trainer, which share the machine's cores."""
    share = max(1, num_cores() // 2)
    return [
        plan_inference(recipe, folder, threads=recipe.engine.threads or share),
        _python("orchestrator", "hone.orchestrator.loop", str(folder), threads=1, ends_stage=True),
        *_workers(recipe, folder),
        _trainer("hone.trainer.rl", recipe, folder, threads=recipe.trainer.threads or share),
    ]


def _workers(recipe: Recipe, folder: Path) -> list[ProcessPlan]:
    """Env workers for each Python that environments name; those of our own are told apart by a number alone."""
    environments: dict[str | None, list[str]] = {}
    for section in recipe.environments:
        environments.setdefault(section.python, []).append(section.name)
    plans = []
    for python, names in environments.items():
        executable = sys.executable if python is None else str(interpreter(python))
        label = "worker" if python is None else f"worker-{names[0]}"
        for index in range(recipe.workers.num_workers):
            arguments = (str(folder), f"{label}-{index}", *names)
            plans.append(_python(f"{label}-{index}", "hone.envs.worker", *arguments, threads=1, executable=executable))
    return plans


def plan_inference(
    recipe: Recipe, folder: Path, *, threads: int | None = None, model: Path | None = None
) -> ProcessPlan:
    """The inference server of a run; `model` fixes the weights, else it serves the newest policy."""
    arguments = [str(folder)] if model is None else [str(folder), "--model", str(model)]
    return _python(
        "inference", "hone.inference.server", *arguments, threads=threads or recipe.engine.threads or num_cores()
    )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _trainer(module: str, recipe: Recipe, folder: Path, threads: int) -> ProcessPlan:
    ranks = recipe.trainer.num_ranks
    if ranks == 1:
        return _python("trainer", module, str(folder), threads=threads, ends_stage=True)
    # --standalone: torchrun chooses a free rendezvous port on this machine.
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module)
    return _python("trainer", *launcher, str(folder), threads=max(1, threads // ranks), ends_stage=True)


def _python(
    name: str,
    module: str,
    *arguments: str,
    threads: int,
    ends_stage: bool = False,
    executable: str = sys.executable,
) -> ProcessPlan:
    return ProcessPlan(
        name=name,
        command=(executable, "-m", module, *arguments),
        # Threads that spin while they wait take the core from the process that they wait for.
        environment={
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        },
        ends_stage=ends_stage,
    )
