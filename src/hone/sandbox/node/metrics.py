"""A node's numbers as Prometheus has them. Labels have a few fixed values: no sandbox and no owner is one."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hone.observability.histogram import Histogram
from hone.sandbox.node.lifecycle import Stage
from hone.sandbox.node.node import Node

PREFIX = "hone_sandbox_"
K = TypeVar("K", bound=str)


class NodeCollector(Collector):
    """The state of a node at the moment of a scrape, which has to be in the node's event loop."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        yield from self._state()
        yield from self._work()

    def _state(self) -> Iterator[Metric]:
        found = self._node.statistics()
        stages = {stage.value: found[f"sandbox/{stage}"] for stage in Stage}
        yield _gauge("leases", "Sandboxes that somebody holds, by stage", stages, "stage")
        cells = {state: found[f"sandbox/{state}"] for state in ("warm", "ending")} | {"ready": found["sandbox/ready"]}
        yield _gauge("cells", "Cells that exist, by state", cells, "state")
        for name, help_text in (
            ("unmatched", "Leases without a cell and cells that nothing accounts for; not 0 for long is a leak"),
            ("max_sandboxes", "Cells that this node takes on at once"),
            ("zygotes", "Warm interpreters of Python that cells are forked from"),
            ("draining", "1 while no sandboxes are taken"),
            ("memory_bytes", "Memory that all cells use, their files included; 0 where no cgroup counts"),
            ("network_connections", "Connections of sandboxes to their proxies"),
            ("lost_before_start", "Sandboxes that were lost with the node before"),
            ("swept_at_start", "Cells of dead nodes that were removed at the start"),
        ):
            yield GaugeMetricFamily(PREFIX + name, help_text, found[f"sandbox/{name}"])

    def _work(self) -> Iterator[Metric]:
        node, tallies = self._node, self._node.records.tallies
        created = CounterMetricFamily(f"{PREFIX}created", "Sandboxes that became ready", labels=["image", "cell"])
        for labels, count in sorted(tallies.created.items()):
            created.add_metric(labels, count)
        yield created
        yield _counter("not_created", "Sandboxes that will not be ready", tallies.not_created, "outcome")
        yield _counter("ended", "Sandboxes of which nothing is left, by what ended them", tallies.ended, "end")
        yield _counter("outcomes", "How programs and calls of sandboxes ended", tallies.outcomes, "outcome")
        yield _histogram("ready_seconds", "From asking to ready", tallies.ready_seconds, "cell")
        yield _histogram("call_seconds", "Duration of calls of sandboxes", tallies.call_seconds, "call")
        log = node.gate.log
        yield _counter("network_requests", "Requests of sandboxes to their proxies", log.counts, "verdict")
        network = {"up": log.bytes_up, "down": log.bytes_down}
        yield _counter("network_bytes", "Bytes that proxies carried", network, "direction")
        files = {"read": tallies.read_bytes, "written": tallies.written_bytes}
        yield _counter("file_bytes", "Bytes of files that clients read and wrote", files, "direction")
        for name, help_text, value in (
            ("refused", "Sandboxes that were not taken on, as too many waited", node.statistics()["sandbox/refused"]),
            ("cells_made", "Cells that were made, for sandboxes and for pools", tallies.cells_made),
            ("cells_failed", "Cells that could not be made", tallies.cells_failed),
            ("unwritten_lines", "Lines of accounts and spans that the disk did not take", tallies.unwritten_lines),
            ("output_bytes", "Bytes that programs wrote to streams", node.output_bytes),
            ("cpu_seconds", "Seconds of processors that cells used", node.cpu_seconds),
        ):
            yield CounterMetricFamily(PREFIX + name, help_text, value)


def _gauge(name: str, help_text: str, values: Mapping[str, float], label: str) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, help_text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _counter(name: str, help_text: str, values: Mapping[K, float], label: str) -> Metric:
    family = CounterMetricFamily(PREFIX + name, help_text, labels=[label])
    for value, number in sorted(values.items()):
        family.add_metric([str(value)], number)
    return family


def _histogram(name: str, help_text: str, values: Mapping[str, Histogram], label: str) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, help_text, labels=[label])
    for value, histogram in values.items():
        family.add_metric([value], buckets=histogram.buckets(), sum_value=histogram.total)
    return family
