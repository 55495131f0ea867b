"""What a node tells of its work: usage and accounts of sandboxes, metrics, spans."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hone.observability.spans import Spans, read_spans
from hone.sandbox.cells.host import look
from hone.sandbox.client import Sandbox
from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.node import accounts
from hone.sandbox.node.accounts import Accounts, EndedSandbox
from hone.sandbox.node.lifecycle import End, Limits
from hone.sandbox.node.metrics import NodeCollector
from hone.sandbox.node.node import Node
from hone.sandbox.node.tallies import IMAGES, image_class
from hone.sandbox.wire.remote import RemoteNode
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandboxes import SandboxSpec, SandboxUsage

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64, rollout="group-1/0")
BUSY = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done"


@pytest.fixture
async def node(cells, tmp_path):
    spans = Spans(tmp_path / "spans.jsonl", "node-n")
    async with Node("n", folder=tmp_path / "node", limits=Limits(max_warm=4), spans=spans) as node:
        yield node
    spans.close()


@pytest.fixture(params=["embedded", "tcp"])
async def box(request, node):
    if request.param == "embedded":
        async with Sandbox(spec=SMALL, node=node) as box:
            yield box
        return
    async with (
        NodeServer(node, "tcp://127.0.0.1:0", tokens={"secret": "me", "other": "you"}) as server,
        Sandbox(spec=SMALL, node=server.address, token="secret") as box,
    ):
        yield box


def metrics_of(node):
    """Values by name and sorted labels."""
    registry = CollectorRegistry()
    registry.register(NodeCollector(node))
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def lines_of(folder):
    return [json.loads(line) for line in (folder / "node" / "sandboxes.jsonl").read_text().splitlines()]


async def test_a_sandbox_says_what_it_uses_and_used(box):
    await box.exec(["sh", "-c", f"{BUSY}; head -c 3000000 /dev/zero > a; head -c 5000 /dev/zero"])
    process = await box.spawn(["sh", "-c", "sleep 60 & echo words; wait"])
    assert await process.read() == b"words\n"
    now = await box.usage()
    assert now.cpu_seconds > 0.01
    assert 3_000_000 <= now.disk_bytes < 4_000_000
    assert now.output_bytes == 5006
    assert now.num_calls == 2
    if look().cgroups.v1 or look().cgroups.unified_controllers:
        assert now.memory_bytes >= now.disk_bytes  # files count
        assert now.peak_memory_bytes >= now.memory_bytes
        assert now.num_processes == 2
    await process.close()
    await box.close()
    used = await box.usage()
    assert used.cpu_seconds >= now.cpu_seconds
    assert (used.disk_bytes, used.output_bytes, used.num_calls) == (now.disk_bytes, 5006, 2)


async def test_the_next_cell_in_the_same_cgroups_does_not_inherit_what_was_used(node):
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.exec(["sh", "-c", f"{BUSY}; head -c 9000000 /dev/zero > a"])
    used = await box.usage()
    assert used.cpu_seconds > 0.01
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.exec(["true"])
        usage = await box.usage()
    assert usage.cpu_seconds < used.cpu_seconds
    assert (usage.peak_memory_bytes or 0) < 9_000_000


async def test_each_sandbox_leaves_a_line_in_the_accounts(node, tmp_path):
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.exec(["sh", "-c", BUSY])
    closed = (await box.usage(), box.sandbox_id)
    await node.create(SandboxSpec(image="dir:/nowhere"), owner="you").over
    over = node.create(SandboxSpec(ttl_seconds=0.05, memory_mb=64), owner="me")
    await over.over
    async with asyncio.timeout(10):
        while len(lines_of(tmp_path)) < 3:
            await asyncio.sleep(0.01)
    first, second, third = lines_of(tmp_path)
    assert (first["sandbox_id"], first["end"], first["reason"]) == (closed[1], "closed", "it is closed")
    assert first["rollout"] == "group-1/0"
    assert first["usage"]["cpu_seconds"] == closed[0].cpu_seconds
    assert 0 < first["ready_seconds"] <= first["ended"] - first["asked"]
    assert (second["owner"], second["end"], second.get("ready_seconds")) == ("you", "not_ready", None)
    assert (third["owner"], third["end"], third["sandbox_id"]) == ("me", "lease_over", over.sandbox_id)


async def test_the_usage_of_a_sandbox_that_ended_is_told_to_its_owner(node):
    async with NodeServer(node, "tcp://127.0.0.1:0", tokens={"secret": "me", "other": "you"}) as server:
        mine, yours = RemoteNode(server.address, "secret"), RemoteNode(server.address, "other")
        await mine.connected()
        await yours.connected()
        sandbox = await mine.create(SandboxSpec(ttl_seconds=0.2, memory_mb=64), key="k")
        await sandbox.exec(["true"])
        await node.sandbox(sandbox.sandbox_id).over
        assert (await sandbox.usage()).num_calls == 1
        theirs = type(sandbox)(yours, sandbox.sandbox_id)
        with pytest.raises(SandboxError, match="no such sandbox"):
            await theirs.usage()
        await mine.close()
        await yours.close()


def test_full_accounts_are_put_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(accounts, "MAX_BYTES", 1000)
    monkeypatch.setattr(accounts, "MAX_REMEMBERED", 2)
    kept = Accounts(tmp_path)
    for number in range(9):
        kept.add(EndedSandbox(f"n.1.{number}", "", "", "python", 1.0, 2.0, 0.5, End.CLOSED, "", SandboxUsage()))
    assert [kept.find(f"n.1.{number}") is not None for number in (6, 7, 8)] == [False, True, True]
    kept.close()
    numbers = [
        json.loads(line)["sandbox_id"].rpartition(".")[2]
        for name in ("sandboxes.jsonl.1", "sandboxes.jsonl")
        for line in (tmp_path / name).read_text().splitlines()
    ]
    assert numbers == sorted(numbers)
    assert numbers[-1] == "8"
    assert all((tmp_path / name).stat().st_size < 1500 for name in ("sandboxes.jsonl.1", "sandboxes.jsonl"))


async def test_a_full_disk_loses_lines_and_no_calls(cells, tmp_path):
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "sandboxes.jsonl").symlink_to("/dev/full")
    spans = Spans(Path("/dev/full"), "node-n")
    async with Node("n", folder=tmp_path / "node", spans=spans) as node:
        async with Sandbox(spec=SMALL, node=node) as box:
            assert (await box.exec(["echo", "fine"])).stdout == "fine\n"
        async with asyncio.timeout(10):
            while (lost := metrics_of(node)["hone_sandbox_unwritten_lines_total",]) < 4:
                await asyncio.sleep(0.01)
        assert lost == 4  # spans of creation, call and whole life; an account
        async with Sandbox(spec=SMALL, node=node) as box:
            await box.exec(["true"])
    spans.close()


async def test_metrics_count_what_was_done(node):
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.exec(["true"])
        await box.exec(["sleep", "60"], timeout_seconds=0.05)
        await box.exec(["sh", "-c", "kill -9 $$"])
        await box.snippet("print(1)")
        await box.python("1")
        await box.write("a", b"12345")
        await box.read("a")
        found = metrics_of(node)
        assert found["hone_sandbox_leases", "ready"] == 1
        assert found["hone_sandbox_cells", "ready"] == 1
        assert found["hone_sandbox_zygotes",] == 1
    with pytest.raises(SandboxError):
        await node.create(SandboxSpec(image="dir:/nowhere")).ready()
    found = metrics_of(node)
    assert found["hone_sandbox_created_total", "cold", "host"] == 1
    assert found["hone_sandbox_not_created_total", "policy_denied"] == 1
    assert found["hone_sandbox_outcomes_total", "exited"] == 2
    assert found["hone_sandbox_outcomes_total", "timeout"] == 1
    assert found["hone_sandbox_outcomes_total", "signalled"] == 1
    assert found["hone_sandbox_call_seconds_count", "exec"] == 3
    assert found["hone_sandbox_call_seconds_count", "files"] == 2
    assert found["hone_sandbox_file_bytes_total", "read"] == found["hone_sandbox_file_bytes_total", "written"] == 5
    assert found["hone_sandbox_ended_total", "closed"] == 1
    assert found["hone_sandbox_ready_seconds_count", "cold"] == 1
    assert found["hone_sandbox_cpu_seconds_total",] > 0
    assert found["hone_sandbox_leases", "ready"] == 0


async def test_a_sandbox_that_begins_anew_was_created_once_and_keeps_its_account(node):
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.exec(["sh", "-c", f"{BUSY}; echo words"])
        snapshot = await box.snapshot()
        before = await box.usage()
        await box.reset(snapshot)
        await box.exec(["echo", "words"])
        after = await box.usage()
        assert (after.num_calls, after.output_bytes) == (4, 12)
        assert after.cpu_seconds >= before.cpu_seconds
        assert node.num_unmatched == 0
    assert metrics_of(node)["hone_sandbox_created_total", "cold", "host"] == 1
    assert metrics_of(node)["hone_sandbox_ready_seconds_count", "cold"] == 1


async def test_a_warm_cell_is_counted_as_warm(node):
    await node.keep_warm(SMALL, 1)
    async with asyncio.timeout(10):
        while not node.statistics()["sandbox/warm"]:
            await asyncio.sleep(0.005)
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.ready()
    assert metrics_of(node)["hone_sandbox_created_total", "host", "warm"] == 1


async def test_cells_match_leases_at_every_moment_of_a_storm(node):
    seen = []

    async def use(number):
        async with Sandbox(memory_mb=64, disk_mb=16, ttl_seconds=5, node=node) as box:
            if number % 3:
                await box.exec(["true"])

    async def watch():
        while True:
            seen.append(node.num_unmatched)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(use(number) for number in range(40)))
    watching.cancel()
    assert len(seen) > 40
    assert set(seen) == {0}


async def test_a_cell_that_nothing_accounts_for_is_seen(node):
    cell = await node._cells.create(SMALL)
    assert node.num_unmatched == 1
    await cell.destroy()
    assert node.num_unmatched == 0


async def test_names_of_sandboxes_owners_and_images_are_no_labels(node):
    for number in range(3):
        with pytest.raises(SandboxError):
            await node.create(SandboxSpec(image=f"dir:/nowhere-{number}"), owner=f"owner-{number}").ready()
    text = repr(sorted(map(repr, metrics_of(node))))
    assert "owner" not in text
    assert "nowhere" not in text
    assert "n." + node.prefix.split(".")[1] not in text


async def test_the_page_of_metrics_lists_all_of_them(node):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    listed = {
        name
        for row in re.findall(r"^\|(.*?)\|", page, re.MULTILINE)
        for name in re.findall(r"`(hone_sandbox_\w+)`", row)
    }
    suffixes = {"counter": "_total"}
    assert listed == {metric.name + suffixes.get(metric.type, "") for metric in NodeCollector(node).collect()}


def test_images_are_of_a_few_classes():
    names = ("python", "host", "dir:/a", "tar:/a", "oci:/a:b", "build:/a.toml", "debian:12", "localhost:5000/a:b", "x")
    assert {image_class(name) for name in names} == set(IMAGES)


async def test_spans_tell_where_the_time_of_a_rollout_went(node, tmp_path):
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.exec(["true"])
        await box.write("a", b"1")
        await box.python("1")
    async with asyncio.timeout(10):
        while len(spans := list(read_spans(tmp_path / "spans.jsonl"))) < 5:
            await asyncio.sleep(0.01)
    assert [span["name"] for span in spans] == ["create", "exec", "files", "python", "sandbox"]
    assert {span["rollout"] for span in spans} == {"group-1/0"}
    assert {span["sandbox"] for span in spans} == {box.sandbox_id}
    whole = spans[-1]
    for span in spans[:-1]:
        assert whole["start"] - 0.01 <= span["start"] <= whole["start"] + whole["seconds"]
    assert (spans[0]["image"], spans[0]["cell"], whole["end"]) == ("host", "cold", "closed")


async def test_a_node_that_drains_takes_none_and_waits_for_those_there(node):
    box = Sandbox(spec=SMALL, node=node, key="mine")
    await box.open()
    draining = asyncio.create_task(node.until_empty(60))
    await asyncio.sleep(0)
    with pytest.raises(Busy, match="no new sandboxes"):
        node.create(SMALL)
    assert node.create(SMALL, key="mine").sandbox_id == box.sandbox_id  # asked again, it is the same
    assert (await box.exec(["echo", "still"])).stdout == "still\n"
    assert not draining.done()
    await box.close()
    async with asyncio.timeout(10):
        await draining
    assert node.statistics()["sandbox/draining"] == 1


async def test_draining_does_not_wait_longer_than_it_may(node):
    async with Sandbox(spec=SMALL, node=node) as box:
        await box.ready()
        async with asyncio.timeout(10):
            await node.until_empty(0.05)
        assert node.is_draining
