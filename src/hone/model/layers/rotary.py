"""Tables of the rotary position embedding."""

import math

import torch
from torch import Tensor

from hone.model.families import Llama3Scaling, Rope


def rotary_tables(rope: Rope, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos_Pr and sin_Pr for positions 0 to P - 1; the two halves of the channels are equal."""
    channels = torch.arange(0, rope.dims, 2, dtype=torch.float32)
    frequencies = 1.0 / (rope.theta ** (channels / rope.dims))
    if rope.scaling is not None:
        frequencies = _slow_down(frequencies, rope.scaling)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def _slow_down(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Full factor for waves longer than the low bound, none above the high bound, a blend between."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
