"""Weights in the layout the products want, kept for as long as the weight lives and is not written to."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from hone.model.native.library import functions


@dataclass(frozen=True, slots=True)
class _Pack:
    owner: weakref.ref[Tensor]
    version: int
    pointer: int
    packed: Tensor
    packed_pointer: int


_packs: dict[int, _Pack] = {}


def pack_pointer(weight: Tensor) -> int:
    """Where the packed copy of a frozen weight [..., columns, depth] lies; 0 for one that must be packed anew.

    A weight that requires grad is never kept: FSDP2 refills parameters without raising their version. Neither is an
    inference tensor, which has no version. Writing through `weight.data` does not raise it either: after that,
    call `forget_packs`.
    """
    if weight.requires_grad:
        return 0
    pack = _packs.get(id(weight))
    if pack is None or pack.pointer != weight.data_ptr() or pack.version != weight._version:
        return _remember(weight)
    return pack.packed_pointer


def forget_packs() -> None:
    """Pack every weight anew at its next use."""
    _packs.clear()


def _remember(weight: Tensor) -> int:
    if weight.is_inference() or not weight.is_contiguous():
        return 0
    key, version, pointer = id(weight), weight._version, weight.data_ptr()
    owner = weakref.ref(weight, lambda _: _packs.pop(key, None))
    packed = _pack(weight.detach())
    _packs[key] = _Pack(owner, version, pointer, packed, packed.data_ptr())
    return packed.data_ptr()


def _pack(weight: Tensor) -> Tensor:
    *_, columns, depth = weight.shape
    weight = weight.reshape(-1, columns, depth)
    packed = torch.empty(len(weight), functions().hone_packed_size(columns, depth))
    for matrix, to in zip(weight, packed, strict=True):
        functions().hone_pack(matrix.data_ptr(), columns, depth, to.data_ptr())
    return packed
