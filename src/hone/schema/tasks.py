"""A task: one problem with its prompt and reference; immutable, identified by the hash of its content."""

import functools
import hashlib
from typing import Any

import msgspec

from hone.schema.messages import Message


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, dict=True):
    """One problem of an environment.

    prompt: the conversation the policy continues.
    reference: what a verifier compares with; None where the reward needs none.
    info: whatever else the environment wants to remember; JSON-like values only.
    """

    prompt: tuple[Message, ...]
    reference: str | None = None
    info: dict[str, Any] = {}

    @functools.cached_property
    def key(self) -> str:
        """16 hexadecimal digits of the content's hash: equal content, equal key, in every process."""
        content = msgspec.json.encode(self, order="deterministic")
        return hashlib.blake2b(content, digest_size=8).hexdigest()
