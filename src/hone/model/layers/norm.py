"""Root mean square normalisation with a learned scale."""

import torch
from torch import Tensor, nn

from hone.model import ops


class RmsNorm(nn.Module):
    """Scales every row to unit root mean square, then by `weight`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x_xD: Tensor) -> Tensor:
        return ops.rms_norm(x_xD, self.weight, self.eps)
