"""Conversations to training samples for SFT: reading, rendering, and which of them each optimizer step trains."""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.seeds import derive_seed
from hone.trainer.samples import Integers, Samples

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """Training data that cannot be read; the message names the place."""


class RenderedSequence(Protocol):
    """Tokens and which of them train."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def loss_mask(self) -> list[int]: ...


class Conversation(NamedTuple):
    """One conversation to train on; `place` names where it was read, for messages."""

    place: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]


Render = Callable[[Conversation], Iterable[RenderedSequence]]


@dataclass(frozen=True, slots=True)
class Conversations:
    """All training sequences, rendered, as flat arrays, and how many were left out."""

    token_ids_N: Integers
    trains_N: npt.NDArray[np.bool_]
    lengths_S: Integers
    num_too_long: int
    num_without_answer: int

    def samples(self, chosen: Integers) -> Samples:
        """Some of the sequences as the samples of a step."""
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths_S)])
        places_N = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in chosen])
        zeros_N, zeros_S = np.zeros(len(places_N), np.float32), np.zeros(len(chosen), np.float32)
        return Samples(
            lengths_S=self.lengths_S[chosen],
            versions_S=np.zeros(len(chosen), np.int64),
            temperatures_S=zeros_S + 1,
            rewards_S=zeros_S,
            token_ids_N=self.token_ids_N[places_N],
            trains_N=self.trains_N[places_N],
            sampler_logprobs_N=zeros_N,
            advantages_N=zeros_N,
        )

    @property
    def fingerprint(self) -> str:
        """Equal for equal data: a position in it means the same."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.lengths_S, self.token_ids_N, self.trains_N):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def read_conversations(source: str | Path, limit: int | None = None) -> Iterator[Conversation]:
    """The conversations of a JSONL or parquet file, or of a data set on the Hugging Face hub, at most `limit`.

    A row has `messages` in the shape of the OpenAI API and may have `tools`; other columns are ignored.
    """
    for place, row in itertools.islice(_rows(str(source)), limit):
        yield conversation_from(row, place)


def conversation_from(row: Any, place: str) -> Conversation:
    """One row as a conversation; `DataError` says what is wrong with it, and where."""
    if not isinstance(row, dict) or "messages" not in row:
        raise DataError(f"{place}: no `messages`; a row needs a list of messages under that name")
    messages = _decoded(row["messages"], "messages", place)
    tools = _decoded(row.get("tools"), "tools", place)
    if not messages:
        raise DataError(f"{place}: `messages` is empty")
    return Conversation(
        place,
        tuple(_message(message, f"{place}: message {index}") for index, message in enumerate(messages)),
        tuple(_tool(tool, f"{place}: tool {index}") for index, tool in enumerate(tools)),
    )


def render_conversations(conversations: Iterable[Conversation], render: Render, max_length: int) -> Conversations:
    """Render all conversations; sequences that are too long or train no token are left out and counted."""
    ids: list[npt.NDArray[np.int32]] = []
    masks: list[npt.NDArray[np.bool_]] = []
    num_too_long = num_without_answer = 0
    for conversation in conversations:
        for rendered in _rendered(conversation, render):
            if len(rendered.token_ids) > max_length:
                num_too_long += 1
            elif not any(rendered.loss_mask[1:]):
                num_without_answer += 1
            else:
                ids.append(np.array(rendered.token_ids, np.int32))
                masks.append(np.array([0, *rendered.loss_mask[1:]], np.bool_))
    if not ids:
        raise DataError(
            f"nothing to train on: {num_too_long} sequences are longer than sft.max_length = {max_length} tokens,"
            f" {num_without_answer} hold no assistant message"
        )
    lengths_S = np.array([len(one) for one in ids], np.int64)
    return Conversations(
        np.concatenate(ids).astype(np.int64), np.concatenate(masks), lengths_S, num_too_long, num_without_answer
    )


def plan_steps(lengths_S: Integers, batch_tokens: int, epochs: float, seed: int) -> list[Integers]:
    """Which sequences each optimizer step trains: shuffled epochs behind one another, cut into steps.

    A step holds at most `batch_tokens`, or one longer sequence. The plan is a function of its arguments, so a number
    of steps is a position in the data, at any number of ranks.
    """
    steps: list[Integers] = []
    current: list[int] = []
    load = 0
    for index in _order(len(lengths_S), epochs, seed):
        length = int(lengths_S[index])
        if current and load + length > batch_tokens:
            steps.append(np.array(current))
            current, load = [], 0
        current.append(index)
        load += length
    return [*steps, np.array(current)] if current else steps


def _order(num_sequences: int, epochs: float, seed: int) -> Iterator[int]:
    remaining = max(1, round(num_sequences * epochs))
    epoch = 0
    while remaining > 0:
        generator = np.random.default_rng(derive_seed(seed, "sft shuffle", epoch))
        yield from generator.permutation(num_sequences)[:remaining].tolist()
        remaining -= num_sequences
        epoch += 1


def _rendered(conversation: Conversation, render: Render) -> Iterable[RenderedSequence]:
    try:
        return render(conversation)
    except ValueError as error:
        raise DataError(f"{conversation.place}: {error}") from error


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    if source.endswith(".jsonl"):
        return _jsonl_rows(Path(source).expanduser())
    if source.endswith(".parquet"):
        return _parquet_rows(Path(source).expanduser())
    return _hub_rows(source)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _json(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # a heavy import that only parquet files need
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            wanted = [name for name in ("messages", "tools") if name in file.schema_arrow.names]
            rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield f"{path}, row {number}", _without_nulls(row)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets  # an optional extra
    except ImportError as error:
        raise DataError(
            f"sft.data = {name!r} ends neither in .jsonl nor in .parquet, so it names a Hugging Face data set;"
            " to read one: pip install 'hone[datasets]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot load the Hugging Face data set {name!r}: {error}") from error
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Columnar formats give every message the fields of all messages, null where it has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error}") from error


def _decoded(value: Any, name: str, place: str) -> Sequence[Any]:
    """A list, or its JSON text, as some data sets keep it."""
    decoded = _json(value, f"{place}: `{name}`") if isinstance(value, str) else value
    if decoded is None:
        return ()
    if not isinstance(decoded, list):
        raise DataError(f"{place}: `{name}` is {type(decoded).__name__}, not a list")
    return decoded


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise DataError(f"{place}: needs a role that is one of {', '.join(ROLES)}")
    reasoning = value.get("reasoning_content", value.get("reasoning"))
    calls = _decoded(value.get("tool_calls"), "tool_calls", place)
    return Message(
        role=value["role"],
        content=_text(value.get("content"), place),
        reasoning=None if reasoning is None else _text(reasoning, place),
        tool_calls=tuple(_tool_call(call, index, place) for index, call in enumerate(calls)),
        tool_call_id=value.get("tool_call_id"),
        name=value.get("name"),
    )


def _text(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{place}: content is {type(content).__name__}; it must be text or a list of text parts")
    return content


def _tool_call(value: Any, index: int, place: str) -> ToolCall:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: tool call {index} has no function name")
    arguments = function.get("arguments", "{}")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id=str(value.get("id") or f"call_{index}"), name=function["name"], arguments=text)


def _tool(value: Any, place: str) -> ToolSpec:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: has no function name")
    return ToolSpec(
        name=function["name"],
        description=str(function.get("description") or ""),
        parameters=function.get("parameters") or {"type": "object", "properties": {}},
    )
