"""Who may use a gateway, for what, and how much: a TOML file of tenants with their tokens and quotas."""

import hashlib
import hmac
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MIN_TOKEN_CHARACTERS = 16


class Scope(StrEnum):
    """What a token is good for."""

    CREATE = "create"
    """Asking for sandboxes."""
    USE = "use"
    """Everything that is about a sandbox of the tenant's, its end included."""
    OBSERVE = "observe"
    """The list of the tenant's sandboxes, and the gateway's numbers."""
    ADMIN = "admin"
    """All of that, the list of everybody's sandboxes, and draining nodes."""


class Quota(BaseModel):
    """What a tenant may have at once; infinity by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_sandboxes: float = Field(default=float("inf"), gt=0)
    max_memory_mb: float = Field(default=float("inf"), gt=0)
    max_cpus: float = Field(default=float("inf"), gt=0)
    max_clients: float = Field(default=float("inf"), gt=0)
    creates_per_second: float = Field(default=float("inf"), gt=0)
    creates_at_once: int = Field(default=100, ge=1)
    """So many may come in a burst before `creates_per_second` holds."""


class Token(BaseModel):
    """A secret that a client shows: as the SHA-256 of it in hex, or where to find it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    environment: str | None = None
    """A variable that has the token."""
    file: Path | None = None
    """A file that has the token and nothing else."""
    scopes: frozenset[Scope] = frozenset({Scope.CREATE, Scope.USE, Scope.OBSERVE})

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if sum(one is not None for one in (self.sha256, self.environment, self.file)) != 1:
            raise ValueError("give a token by one of sha256, environment, file")
        return self

    def digest(self) -> bytes:
        """The SHA-256 of the token."""
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        if self.file is not None:
            token, where = self.file.read_text().strip(), str(self.file)
        else:
            assert self.environment is not None
            token, where = os.environ.get(self.environment, ""), f"${self.environment}"
        if len(token) < MIN_TOKEN_CHARACTERS:
            raise ValueError(f"{where} has no token of {MIN_TOKEN_CHARACTERS} characters or more")
        return digest_of(token)


class Tenant(Quota):
    """One who pays: its tokens and its quota. Its sandboxes are nobody else's."""

    tokens: tuple[Token, ...] = Field(min_length=1)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tenants: dict[str, Tenant] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token opens."""

    owner: str
    scopes: frozenset[Scope]

    def allows(self, scope: Scope) -> bool:
        """Whether it is good for that."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


class Tenants:
    """Those who may use a gateway. grants: by the SHA-256 of their tokens. quotas: by owner."""

    def __init__(self, grants: Mapping[bytes, Grant], quotas: Mapping[str, Quota]) -> None:
        self.quotas = dict(quotas)
        self._grants = dict(grants)

    def grant(self, token: str) -> Grant | None:
        """What a token opens; every token that we know is compared, in a time that tells nothing."""
        shown = digest_of(token)
        found = None
        for digest, grant in self._grants.items():
            if hmac.compare_digest(digest, shown):
                found = grant
        return found

    def quota(self, owner: str) -> Quota:
        """What an owner may have."""
        return self.quotas.get(owner, UNLIMITED)


UNLIMITED = Quota()


def read_tenants(path: Path) -> Tenants:
    """The tenants of a file; `ValueError` that says which entry is wrong."""
    try:
        known = _File.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ValueError(f"{path}: {_told(error)}") from error
    grants: dict[bytes, Grant] = {}
    for owner, tenant in known.tenants.items():
        for number, token in enumerate(tenant.tokens, 1):
            try:
                digest = token.digest()
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: token {number} of {owner}: {error}") from error
            if digest in grants:
                raise ValueError(f"{path}: token {number} of {owner} is there twice; each opens one thing")
            grants[digest] = Grant(owner, token.scopes)
    return Tenants(grants, known.tenants)


def digest_of(token: str) -> bytes:
    """The SHA-256 of a token."""
    return hashlib.sha256(token.encode()).digest()


def _told(error: tomllib.TOMLDecodeError | ValidationError) -> str:
    """Without the values, which may be secrets that were put in the wrong place."""
    if isinstance(error, tomllib.TOMLDecodeError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False))
