"""A published set of weights: the policy version and where it lies."""

import msgspec


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights after `version` optimizer steps, complete in `folder` (Hugging Face layout)."""

    version: int
    folder: str
