"""The gated MLP of dense layers and shared experts."""

import torch
from torch import Tensor, nn

from hone.model import ops


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(2 * hidden, width))
        self.down = nn.Parameter(torch.zeros(width, hidden))

    def forward(self, x_ND: Tensor) -> Tensor:
        return ops.mlp(x_ND, self.gate_up, self.down)
