"""Identity of tasks and derived seeds: the same in every process, on every machine, in every version."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.schema.messages import Message, ToolCall
from hone.schema.sampling import SamplingParameters
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task
from hone.schema.wire import decode, encode

TASK = Task(
    prompt=(Message("system", "Be brief."), Message("user", "Reverse: abc ü")),
    reference="cba",
    info={"difficulty": 3, "letters": ["a", "b"], "nested": {"y": 1.5, "x": None}},
)
KEY = "b7e045edf5fcb6a7"


def test_the_key_of_a_task_does_not_drift() -> None:
    # Ledgers and seeds of old runs refer to this value: a change of it is a change of the format.
    assert TASK.key == KEY


def test_the_key_does_not_depend_on_the_order_of_a_table() -> None:
    turned = Task(
        prompt=TASK.prompt,
        reference="cba",
        info={"nested": {"x": None, "y": 1.5}, "letters": ["a", "b"], "difficulty": 3},
    )
    assert turned.key == TASK.key


def test_the_key_survives_the_wire() -> None:
    assert decode(encode(TASK), Task).key == TASK.key


def test_the_key_is_the_same_in_another_process() -> None:
    code = (
        "import sys; from hone.schema import tasks, wire; print(wire.decode(sys.stdin.buffer.read(), tasks.Task).key)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    out = subprocess.run(
        [sys.executable, "-c", code], input=encode(TASK), capture_output=True, env=environment, check=True
    )
    assert out.stdout.decode().strip() == TASK.key


@pytest.mark.parametrize(
    "other",
    [
        Task(prompt=TASK.prompt, reference="cbb", info=TASK.info),
        Task(prompt=TASK.prompt, reference="cba"),
        Task(prompt=TASK.prompt[:1], reference="cba", info=TASK.info),
        Task(prompt=(Message("user", "Be brief."), TASK.prompt[1]), reference="cba", info=TASK.info),
        Task(prompt=TASK.prompt, reference="cba", info=TASK.info | {"difficulty": 4}),
    ],
)
def test_other_content_has_another_key(other: Task) -> None:
    assert other.key != TASK.key


def test_tool_calls_count_for_the_key() -> None:
    said = Message("assistant", "")
    called = Message("assistant", "", tool_calls=(ToolCall("1", "search", "{}"),))
    assert Task(prompt=(said,)).key != Task(prompt=(called,)).key


def test_seeds_do_not_drift() -> None:
    assert derive_seed(0, "sampling", TASK.key, 0, 0) == 132059982725366039
    assert derive_seed(7, "order") == 469433263865891925


def test_a_seed_tells_a_number_from_its_digits_and_borders_between_parts() -> None:
    assert derive_seed(0, "order", 1) != derive_seed(0, "order", "1")
    assert derive_seed(0, "order", "a", "b") != derive_seed(0, "order", "ab")
    assert derive_seed(0, "order", "a") != derive_seed(0, "shuffle", "a")
    assert derive_seed(0, "order", "a") != derive_seed(1, "order", "a")


@given(st.integers(0, 2**31), st.text(), st.lists(st.text() | st.integers()))
def test_a_seed_fits_a_signed_64_bit_integer(run_seed: int, purpose: str, identity: list[str | int]) -> None:
    seed = derive_seed(run_seed, purpose, *identity)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(run_seed, purpose, *identity)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"temperature": -0.1}, "temperature -0.1 is negative; use 0 for greedy"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0 is not in"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_k": -1}, "top_k -1 is negative"),
        ({"min_p": 2.0}, "min_p 2.0"),
        ({"max_tokens": 0}, "max_tokens 0 is not positive"),
        ({"top_logprobs": 21}, "top_logprobs 21"),
    ],
)
def test_sampling_parameters_without_a_meaning_are_refused(arguments: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SamplingParameters(**arguments)
