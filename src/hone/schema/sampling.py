"""What is asked of an engine for one turn, and what it answers."""

from enum import StrEnum

import msgspec

from hone.schema.messages import Message


class FinishReason(StrEnum):
    """Why an engine stopped a completion."""

    STOP = "stop"
    """An end token or a stop string."""
    LENGTH = "length"
    """The token budget or the context is used up."""
    CANCELLED = "cancelled"
    """Nobody waits for it any more."""


class SamplingParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the next tokens are drawn.

    temperature: 0 is greedy. top_p, top_k, min_p: 1, 0 and 0 are off. max_tokens: None means up to the engine's context.
    seed: None draws one from the request's identity. stop, stop_token_ids: what ends a completion besides the end token.
    ignore_eos: go on behind that. logit_bias: added to the logits before the temperature. top_logprobs: how many other
    tokens to tell at each place, at most 20.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        checks: list[tuple[bool, str]] = [
            (self.temperature >= 0, f"temperature {self.temperature} is negative; use 0 for greedy"),
            (0 < self.top_p <= 1, f"top_p {self.top_p} is not in (0, 1]; use 1 to switch it off"),
            (self.top_k >= 0, f"top_k {self.top_k} is negative; use 0 to switch it off"),
            (0 <= self.min_p <= 1, f"min_p {self.min_p} is not in [0, 1]; use 0 to switch it off"),
            (self.max_tokens is None or self.max_tokens > 0, f"max_tokens {self.max_tokens} is not positive"),
            (0 <= self.top_logprobs <= 20, f"top_logprobs {self.top_logprobs} is not in 0..20"),
        ]
        for holds, complaint in checks:
            if not holds:
                raise ValueError(complaint)


class VersionRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`count` consecutive tokens sampled by policy version `version`."""

    version: int
    count: int


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One completion of the policy, with the tokens that the model saw and wrote.

    context_token_ids: tokens the model saw since the previous turn of the branch (the whole prompt in the first turn).
    token_ids: the sampled tokens, end token included. logprobs: one per sampled token, of the distribution that was
    sampled from (after temperature). versions: the policy version of each, as run lengths that add up to
    len(token_ids). num_prompt_tokens, num_completion_tokens, num_cached_tokens: as the endpoint counts them. seconds: from
    the request to its answer.

    Token ids, logprobs and versions are empty when the endpoint does not tell tokens.
    """

    message: Message
    finish_reason: FinishReason
    context_token_ids: list[int] = []
    token_ids: list[int] = []
    logprobs: list[float] = []
    versions: list[VersionRun] = []
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    seconds: float = 0.0


class Generate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Ask an engine for one completion of a token sequence."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParameters


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nobody waits for this request any more."""

    request_id: str


class Generated(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An engine's answer to one `Generate`."""

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    versions: list[VersionRun]
    finish_reason: FinishReason
    num_cached_tokens: int = 0


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine's refusal of one `Generate`; `retry` tells whether the same request may succeed later."""

    request_id: str
    reason: str
    retry: bool


class GenerateMany(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests that left one client in the same moment, sent as one message."""

    requests: list[Generate]
    cancels: list[Cancel] = []


class Answers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine finished for one client in one step, sent as one message."""

    generated: list[Generated]
    refused: list[Refused] = []
