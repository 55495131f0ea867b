"""Randomness is derived, not drawn: every seed is a function of the run's seed, a purpose and an identity."""

import hashlib


def derive_seed(run_seed: int, purpose: str, *identity: str | int) -> int:
    """A seed in [0, 2**63) that depends on all arguments and on nothing else.

    The same arguments give the same seed in every process and on every machine, so that a resumed run makes the
    choices that the interrupted one would have made.
    """
    text = "\x1f".join([str(run_seed), purpose, *(f"{type(part).__name__}:{part}" for part in identity)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
