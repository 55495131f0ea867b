"""The wire: every type survives it, and whatever the receiver does not expect is refused in words."""

from types import UnionType
from typing import Any, get_args, get_origin

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.schema import batches, messages, policies, remote, rollouts, sampling, sandbox_calls, sandboxes, tasks, traces
from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.rollouts import Heartbeat, RolloutRequest, RolloutResult, Shutdown
from hone.schema.sampling import FinishReason, Generate, Generated, SamplingParameters, Turn, VersionRun
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec, Usage
from hone.schema.tasks import Task
from hone.schema.traces import AgentRecord, Failure, FailureClass, Node, Reward, StopReason, Timing, Trace
from hone.schema.wire import PROTOCOL, Envelope, Wire, WireError, decode, encode

MODULES = [batches, messages, policies, remote, rollouts, sampling, sandbox_calls, sandboxes, tasks, traces]
STRUCTS = sorted(
    {
        value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct)
    },
    key=lambda struct: struct.__name__,
)

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5)
words = st.text(max_size=12)
calls = st.builds(ToolCall, id=words, name=words, arguments=words)
conversations = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=words,
    reasoning=st.none() | words,
    tool_calls=st.lists(calls, max_size=2).map(tuple),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
problems = st.builds(
    Task,
    prompt=st.lists(conversations, max_size=3).map(tuple),
    reference=st.none() | words,
    info=st.dictionaries(words, values, max_size=3),
)
turns = st.builds(
    Turn,
    message=conversations,
    finish_reason=st.sampled_from(FinishReason),
    context_token_ids=tokens,
    token_ids=tokens,
    logprobs=st.lists(numbers, max_size=5),
    versions=st.lists(st.builds(VersionRun, st.integers(0, 99), st.integers(1, 99)), max_size=3),
    seconds=numbers,
)
recorded = st.builds(
    Trace,
    environment=words,
    task=problems,
    attempt=st.integers(0, 99),
    nodes=st.lists(st.builds(Node, message=conversations, turn=st.none() | turns, agent=words), max_size=3),
    rewards=st.dictionaries(words, st.builds(Reward, numbers, numbers), max_size=3),
    stop_reason=st.none() | st.sampled_from(StopReason),
    failure=st.none() | st.builds(Failure, st.sampled_from(FailureClass), words, words),
    timing=st.builds(Timing, started_at=numbers, total_seconds=numbers),
    info=st.dictionaries(words, values, max_size=2),
    agents=st.dictionaries(
        words, st.builds(AgentRecord, st.booleans(), st.dictionaries(words, st.builds(Reward, numbers))), max_size=2
    ),
)


def resolved(struct: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    """Values of any struct of the schema, from its annotations; those with rules of their own are spelled out."""
    special: dict[type, st.SearchStrategy[msgspec.Struct]] = {
        Trace: recorded,
        AgentRecord: st.builds(AgentRecord, st.booleans(), st.dictionaries(words, st.builds(Reward, numbers))),
        Failure: st.builds(Failure, st.sampled_from(FailureClass), words, words),
        Task: problems,
        Turn: turns,
        Message: conversations,
        SamplingParameters: st.builds(SamplingParameters, temperature=st.floats(0, 2), seed=st.none() | st.just(7)),
        ToolSpec: st.builds(ToolSpec, words, words, st.dictionaries(words, values, max_size=2)),
        Node: st.builds(Node, message=conversations, turn=st.none() | turns),
        RolloutRequest: st.builds(
            RolloutRequest,
            group=words,
            environment=words,
            task=problems,
            attempts=st.lists(st.integers(0, 9)),
            sampling=st.just(SamplingParameters(max_tokens=3)),
            seed=st.integers(0, 2**63 - 1),
        ),
        RolloutResult: st.builds(RolloutResult, group=words, attempt=st.integers(0, 9), trace=recorded),
        Generate: st.builds(
            Generate, request_id=words, prompt_token_ids=tokens, sampling=st.just(SamplingParameters(stop=("x",)))
        ),
        SandboxSpec: st.builds(SandboxSpec, image=words, cpus=st.floats(0.1, 64), env=st.dictionaries(words, words)),
        ExecResult: st.builds(
            ExecResult,
            outcome=st.sampled_from(Outcome),
            exit_code=st.integers(-64, 255),
            stdout=words,
            stderr=words,
            usage=st.builds(Usage, numbers, numbers, st.integers(0, 2**40)),
        ),
    }
    if struct in special:
        return special[struct]
    return st.builds(struct, **{field.name: of_type(field.type) for field in msgspec.structs.fields(struct)})


def of_type(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type that a field of the schema has."""
    simple: dict[object, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**64 - 1),
        float: numbers,
        str: words,
        bool: st.booleans(),
        bytes: st.binary(max_size=16),
        type(None): st.none(),
        Any: values,
        FailureClass: st.sampled_from(FailureClass),
        FinishReason: st.sampled_from(FinishReason),
        list[int]: tokens,
        VersionRun: st.builds(VersionRun, st.integers(0, 9), st.integers(1, 9)),
        msgspec.Raw: st.just(msgspec.Raw(b"\xc0")),
    }
    if kind in simple:
        return simple[kind]
    inner = get_args(kind)
    if isinstance(kind, UnionType):
        return st.one_of(*map(of_type, inner))
    if get_origin(kind) is tuple:
        return st.lists(of_type(inner[0]), max_size=3).map(tuple)
    if get_origin(kind) is list:
        return st.lists(of_type(inner[0]), max_size=3)
    if get_origin(kind) is tuple:
        return st.lists(of_type(inner[0]), max_size=3).map(tuple)
    if get_origin(kind) is dict:
        return st.dictionaries(of_type(inner[0]), of_type(inner[1]), max_size=2)
    assert issubclass(kind, msgspec.Struct), kind
    return resolved(kind)


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_struct_survives_the_wire(struct: type[msgspec.Struct]) -> None:
    wire = Wire(struct)

    @given(resolved(struct))
    def round_trip(message: msgspec.Struct) -> None:
        assert wire.decode(wire.encode(message)) == message
        assert decode(encode(message), struct) == message

    round_trip()


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_struct_is_frozen_and_refuses_unknown_fields(struct: type[msgspec.Struct]) -> None:
    assert struct.__struct_config__.frozen
    assert struct.__struct_config__.forbid_unknown_fields


def test_an_unknown_field_is_refused() -> None:
    body = msgspec.msgpack.encode({"reason": "done", "colour": "red"})
    with pytest.raises(WireError, match="colour"):
        Wire(Shutdown).decode(msgspec.msgpack.encode(Envelope(PROTOCOL, "Shutdown", msgspec.Raw(body))))


def test_another_protocol_version_is_refused_with_advice() -> None:
    body = msgspec.Raw(msgspec.msgpack.encode(Shutdown("done")))
    with pytest.raises(WireError, match=r"protocol 2.*same version of hone"):
        Wire(Shutdown).decode(msgspec.msgpack.encode(Envelope(PROTOCOL + 1, "Shutdown", body)))


def test_a_type_of_another_channel_is_refused_on_both_sides() -> None:
    with pytest.raises(WireError, match="Heartbeat does not belong on this channel, which carries Shutdown"):
        Wire(Shutdown).encode(Heartbeat("worker-0", 1, 0.0))
    with pytest.raises(WireError, match="'Heartbeat' on a channel that carries Shutdown"):
        Wire(Shutdown).decode(Wire(Heartbeat).encode(Heartbeat("worker-0", 1, 0.0)))


def test_a_wrong_type_in_a_field_is_refused() -> None:
    body = msgspec.Raw(msgspec.msgpack.encode({"worker": "w", "num_running": "three", "max_stall_seconds": 0.0}))
    with pytest.raises(WireError, match="num_running"):
        Wire(Heartbeat).decode(msgspec.msgpack.encode(Envelope(PROTOCOL, "Heartbeat", body)))


def test_a_message_that_breaks_a_rule_of_its_type_is_refused() -> None:
    body = msgspec.Raw(msgspec.msgpack.encode({"temperature": -1.0}))
    with pytest.raises(WireError, match=r"temperature -1\.0 is negative"):
        Wire(SamplingParameters).decode(msgspec.msgpack.encode(Envelope(PROTOCOL, "SamplingParameters", body)))


@given(st.binary(max_size=64))
def test_garbage_is_a_wire_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(WireError):
        Wire(Shutdown).decode(data)
    with pytest.raises(WireError):
        decode(data, Shutdown)


@given(st.integers(0, 200))
def test_a_message_cut_short_is_refused(length: int) -> None:
    wire = Wire(Generated)
    message = wire.encode(Generated("r", [1, 2, 3], [0.0, 0.0, 0.0], [VersionRun(0, 3)], FinishReason.STOP))
    with pytest.raises(WireError):
        wire.decode(message[: length % len(message)])


def test_a_token_of_a_training_batch_costs_at_most_fourteen_bytes() -> None:
    count = 10_000
    batch = batches.TrainingBatch(
        step=1,
        num_groups=8,
        lengths=bytes(4 * 64),
        versions=bytes(4 * 64),
        temperatures=bytes(4 * 64),
        rewards=bytes(4 * 64),
        token_ids=bytes(4 * count),
        loss_mask=bytes(count),
        logprobs=bytes(4 * count),
        advantages=bytes(4 * count),
    )
    assert batch.num_samples == 64
    assert batch.num_tokens == count
    assert len(encode(batch)) / count < 14
