"""Weight broadcasts through the file system: one folder per policy version, complete or not there.

Names and tensors only; what a model is, the two ends know.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hone.schema.policies import Policy

FILE = "model.safetensors"
CONFIG = "config.json"
KEEP = 4

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
}


def publish(
    tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any], folder: Path, version: int, keep: int = KEEP
) -> Policy:
    """Write policy `version` to `folder`/v000123 in the Hugging Face layout, and drop all but the newest `keep`.

    The version appears whole, by a rename. There is no fsync: after a power cut the trainer publishes again from its
    checkpoint.
    """
    target = folder / f"v{version:06d}"
    unfinished = target.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / CONFIG).write_text(json.dumps(config, indent=2))
    _write_safetensors(unfinished / FILE, tensors)
    # A trainer that resumed from a checkpoint publishes versions again that it had published before it died.
    if target.exists():
        target.rename(folder / f"replaced_{version:06d}.tmp")
    unfinished.rename(target)
    _prune(folder, keep, spared=version)
    return Policy(version, str(target))


def _versions(folder: Path) -> list[int]:
    found = (path.name[1:] for path in folder.glob("v*"))
    return sorted(int(name) for name in found if name.isdigit())


def _prune(folder: Path, keep: int, spared: int) -> None:
    # A reader that has the file open keeps it; one that comes too late asks for a newer version. After a resume the
    # version just published may be older than those from before the crash.
    for version in _versions(folder)[:-keep]:
        if version != spared:
            shutil.rmtree(folder / f"v{version:06d}")
    for leftover in folder.glob("replaced_*.tmp"):
        shutil.rmtree(leftover)


def _write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """8 bytes of header length, a JSON header with offsets, the data, without a copy of what lies on the CPU."""
    assert sys.byteorder == "little", "safetensors are little-endian, and so must be the machine"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, tensor in tensors:
        part = tensor.detach().cpu().contiguous()
        end = offset + part.nbytes
        header[name] = {"dtype": _DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [offset, end]}
        parts.append(part)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            file.write(part.reshape(-1).view(torch.uint8).numpy().data)
