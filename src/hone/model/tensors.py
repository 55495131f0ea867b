"""Whole tensors in and out of parameters, sharded or not."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, equal on all ranks, into a parameter; a sharded one takes its part."""
    if isinstance(parameter, DTensor):
        moved = value.to(parameter.device, parameter.dtype)
        # Every rank holds the value, so nothing has to be sent.
        value = distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def whole(parameter: Tensor) -> Tensor:
    """The parameter with the parts of all ranks: a collective call if it is sharded."""
    detached = parameter.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached
