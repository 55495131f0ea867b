"""What the proxy needs of a wire format: requests read into calls, turns and errors written as the client expects."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

import msgspec

from hone.schema.messages import Message, ToolSpec
from hone.schema.sampling import Turn

Json = dict[str, Any]
Body = TypeVar("Body")


@dataclass(frozen=True, slots=True)
class Call:
    """One request of an agent program.

    options: what else the request says about the form of the answer. not_enforced: fields that ask for what a policy
    is not held to.
    """

    model: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    stop: tuple[str, ...] = ()
    stream: bool = False
    options: frozenset[str] = frozenset()
    not_enforced: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A turn as the answer to a call. identity: unique; created: Unix time."""

    call: Call
    turn: Turn
    identity: str
    created: int

    @property
    def message(self) -> Message:
        return self.turn.message


class Trouble(Enum):
    """Why a call is not answered by a turn; the value is the HTTP status. None of it gets better by a retry."""

    BAD_REQUEST = 400
    UNKNOWN_KEY = 401
    ENDED = 403
    """A budget of the rollout is used up, or the rollout is over."""
    NOT_FOUND = 404
    FAILED = 500
    """The policy gave no turn, so the rollout has failed."""


class Refusal(Exception):
    """A call that is answered by an error."""

    def __init__(self, trouble: Trouble, message: str) -> None:
        super().__init__(message)
        self.trouble = trouble


class Dialect(Protocol):
    """One wire format."""

    def read(self, body: bytes) -> Call:
        """The call in a request; `Refusal` of a bad request."""
        ...

    def write(self, answer: Answer) -> Json:
        """The body of an answer that is not streamed."""
        ...

    def events(self, answer: Answer) -> Iterator[bytes]:
        """The server-sent events of an answer that is streamed."""
        ...

    def error(self, refusal: Refusal) -> Json:
        """The body of an error."""
        ...

    def error_event(self, refusal: Refusal) -> bytes:
        """An error in a stream that has begun."""
        ...

    @property
    def keep_alive(self) -> bytes:
        """An event that says nothing."""
        ...


def decoded(body: bytes, kind: type[Body]) -> Body:
    """A request's body; unknown fields are left out, because client libraries add new ones all the time."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:  # a ValidationError says where
        raise Refusal(Trouble.BAD_REQUEST, f"the request cannot be read: {error}") from error


def check_continues(messages: tuple[Message, ...]) -> None:
    """The policy speaks next: after at least one message, and not after its own."""
    if not messages:
        raise Refusal(Trouble.BAD_REQUEST, "the request has no messages")
    if messages[-1].role == "assistant":
        raise Refusal(
            Trouble.BAD_REQUEST, "the last message is the assistant's; a beginning of its answer cannot be given here"
        )
