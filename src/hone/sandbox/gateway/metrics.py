"""A gateway's numbers as Prometheus has them. Tenants are labels: there are as many as the tenants' file has."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hone.sandbox.gateway.gateway import Gateway
from hone.sandbox.gateway.ledger import Totals
from hone.sandbox.gateway.tenants import Quota

PREFIX = "hone_gateway_"
GAUGES = {
    "nodes": "Nodes that are there",
    "nodes_absent": "Nodes that are named and not there",
    "nodes_draining": "Nodes that take no new sandboxes",
    "clients": "Connections of clients",
    "calls": "Calls under way",
}
COUNTERS = {
    "nodes_lost": "Nodes that were there and went",
    "creates_refused": "Sandboxes that no node took, or no quota had room for",
}
OF_TENANTS: dict[str, tuple[str, Callable[[Totals], float], Callable[[Quota], float]]] = {
    "sandboxes": ("Sandboxes", lambda has: has.num_sandboxes, lambda may: may.max_sandboxes),
    "memory_mb": ("Memory that sandboxes were promised", lambda has: has.memory_mb, lambda may: may.max_memory_mb),
    "cpus": ("Cores that sandboxes were promised", lambda has: has.cpus, lambda may: may.max_cpus),
}


class GatewayCollector(Collector):
    """The state of a gateway at the moment of a scrape, which has to be in the gateway's event loop."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        found = self._gateway.counts()
        for name, help_text in GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, help_text, found[f"gateway/{name}"])
        for name, help_text in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, help_text, found[f"gateway/{name}"])
        for name, (help_text, has, may) in OF_TENANTS.items():
            used = GaugeMetricFamily(f"{PREFIX}tenant_{name}", f"{help_text}, by tenant", labels=["tenant"])
            limit = GaugeMetricFamily(
                f"{PREFIX}tenant_max_{name}", f"{help_text}: the tenant's quota", labels=["tenant"]
            )
            for tenant, quota in sorted(self._gateway.tenants.quotas.items()):
                used.add_metric([tenant], has(self._gateway.ledger.totals(tenant)))
                limit.add_metric([tenant], may(quota))
            yield used
            yield limit
