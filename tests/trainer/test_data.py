"""Reading conversations, rendering them, and the plan of an SFT run."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from hone.trainer.data import (
    Conversation,
    DataError,
    plan_steps,
    read_conversations,
    render_conversations,
)

GREETING = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
CALLING = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "1+1"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "easy",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}},
                {"function": {"name": "add", "arguments": '{"x": 2}'}},
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "a"},
    ],
    "tools": [TOOL],
}


@dataclass
class Sequence:
    token_ids: list[int]
    loss_mask: list[int]


def letters(conversation: Conversation) -> Iterable[Sequence]:
    """One token per letter; the assistant's train."""
    ids = [ord(letter) for message in conversation.messages for letter in message.content]
    mask = [int(message.role == "assistant") for message in conversation.messages for _ in message.content]
    return [Sequence(ids, mask)]


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_jsonl_rows_become_conversations(tmp_path: Path) -> None:
    first, second = read_conversations(write_jsonl(tmp_path / "a.jsonl", GREETING, "", CALLING))
    assert [message.content for message in first.messages] == ["hi", "hello"]
    user, assistant, tool = second.messages
    assert user.content == "1+1"
    assert assistant.reasoning == "easy"
    assert [(call.id, call.name, call.arguments) for call in assistant.tool_calls] == [
        ("a", "add", '{"x": 1}'),
        ("call_1", "add", '{"x": 2}'),
    ]
    assert tool.tool_call_id == "a"
    assert second.tools[0].name == "add"


def test_parquet_rows_read_like_jsonl_rows(tmp_path: Path) -> None:
    rows = [GREETING | {"tools": None}, {"messages": CALLING["messages"][2:], "tools": json.dumps([TOOL])}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    from_parquet = list(read_conversations(tmp_path / "a.parquet"))
    from_jsonl = list(read_conversations(write_jsonl(tmp_path / "a.jsonl", *rows)))
    assert [c[1:] for c in from_parquet] == [c[1:] for c in from_jsonl]


def test_a_limit_stops_reading(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GREETING, GREETING, "not read")
    assert len(list(read_conversations(path, limit=2))) == 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: no `messages`"),
        ({"prompt": "x"}, "line 2: no `messages`"),
        ({"messages": []}, "line 2: `messages` is empty"),
        ({"messages": "{"}, "line 2: `messages`: not valid JSON"),
        ({"messages": {"role": "user"}}, "line 2: `messages` is dict, not a list"),
        ({"messages": [{"role": "robot"}]}, "line 2: message 0: needs a role"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2: message 0: content is int"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool call 0 has no function name"),
        (GREETING | {"tools": [{"type": "function"}]}, "line 2: tool 0: has no function name"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(tmp_path: Path, line: Any, complaint: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GREETING, line)
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert complaint in str(caught.value)
    assert "a.jsonl" in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*missing"):
        list(read_conversations(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match=r"cannot read .*missing"):
        list(read_conversations(tmp_path / "missing.parquet"))
    (tmp_path / "text.parquet").write_text("hello there")
    with pytest.raises(DataError, match="not a parquet file"):
        list(read_conversations(tmp_path / "text.parquet"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_conversations(tmp_path / "binary.jsonl"))


def conversation(question: str, answer: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages + ([] if answer is None else [{"role": "assistant", "content": answer}])}


def test_sequences_too_long_or_without_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [conversation("ab", "c"), conversation("abcdef", "g"), conversation("ab", None), conversation("a", "bcd")]
    source = read_conversations(write_jsonl(tmp_path / "a.jsonl", *rows))
    data = render_conversations(source, letters, max_length=5)
    assert (data.num_too_long, data.num_without_answer) == (1, 1)
    assert data.lengths_S.tolist() == [3, 4]
    assert data.token_ids_N.tolist() == [ord(letter) for letter in "abcabcd"]
    assert data.trains_N.tolist() == [False, False, True, False, True, True, True]


def test_data_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
    source = read_conversations(write_jsonl(tmp_path / "a.jsonl", conversation("ab", None), GREETING))
    with pytest.raises(DataError, match=r"1 sequences are longer than sft.max_length = 3"):
        render_conversations(source, letters, max_length=3)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    def refuse(conversation: Conversation) -> Iterable[Sequence]:
        raise ValueError("roles must alternate")

    source = read_conversations(write_jsonl(tmp_path / "a.jsonl", GREETING))
    with pytest.raises(DataError, match="line 1: roles must alternate"):
        render_conversations(source, refuse, max_length=10)


def test_samples_of_a_step_are_the_chosen_sequences(tmp_path: Path) -> None:
    rows = [conversation("ab", "c"), conversation("d", "ef"), conversation("ghi", "j")]
    data = render_conversations(read_conversations(write_jsonl(tmp_path / "a.jsonl", *rows)), letters, 10)
    samples = data.samples(np.array([2, 0]))
    assert "".join(map(chr, samples.token_ids_N)) == "ghijabc"
    assert samples.trains_N.tolist() == [False, False, False, True, False, False, True]
    assert samples.denominators().num_tokens == 2


def test_equal_data_has_equal_fingerprints(tmp_path: Path) -> None:
    def fingerprint(*rows: dict[str, Any]) -> str:
        path = write_jsonl(tmp_path / "a.jsonl", *rows)
        return render_conversations(read_conversations(path), letters, 10).fingerprint

    assert fingerprint(GREETING) == fingerprint(GREETING)
    assert fingerprint(GREETING) != fingerprint(GREETING, GREETING)
    assert fingerprint(GREETING) != fingerprint(conversation("ih", "hello"))


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=50).map(np.array)


@given(lengths, st.integers(0, 5))
def test_an_epoch_trains_every_sequence_once_within_the_budget(lengths_S: np.ndarray, seed: int) -> None:
    steps = plan_steps(lengths_S, 40, 1.0, seed)
    assert sorted(np.concatenate(steps)) == list(range(len(lengths_S)))
    assert all(lengths_S[step].sum() <= 40 for step in steps)


@given(lengths, st.integers(1, 3))
def test_epochs_follow_one_another_without_a_gap(lengths_S: np.ndarray, epochs: int) -> None:
    order = np.concatenate(plan_steps(lengths_S, 40, epochs, seed=1))
    parts = order.reshape(epochs, len(lengths_S))
    assert all(sorted(part) == list(range(len(lengths_S))) for part in parts)


def test_epochs_are_shuffled_differently_and_reproducibly() -> None:
    lengths_S = np.full(100, 10)
    order = np.concatenate(plan_steps(lengths_S, 40, 2.0, seed=1))
    assert order[:100].tolist() != order[100:].tolist()
    assert order.tolist() == np.concatenate(plan_steps(lengths_S, 40, 2.0, seed=1)).tolist()
    assert order.tolist() != np.concatenate(plan_steps(lengths_S, 40, 2.0, seed=2)).tolist()


def test_half_an_epoch_is_half_of_the_sequences() -> None:
    assert len(np.concatenate(plan_steps(np.full(100, 10), 40, 0.5, seed=1))) == 50


def test_a_sequence_longer_than_a_step_gets_a_step_of_its_own() -> None:
    assert sorted(map(len, plan_steps(np.array([90, 10, 10]), 40, 1.0, seed=0))) in ([1, 1, 1], [1, 2])
