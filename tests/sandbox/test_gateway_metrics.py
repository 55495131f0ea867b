"""What a gateway tells of itself, and what passes through it of usage."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hone.sandbox.client import Sandbox
from hone.sandbox.gateway.discovery import Fixed
from hone.sandbox.gateway.gateway import Gateway
from hone.sandbox.gateway.metrics import GatewayCollector
from hone.sandbox.gateway.tenants import Grant, Quota, Scope, Tenants, digest_of
from hone.sandbox.node.node import Node
from hone.sandbox.wire.addresses import parse_address
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandboxes import SandboxSpec

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)
SCOPES = frozenset({Scope.CREATE, Scope.USE, Scope.OBSERVE})
TENANTS = Tenants(
    {digest_of("mine"): Grant("me", SCOPES)}, {"me": Quota(max_sandboxes=5, max_memory_mb=1000), "you": Quota()}
)


@pytest.fixture
async def gateway(cells):
    async with (
        Node("n1") as node,
        NodeServer(node, "tcp://127.0.0.1:0", tokens={"of the gateway": "gateway"}, gateways={"gateway"}) as server,
        Gateway(
            [Fixed(parse_address(server.address)), Fixed(parse_address("tcp://127.0.0.1:1"))],
            "tcp://127.0.0.1:0",
            tenants=TENANTS,
            token="of the gateway",
        ) as gateway,
    ):
        yield gateway


def metrics_of(gateway):
    registry = CollectorRegistry()
    registry.register(GatewayCollector(gateway))
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


async def test_a_gateway_counts_nodes_clients_and_what_tenants_have(gateway):
    async with Sandbox(spec=SMALL, node=gateway.address, token="mine") as box:
        await box.exec(["true"])
        found = metrics_of(gateway)
        assert found["hone_gateway_nodes",] == found["hone_gateway_nodes_absent",] == 1
        assert found["hone_gateway_clients",] == 1
        assert found["hone_gateway_tenant_sandboxes", "me"] == 1
        assert found["hone_gateway_tenant_memory_mb", "me"] == 128
        assert found["hone_gateway_tenant_max_sandboxes", "me"] == 5
        assert found["hone_gateway_tenant_max_sandboxes", "you"] == float("inf")
        assert found["hone_gateway_tenant_sandboxes", "you"] == 0
    assert metrics_of(gateway)["hone_gateway_tenant_sandboxes", "me"] == 0


async def test_usage_passes_through_a_gateway(gateway):
    async with Sandbox(spec=SMALL, node=gateway.address, token="mine") as box:
        await box.exec(["sh", "-c", "head -c 100000 /dev/zero > a; echo words"])
        now = await box.usage()
    assert (now.num_calls, now.output_bytes) == (1, 6)
    assert 100_000 <= now.disk_bytes < 200_000
    assert (await box.usage()).cpu_seconds >= now.cpu_seconds


async def test_the_page_of_metrics_lists_all_of_them(gateway):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    listed = {
        name
        for row in re.findall(r"^\|(.*?)\|", page, re.MULTILINE)
        for name in re.findall(r"`(hone_gateway_\w+)`", row)
    }
    suffixes = {"counter": "_total"}
    assert listed == {metric.name + suffixes.get(metric.type, "") for metric in GatewayCollector(gateway).collect()}
