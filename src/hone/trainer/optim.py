"""Optimizers and learning rate schedules.

R and C are the rows and columns of a matrix, E the experts that are stacked in one parameter.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import AdamW, Optimizer

from hone.config.recipe import OptimizerSection

MUON_MOMENTUM = 0.95
# Keller Jordan's quintic: steep at 0, so that five iterations bring every singular value near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ITERATIONS = 5
# The root mean square of AdamW's updates, so that one learning rate serves both (Moonlight, 2502.16982).
ADAMW_UPDATE_RMS = 0.2
# Looked up by token or output id: their rows are vectors of their own, not a map between spaces.
TABLES = ("embedding", "unembedding")


def build_optimizers(model: nn.Module, section: OptimizerSection) -> list[Optimizer]:
    """One AdamW, or a Muon for the matrices and an AdamW for the rest; weight decay is for matrices only."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if section.kind == "adamw":
        return [_adamw([parameter for _, parameter in named], section)]
    by_muon = [parameter for name, parameter in named if parameter.ndim >= 2 and name not in TABLES]
    others = [parameter for name, parameter in named if parameter.ndim < 2 or name in TABLES]
    momentum = MUON_MOMENTUM if section.momentum is None else section.momentum
    muon = Muon(by_muon, lr=section.lr, momentum=momentum, weight_decay=section.weight_decay)
    return [muon, _adamw(others, section)]


def learning_rate(section: OptimizerSection, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step 1 ... num_steps: a linear warm-up, then the schedule down to its end."""
    if step <= section.warmup_steps:
        return section.lr * step / section.warmup_steps
    end = section.min_lr_ratio or 0.0
    # The last step still trains: the end is where step num_steps + 1 would be.
    done = (step - section.warmup_steps - 1) / max(1, num_steps - section.warmup_steps)
    match section.schedule:
        case "constant":
            return section.lr
        case "linear":
            return section.lr * (end + (1 - end) * (1 - done))
        case "cosine":
            return section.lr * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2)


def set_learning_rate(optimizers: Iterable[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


class Muon(Optimizer):
    """Momentum whose update is orthogonalised: every matrix moves by the same amount in all its directions.

    A parameter with three dimensions is a stack of experts, each of them a matrix of its own. Of sharded parameters,
    stacks are orthogonalised where they lie, since FSDP cuts between experts; matrices are gathered first.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, momentum: float = MUON_MOMENTUM, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            nudges = [self._nudge(parameter, group["momentum"]) for parameter in trained]
            for parameter, direction in zip(trained, orthogonalise_all(nudges), strict=True):
                scale = ADAMW_UPDATE_RMS * math.sqrt(max(parameter.shape[-2:]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * scale)

    def _nudge(self, parameter: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov's momentum."""
        gradient, state = cast(Tensor, parameter.grad), self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def orthogonalise_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalise` of each, sharded as before; plain tensors of one matrix shape in one batch of products."""
    found: list[Tensor | None] = [None] * len(tensors)
    batches: dict[torch.Size, list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            found[place] = orthogonalise_sharded(tensor)
        else:
            batches[tensor.shape[-2:]].append(place)
    for shape, places in batches.items():
        stacks = [tensors[place].reshape(-1, *shape) for place in places]
        parts = torch.split(orthogonalise(torch.cat(stacks)), [len(stack) for stack in stacks])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(tensors[place].shape)
    return [tensor for tensor in found if tensor is not None]


def orthogonalise_sharded(matrices: DTensor) -> Tensor:
    mesh, placements = matrices.device_mesh, matrices.placements
    if matrices.ndim == 3 and placements == (Shard(0),):
        local = orthogonalise(matrices.to_local())
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=matrices.shape, stride=matrices.stride()
        )
    whole = orthogonalise(matrices.full_tensor())
    return DTensor.from_local(whole, mesh, [Replicate()], run_check=False).redistribute(mesh, placements)


def orthogonalise(matrices_xRC: Tensor) -> Tensor:
    """The nearest matrix with singular values around 1, by Newton-Schulz; leading dimensions are batches."""
    if matrices_xRC.numel() == 0:
        return matrices_xRC
    work = matrices_xRC.reshape(-1, *matrices_xRC.shape[-2:]).float()
    is_tall = work.shape[-2] > work.shape[-1]
    if is_tall:
        work = work.mT
    work = work / work.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if work.is_cuda:
        # Precise enough for five iterations. A CPU keeps float32, in which one rank and two give the same curve.
        work = work.bfloat16()
    a, b, c = NEWTON_SCHULZ
    with onednn_products():
        for _ in range(NEWTON_SCHULZ_ITERATIONS):
            gram = work @ work.mT
            work = torch.baddbmm(work, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), work, beta=a)
    return (work.mT if is_tall else work).reshape(matrices_xRC.shape).to(matrices_xRC.dtype)


@contextlib.contextmanager
def onednn_products() -> Iterator[None]:
    """Float32 products on a CPU by oneDNN: on an AMD EPYC twice as fast as the default (90 of 128 x 128: 32 to 69 ms).

    The switch allows oneDNN to round to bfloat16, which it does only where AMX multiplies those: left alone there.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if not torch.cpu.get_capabilities().get("amx_bf16"):
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _adamw(parameters: Sequence[nn.Parameter], section: OptimizerSection) -> AdamW:
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # One fused kernel per parameter: on a CPU 3 x faster than foreach, which is a loop there.
    return AdamW([group for group in groups if group["params"]], lr=section.lr, betas=section.betas, fused=True)
