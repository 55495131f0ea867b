"""The decoder that the trainer and the engine share, for every family.

N flat tokens, D width, V vocabulary, E experts, r rotary channels.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hone.model import ops
from hone.model.families import ModelConfig
from hone.model.layers.attention import Attend, Attention
from hone.model.layers.mlp import Mlp
from hone.model.layers.moe import Moe
from hone.model.layers.norm import RmsNorm
from hone.model.layers.rotary import rotary_tables
from hone.model.tensors import fill


class Transformer(nn.Module):
    """A causal decoder over flat packed tokens. All parameters are 0 until `initialize` or a load sets them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.zeros(config.vocabulary_size, config.width))
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RmsNorm(config.width, config.norm_eps)
        self.unembedding = None if config.tied_embeddings else nn.Parameter(torch.zeros_like(self.embedding))
        cos_Pr, sin_Pr = rotary_tables(config.rope, config.max_positions)
        self.register_buffer("cos_Pr", cos_Pr, persistent=False)
        self.register_buffer("sin_Pr", sin_Pr, persistent=False)
        self.cos_Pr: Tensor
        self.sin_Pr: Tensor

    def forward(self, token_ids_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm; `attend` knows which tokens belong together."""
        hidden_ND = functional.embedding(token_ids_N, self.embedding)
        cos_Nr = self.cos_Pr.index_select(0, positions_N)
        sin_Nr = self.sin_Pr.index_select(0, positions_N)
        for layer in self.layers:
            hidden_ND = layer(hidden_ND, cos_Nr, sin_Nr, attend)
        return self.norm.forward(hidden_ND)

    def unembed(self, hidden_ND: Tensor) -> Tensor:
        """Float32 logits."""
        weight_VD = self.embedding if self.unembedding is None else self.unembedding
        return ops.linear(hidden_ND, weight_VD).float()

    def initialize(self, seed: int) -> Self:
        """Draw every parameter from (seed, its name) alone: the same on any device and world size."""
        for name, parameter in self.named_parameters():
            fill(parameter, _initial_value(name, parameter.shape, self.config.initializer_range, seed))
        for bias_E in self.correction_biases().values():
            bias_E.zero_()
        return self

    @property
    def activation_checkpointing(self) -> bool:
        """Whether layers keep only their inputs for the backward pass and compute the rest again."""
        return all(layer.checkpointed for layer in self._decoder_layers())

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        for layer in self._decoder_layers():
            layer.checkpointed = on

    def count_expert_tokens(self, on: bool = True) -> None:
        """Start (or stop) adding up how many tokens visit each expert."""
        for moe in self._moes().values():
            device = moe.router.device
            moe.expert_counts_E = torch.zeros(len(moe.router), dtype=torch.int64, device=device) if on else None

    def take_expert_tokens(self) -> dict[int, Tensor]:
        """Tokens per expert of each sparse layer since the last take, on this rank; the counts start again at 0."""
        taken = {}
        for index, moe in self._moes().items():
            if moe.expert_counts_E is not None:
                taken[index] = moe.expert_counts_E.clone()
                moe.expert_counts_E.zero_()
        return taken

    def correction_biases(self) -> dict[int, Tensor]:
        """The biases by which a load balancer steers the choice of experts, per sparse layer; write to them in place."""
        biases = {index: moe.correction_bias for index, moe in self._moes().items()}
        return {index: bias_E for index, bias_E in biases.items() if bias_E is not None}

    def _decoder_layers(self) -> Iterator["DecoderLayer"]:
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def _moes(self) -> dict[int, Moe]:
        return {layer.index: layer.mlp for layer in self._decoder_layers() if isinstance(layer.mlp, Moe)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Positions and router corrections need float32 whatever the parameters are cast to.
        exact = {id(buffer) for buffer in self.buffers()}

        def keep_exact(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in exact else moved

        return super()._apply(keep_exact, recurse)  # type: ignore[no-untyped-call, no-any-return]


class DecoderLayer(nn.Module):
    """Attention, then an MLP or a mixture of experts, each around a residual."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.checkpointed = False
        self.attention_norm = RmsNorm(config.width, config.norm_eps)
        self.attention = Attention(config, index)
        self.mlp_norm = RmsNorm(config.width, config.norm_eps)
        sparse = config.moe is not None and index in config.moe.sparse_layers
        self.mlp = Moe(config.width, config.moe) if config.moe and sparse else Mlp(config.width, config.dense_hidden)

    def forward(self, hidden_ND: Tensor, cos_Nr: Tensor, sin_Nr: Tensor, attend: Attend) -> Tensor:
        if not self.checkpointed or not torch.is_grad_enabled():
            return self._compute(hidden_ND, cos_Nr, sin_Nr, attend)
        kept = checkpoint(
            self._compute,
            hidden_ND,
            cos_Nr,
            sin_Nr,
            attend,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=self._contexts,
        )
        assert isinstance(kept, Tensor)
        return kept

    def _compute(self, hidden_ND: Tensor, cos_Nr: Tensor, sin_Nr: Tensor, attend: Attend) -> Tensor:
        x_ND = self.attention_norm.forward(hidden_ND)
        mixed_ND = self.attention.forward(x_ND, cos_Nr, sin_Nr, attend)
        hidden_ND, x_ND = ops.add_rms_norm(mixed_ND, hidden_ND, self.mlp_norm.weight, self.mlp_norm.eps)
        return hidden_ND + self.mlp.forward(x_ND)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._uncounted()

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """The second computation of a token must not be counted again."""
        if not isinstance(self.mlp, Moe):
            yield
            return
        counts_E, self.mlp.expert_counts_E = self.mlp.expert_counts_E, None
        try:
            yield
        finally:
            self.mlp.expert_counts_E = counts_E


def _initial_value(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("_bias"):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
