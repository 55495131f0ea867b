"""The end of `hone sandbox serve`, and what it shows of itself: the real process, signals and HTTP."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from hone.sandbox.cells.host import look
from hone.sandbox.client import Busy, Sandbox, SandboxError
from hone.schema.sandboxes import Outcome

pytestmark = pytest.mark.skipif(not look().has_user_namespaces, reason="no user namespaces")
SERVE = [sys.executable, "-m", "hone.cli.main", "sandbox", "serve"]


@contextlib.contextmanager
def serving(tmp_path, *options):
    """The process, its address, and the address of its metrics."""
    address = f"unix:{tmp_path}/socket"
    command = [*SERVE, "--listen", address, "--folder", str(tmp_path / "node"), "--metrics-port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127.0.0.1:\d+/metrics", line)
        assert found is not None, (line, process.poll() is not None and process.stderr.read())
        yield process, address, found[0]
    finally:
        process.kill()
        process.communicate(timeout=20)


def fetch(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def health(url):
    """The status, 0 when nobody is there any more."""
    try:
        return fetch(url.replace("/metrics", "/health"))[0]
    except OSError:
        return 0


async def test_sigterm_drains_and_a_client_ends_in_peace(tmp_path):
    with serving(tmp_path, "--drain-seconds", "60", "--spans", str(tmp_path / "spans.jsonl")) as (
        process,
        address,
        url,
    ):
        assert await asyncio.to_thread(health, url) == 200
        async with Sandbox(node=address, memory_mb=64, disk_mb=16) as box:
            await box.python("x = 1")
            os.killpg(process.pid, signal.SIGTERM)  # as whoever ends a whole service does
            async with asyncio.timeout(20):
                while await asyncio.to_thread(health, url) != 503:
                    await asyncio.sleep(0.02)
            with pytest.raises(Busy):
                await Sandbox(node=address).open()
            assert (await box.exec(["echo", "still here"])).stdout == "still here\n"
            assert (await box.python("x")).text == "1\n"
            text = (await asyncio.to_thread(fetch, url))[1]
            assert "hone_sandbox_draining 1.0" in text
            assert 'hone_sandbox_leases{stage="ready"} 1.0' in text
        assert await asyncio.to_thread(process.wait, 20) == 0
    [line] = (tmp_path / "node" / "sandboxes.jsonl").read_text().splitlines()
    assert (json.loads(line)["end"], json.loads(line)["usage"]["num_calls"]) == ("closed", 3)
    assert '"name": "exec"' in (tmp_path / "spans.jsonl").read_text()


async def test_after_its_time_a_drained_node_ends_what_is_left(tmp_path):
    with serving(tmp_path, "--drain-seconds", "0.2") as (process, address, _):
        box = Sandbox(node=address, memory_mb=64, disk_mb=16)
        await box.open()
        call = asyncio.create_task(box.exec(["sleep", "60"]))
        await box.ready()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(SandboxError) as told:
            await call
        assert told.value.outcome is Outcome.NODE_LOST
        assert await asyncio.to_thread(process.wait, 20) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT,)]
)
async def test_a_second_signal_and_an_interrupt_end_it_at_once(tmp_path, signals):
    with serving(tmp_path, "--drain-seconds", "600") as (process, address, url):
        async with contextlib.AsyncExitStack() as stack:
            box = Sandbox(node=address, memory_mb=64, disk_mb=16)
            await box.open()
            await box.ready()
            stack.push_async_callback(box.close)
            for number in signals:
                process.send_signal(number)
                if len(signals) > 1:  # two at once would be one
                    async with asyncio.timeout(20):
                        while process.poll() is None and await asyncio.to_thread(health, url) != 503:
                            await asyncio.sleep(0.02)
            before = time.monotonic()
            assert await asyncio.to_thread(process.wait, 30) == 0
            assert time.monotonic() - before < 60  # of 600
            with contextlib.suppress(SandboxError):
                await box.exec(["true"])


def test_a_metrics_port_that_is_taken_is_told_in_a_line(tmp_path):
    with serving(tmp_path) as (_, _, url):
        port = re.search(r":(\d+)/", url)[1]
        other = tmp_path / "other"
        command = [*SERVE, "--listen", f"unix:{other}/socket", "--folder", str(other), "--metrics-port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "choose another port" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_gateway_shows_its_numbers_too(tmp_path):
    command = [*SERVE[:-1], "gateway", "--nodes", f"unix:{tmp_path}/socket", "--listen", f"unix:{tmp_path}/gateway"]
    with serving(tmp_path):
        gateway = subprocess.Popen([*command, "--metrics-port", "0"], stdout=subprocess.PIPE, text=True)
        try:
            url = re.search(r"http://127.0.0.1:\d+/metrics", gateway.stdout.readline())[0]
            async with Sandbox(node=f"unix:{tmp_path}/gateway", memory_mb=64, disk_mb=16) as box:
                await box.exec(["true"])
                assert await asyncio.to_thread(health, url) == 200
                assert "hone_gateway_nodes 1.0" in (await asyncio.to_thread(fetch, url))[1]
                shown = [*SERVE[:-1], "stats", "--node", f"unix:{tmp_path}/gateway"]
                done = await asyncio.to_thread(subprocess.run, shown, capture_output=True, text=True, timeout=60)
                assert box.sandbox_id in done.stdout
                assert "gateway/nodes" in done.stdout
        finally:
            gateway.terminate()
            gateway.wait(timeout=20)
            gateway.stdout.close()
