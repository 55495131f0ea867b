"""A choice of a completion, from tokens to text: end tokens and stop strings cut off, pieces only when they are certain."""

from collections.abc import Iterable, Sequence

from hone.inference.engine.request import TopLogprobs
from hone.text.tokenizer import IncrementalDecoder, Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class ChoiceText:
    """The text of one completion as its tokens arrive."""

    def __init__(
        self, tokenizer: Tokenizer, end_ids: Iterable[int], stops: Sequence[str], *, skip_special: bool
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
        self._end_ids = frozenset(end_ids)
        self._stops = stops
        self._held = ""
        self._stopped = False

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that became certain: a possible beginning of a stop string is held back."""
        return self._cut(self._decoder.feed(i for i in token_ids if i not in self._end_ids))

    def finish(self) -> str:
        """The rest."""
        text = self._cut(self._decoder.finish())
        return text if self._stopped else text + self._held

    def _cut(self, text: str) -> str:
        if self._stopped:
            return ""
        text = self._held + text
        ends = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if ends:
            self._stopped = True
            return text[: min(ends)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[float], top: Sequence[TopLogprobs]
) -> dict[str, object]:
    """The `logprobs` of a chat choice."""
    alternatives = top or [[]] * len(token_ids)
    content = [
        _entry(tokenizer, token_id, logprob) | {"top_logprobs": [_entry(tokenizer, i, value) for i, value in others]}
        for token_id, logprob, others in zip(token_ids, logprobs, alternatives, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    top: Sequence[TopLogprobs],
    offset: int = 0,
) -> dict[str, object]:
    """The `logprobs` of a text choice; `offset` is the length of the text before it."""
    tokens = [tokenizer.decode([token_id]) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [finite(logprob) for logprob in logprobs],
        "top_logprobs": [{tokenizer.decode([i]): finite(value) for i, value in others} for others in top] or None,
        "text_offset": offsets,
    }


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, object]:
    token = tokenizer.decode([token_id])
    spelled = tokenizer.token_bytes(token_id) if tokenizer.is_byte_level else token.encode()
    return {"token": token, "logprob": finite(logprob), "bytes": list(spelled)}


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
