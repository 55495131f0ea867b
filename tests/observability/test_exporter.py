"""Metrics and health over HTTP, from the event loop that they are about."""

import asyncio
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from hone.observability import exporter as module
from hone.observability.exporter import Exporter
from hone.observability.histogram import SECONDS, Histogram


class Numbers(Collector):
    def __init__(self):
        self.histogram = Histogram((0.1, 1.0))

    def collect(self):
        yield CounterMetricFamily("hone_test_calls", "Calls", 7)
        family = HistogramMetricFamily("hone_test_seconds", "Durations", labels=["call"])
        family.add_metric(["exec"], self.histogram.buckets(), self.histogram.total)
        yield family


async def ask(port, request=b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        async with asyncio.timeout(10):
            answer = await reader.read()
    except ConnectionResetError:
        answer = b""
    writer.close()
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head, body


@given(st.lists(st.floats(0, 1000)))
def test_a_histogram_counts_what_is_not_above_each_bound(values):
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    ordered = sorted(values)
    expected = [sum(value <= bound for value in ordered) for bound in SECONDS]
    assert [count for _, count in histogram.buckets()] == [*expected, len(values)]
    assert histogram.count == len(values)
    assert histogram.total == pytest.approx(sum(values))
    assert bisect_left(SECONDS, 0.0005) == 0  # a bound belongs below itself


async def test_what_is_served_is_what_prometheus_reads():
    numbers = Numbers()
    numbers.histogram.observe(0.5)
    async with Exporter([numbers], 0) as exporter:
        head, body = await ask(exporter.port)
    assert head.startswith("HTTP/1.1 200 OK")
    found = {
        sample.name + str(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    assert found["hone_test_calls_total[]"] == 7
    assert found["hone_test_seconds_bucket[('call', 'exec'), ('le', '0.1')]"] == 0
    assert found["hone_test_seconds_bucket[('call', 'exec'), ('le', '1.0')]"] == 1
    assert found["hone_test_seconds_count[('call', 'exec')]"] == 1
    assert found["process_resident_memory_bytes[]"] > 0


async def test_health_says_what_the_trouble_is():
    problem = ""
    async with Exporter([], 0, trouble=lambda: problem) as exporter:
        assert (await ask(exporter.port, b"GET /health HTTP/1.0\r\n\r\n"))[0].startswith("HTTP/1.1 200")
        problem = "it stops"
        head, body = await ask(exporter.port, b"GET /health HTTP/1.0\r\n\r\n")
        assert head.startswith("HTTP/1.1 503")
        assert body == "it stops\n"


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"GET /metrics?x=1 HTTP/1.1\r\n\r\n", "200"),
        (b"\xff\xfe\r\n\r\n", "405"),
    ],
)
async def test_other_questions_have_answers(request_text, status):
    async with Exporter([], 0) as exporter:
        assert (await ask(exporter.port, request_text))[0].split()[1] == status


async def test_head_has_no_body():
    async with Exporter([Numbers()], 0) as exporter:
        head, body = await ask(exporter.port, b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert "Content-Length" in head
    assert body == ""


async def test_whoever_sends_too_much_or_nothing_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.1)
    async with Exporter([], 0) as exporter:
        assert await ask(exporter.port, b"x" * (1 << 20)) == ("", "")
        assert await ask(exporter.port, b"GET /metrics") == ("", "")
        assert (await ask(exporter.port))[0].startswith("HTTP/1.1 200")


async def test_a_port_that_is_taken_is_the_callers_to_mend():
    async with Exporter([], 0) as exporter:
        with pytest.raises(ValueError, match="choose another port"):
            async with Exporter([], exporter.port):
                pass
