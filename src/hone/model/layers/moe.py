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
        logits_NE = ops.linear(x_ND.float(), self.router.float())
        expert_ids_Nk, expert_weights_Nk = route(logits_NE, self.correction_bias, self.config)
        if self.expert_counts_E is not None:
            chosen = expert_ids_Nk.flatten()
            self.expert_counts_E.scatter_add_(0, chosen, torch.ones_like(chosen))
        out_ND = ops.experts(x_ND, expert_ids_Nk, expert_weights_Nk, self.gate_up, self.down)
        return out_ND if self.shared is None else out_ND + self.shared.forward(x_ND)


def route(logits_NE: Tensor, correction_bias_E: Tensor | None, config: MoeConfig) -> Routing:
    """Choose by score plus correction, within the best groups; weigh by the scores alone."""
    scores_NE = _sigmoid(logits_NE) if config.score == "sigmoid" else logits_NE.softmax(-1)
    merits_NE = scores_NE if correction_bias_E is None else scores_NE + correction_bias_E
    if config.groups_per_token < config.num_groups:
        merits_NE = _within_best_groups(merits_NE.detach(), config.num_groups, config.groups_per_token)
    expert_ids_Nk = merits_NE.topk(config.experts_per_token, dim=-1, sorted=False).indices
    weights_Nk = scores_NE.gather(1, expert_ids_Nk)
    if config.normalise_weights:
        # A running sum adds in the same order whatever the number of rows; `sum` does not.
        weights_Nk = weights_Nk / (weights_Nk.cumsum(-1)[:, -1:] + 1e-20)
    if config.weight_scale != 1.0:
        weights_Nk = weights_Nk * config.weight_scale
    return Routing(expert_ids_Nk, weights_Nk)


def _sigmoid(logits_NE: Tensor) -> Tensor:
    # torch's own sigmoid rounds an element differently by its place in the tensor (vector lanes or the tail),
    # so a token's weights would depend on its neighbours; its softmax over the last dimension does not.
    return torch.stack((logits_NE, torch.zeros_like(logits_NE)), -1).softmax(-1)[..., 0]


def _within_best_groups(merits_NE: Tensor, num_groups: int, groups_per_token: int) -> Tensor:
    """Leaves out the experts of all but the best groups; a group is as good as its two best experts."""
    merits_Nge = merits_NE.view(len(merits_NE), num_groups, -1)
    group_merits_Ng = merits_Nge.topk(2, dim=-1).values.sum(-1)
    best = group_merits_Ng.topk(groups_per_token, dim=-1, sorted=False).indices
    closed_Ng = torch.ones_like(group_merits_Ng, dtype=torch.bool).scatter(1, best, False)
    return merits_Nge.masked_fill(closed_Ng[..., None], -torch.inf).flatten(1)
