"""Which weights a model folder holds, told in a moment whatever their size."""

import hashlib
from pathlib import Path

PATTERNS = ("*.json", "*.jinja", "*.safetensors")
WHOLE_BYTES = 16 * 2**20
"""A file up to this size is read whole; of a larger one, its beginning, its end and blocks between them."""
BLOCK_BYTES = 64 * 2**10
NUM_BLOCKS = 64


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits of the model's files. An optimizer step changes every block of the weights, so some suffice."""
    content = hashlib.blake2b(digest_size=8)
    for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern)):
        size = path.stat().st_size
        content.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for offset in _offsets(size):
                file.seek(offset)
                content.update(file.read(WHOLE_BYTES if size <= WHOLE_BYTES else BLOCK_BYTES))
    return content.hexdigest()


def _offsets(size: int) -> list[int]:
    if size <= WHOLE_BYTES:
        return [0]
    return [(size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1) for block in range(NUM_BLOCKS)]
