"""Sharding over ranks with FSDP2, and whole state dictionaries back."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hone.model.tensors import whole
from hone.model.transformer import Transformer


def shard(model: Transformer, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> Transformer:
    """Shard every layer and the rest over the mesh, in place.

    With `compute_dtype` (bfloat16) products run in it, while the parameters that the optimizer sees, and the
    reduction of gradients, keep the dtype of the model.
    """
    # Casting inputs would round the tables of positions; the hidden states follow the embedding's dtype anyway.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32 if compute_dtype else None,
        cast_forward_inputs=False,
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The root's parameters stay gathered after the forward pass, so that `unembed` can use them.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def full_state(model: Transformer) -> dict[str, Tensor]:
    """The whole state on every rank: a collective call on a sharded model.

    A tensor that is not sharded is the model's own, not a copy.
    """
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}
