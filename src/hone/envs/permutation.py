"""A keyed permutation of range(count): any position at once, without a table."""

import hashlib
from collections.abc import Sequence


def permuted(position: int, count: int, seed: int) -> int:
    """Where `position` lands in the permutation of range(count) that `seed` selects.

    A Feistel network over the smallest even number of bits that holds `count`, walked until it lands inside the range.
    """
    half = max(1, (count - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    keys = _round_keys(seed)
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            left, right = right, left ^ (_scramble(right ^ key) & mask)
        position = left << half | right
        if position < count:
            return position


def _round_keys(seed: int) -> Sequence[int]:
    digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=32).digest()
    return [int.from_bytes(digest[start : start + 8], "little") for start in range(0, 32, 8)]


def _scramble(value: int) -> int:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
