"""Mixture of experts: a router chooses, the chosen experts compute, shared experts always do.

N flat tokens, D width, E experts, k experts per token, F expert hidden, g expert groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hone.model import ops
from hone.model.families import MoeConfig
from hone.model.layers.mlp import Mlp


class Routing(NamedTuple):
    """Which experts each token visits, and the weight of each in its sum."""

    expert_ids: Tensor
    weights: Tensor


class Moe(nn.Module):
    """Routed experts plus, where the family has them, shared ones."""

    def __init__(self, width: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Parameter(torch.zeros(config.num_experts, width))
        # Moved by the load balancer, not by gradients; it decides who is chosen and never enters the output.
        bias = torch.zeros(config.num_experts) if config.score == "sigmoid" else None
        self.register_buffer("correction_bias", bias)
        self.correction_bias: Tensor | None
        self.gate_up = nn.Parameter(torch.zeros(config.num_experts, 2 * config.expert_hidden, width))
        self.down = nn.Parameter(torch.zeros(config.num_experts, width, config.expert_hidden))
        self.shared = Mlp(width, config.shared_hidden) if config.num_shared_experts else None
        self.expert_counts_E: Tensor | None = None

    def forward(self, x_ND: Tensor) -> Tensor:
        if self.expert_counts_E is None and not torch.is_grad_enabled():
            return self._infer(x_ND)
        logits_NE = ops.linear(x_ND.float(), self.router.float())
        expert_ids_Nk, expert_weights_Nk = route(logits_NE, self.correction_bias, self.config)
        if self.expert_counts_E is not None:
            chosen = expert_ids_Nk.flatten()
            self.expert_counts_E.scatter_add_(0, chosen, torch.ones_like(chosen))
        out_ND = ops.experts(x_ND, expert_ids_Nk, expert_weights_Nk, self.gate_up, self.down)
        return out_ND if self.shared is None else out_ND + self.shared.forward(x_ND)

    def _infer(self, x_ND: Tensor) -> Tensor:
        """The same in one operation, which has no gradient and does not tell what it chose."""
        config, shared = self.config, self.shared
        return ops.mixture(
            x_ND,
            self.router,
            self.correction_bias,
            self.gate_up,
            self.down,
            None if shared is None else (shared.gate_up, shared.down),
            config.experts_per_token,
            score=config.score,
            num_groups=config.num_groups,
            groups_per_token=config.groups_per_token,
            normalise=config.normalise_weights,
            scale=config.weight_scale,
        )


def route(logits_NE: Tensor, correction_bias_E: Tensor | None, config: MoeConfig) -> Routing:
    """Choose by score plus correction, within the best groups; weigh by the scores alone."""
    chosen = ops.route(
        logits_NE,
        correction_bias_E,
        config.experts_per_token,
        score=config.score,
        num_groups=config.num_groups,
        groups_per_token=config.groups_per_token,
        normalise=config.normalise_weights,
        scale=config.weight_scale,
    )
    return Routing(*chosen)
