"""Segments of traces: what was appended is there, a torn tail is not."""

import pytest

from hone.schema.messages import Message
from hone.schema.rollouts import RolloutResult
from hone.schema.tasks import Task
from hone.schema.traces import Trace
from hone.schema.wire import Wire
from hone.transport.traces import Location, TraceWriter, read_frame, read_traces

WIRE = Wire(RolloutResult)


def result(number):
    return RolloutResult("g", number, Trace("e", Task(prompt=(Message("user", "x" * number),)), number, group="g"))


def records(*numbers):
    return [WIRE.encode(result(number)) for number in numbers]


def attempts(folder, *start):
    return [found.attempt for _, found in read_traces(folder, *start)]


def test_results_come_back_in_order(tmp_path):
    with TraceWriter(tmp_path) as writer:
        writer.append(records(0, 1))
        writer.append(records(2))
    assert [found for _, found in read_traces(tmp_path)] == [result(0), result(1), result(2)]


def test_a_frame_is_found_by_its_location(tmp_path):
    with TraceWriter(tmp_path) as writer:
        writer.append(records(0))
        location = writer.append(records(1, 2))
        writer.append(records(3))
    assert read_frame(tmp_path, location) == [result(1), result(2)]
    assert [found for where, found in read_traces(tmp_path) if where == location] == [result(1), result(2)]


def test_reading_can_start_at_a_location(tmp_path):
    with TraceWriter(tmp_path) as writer:
        writer.append(records(0))
        middle = writer.end
        writer.append(records(1))
    assert attempts(tmp_path, middle) == [1]


def test_a_full_segment_is_followed_by_another(tmp_path):
    with TraceWriter(tmp_path, segment_bytes=1) as writer:
        locations = [writer.append(records(number)) for number in range(3)]
    assert [location.segment for location in locations] == [0, 1, 2]
    assert attempts(tmp_path) == [0, 1, 2]
    assert attempts(tmp_path, locations[1]) == [1, 2]


def test_every_torn_tail_is_cut_off_and_writing_goes_on(tmp_path):
    with TraceWriter(tmp_path) as writer:
        writer.append(records(0))
        whole = writer.end.offset
        writer.append(records(1))
    path = tmp_path / "segment-000000.mpk.zz"
    data = path.read_bytes()
    for length in range(whole, len(data)):
        path.write_bytes(data[:length])
        assert attempts(tmp_path) == [0]
        with TraceWriter(tmp_path) as writer:
            assert writer.end == Location(0, whole)
            writer.append(records(2))
        assert attempts(tmp_path) == [0, 2]


@pytest.mark.parametrize("tail", [b"\0" * 64, b"\xff" * 64])
def test_garbage_after_the_last_frame_is_cut_off(tmp_path, tail):
    with TraceWriter(tmp_path) as writer:
        writer.append(records(0))
    with (tmp_path / "segment-000000.mpk.zz").open("ab") as file:
        file.write(tail)
    assert attempts(tmp_path) == [0]
    with TraceWriter(tmp_path) as writer:
        writer.append(records(1))
    assert attempts(tmp_path) == [0, 1]


def test_there_is_nothing_at_a_place_without_a_frame(tmp_path):
    with TraceWriter(tmp_path) as writer:
        writer.append(records(0))
        assert read_frame(tmp_path, writer.end) == []
    assert read_frame(tmp_path, Location(9, 0)) == []
    assert list(read_traces(tmp_path / "nowhere")) == []
