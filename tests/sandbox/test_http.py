"""SandboxFusion's `/run_code`, asked by a real HTTP client of a real server over real sandboxes."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping

import aiohttp
import pytest

pytest.importorskip("fastapi", reason="needs hone[sandbox-http]")
pytest.importorskip("uvicorn", reason="needs hone[sandbox-http]")

from hone.sandbox.bridges.http import HttpLimits, code_app, serving
from hone.sandbox.client import Busy, Sandbox, SandboxError
from hone.sandbox.languages import LANGUAGES
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandboxes import Outcome, SandboxSpec

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=32)
TOKENS = {"a-token-of-sixteen": "tests"}


class Client:
    """A client of one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def run(self, code: str, language: str = "python", **more) -> dict:
        reply = await self.post({"code": code, "language": language, **more})
        assert reply[0] == 200, reply
        return json.loads(reply[1])

    async def post(self, body: dict | bytes, headers: dict | None = None) -> tuple[int, bytes, Mapping[str, str]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(f"{self.url}/run_code", data=data, headers=headers) as reply:
            return reply.status, await reply.read(), reply.headers


@contextlib.asynccontextmanager
async def served(open_box, **settings):
    async with (
        serving(code_app(open_box, spec=SMALL, **settings), "127.0.0.1", 0) as url,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        yield Client(session, url)


@pytest.fixture
async def node():
    try:
        async with Node(limits=Limits(max_warm=8)) as node:
            async with Sandbox(spec=SMALL, node=node) as box:
                await box.ready()
            yield node
            assert node.statistics()["sandbox/leases"] == 0
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
async def client(node):
    async with served(lambda spec, token, owner: Sandbox(spec=spec, node=node)) as client:
        yield client


async def test_code_is_run_and_its_streams_come_back(client):
    reply = await client.run("import sys; print(input() * 2); print('oh', file=sys.stderr)", stdin="ab")
    assert (reply["status"], reply["message"], reply["compile_result"]) == ("Success", "", None)
    ran = reply["run_result"]
    assert (ran["status"], ran["return_code"], ran["stdout"], ran["stderr"]) == ("Finished", 0, "abab\n", "oh\n")
    assert 0 < ran["execution_time"] < 60
    assert reply["executor_pod_name"].startswith("local.")


async def test_code_that_fails_is_the_codes_fault(client):
    reply = await client.run("exit(3)")
    assert (reply["status"], reply["run_result"]["return_code"]) == ("Failed", 3)


async def test_code_that_is_late_is_told_so(client):
    reply = await client.run("while True: pass", run_timeout=0.3)
    assert (reply["status"], reply["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")
    assert reply["run_result"]["return_code"] is None


async def test_the_compiler_has_a_result_of_its_own(client):
    reply = await client.run("int main() { return 7; }", "cpp", compile_timeout=60)
    assert reply["compile_result"]["return_code"] == 0
    assert (reply["status"], reply["run_result"]["return_code"]) == ("Failed", 7)
    reply = await client.run("int main() { oops }", "cpp", compile_timeout=60)
    assert (reply["status"], reply["run_result"]) == ("Failed", None)
    assert "oops" in reply["compile_result"]["stderr"]


async def test_files_go_in_and_come_out(client):
    code = "data = open('deep/in.bin', 'rb').read(); open('out.bin', 'wb').write(data[::-1])"
    files = {"deep/in.bin": base64.b64encode(b"\x00\xff1").decode(), "nothing": None}
    reply = await client.run(code, files=files, fetch_files=["out.bin", "none"])
    assert reply["status"] == "Success"
    assert {name: base64.b64decode(data) for name, data in reply["files"].items()} == {"out.bin": b"1\xff\x00"}
    assert "none" in reply["message"]


async def test_memory_is_what_the_request_says(client):
    reply = await client.run("x = bytearray(300 << 20)")
    assert reply["status"] == "Failed"
    assert (await client.run("x = bytearray(300 << 20)", memory_limit_MB=600))["status"] == "Success"


async def test_no_code_meets_what_other_code_left(client):
    await client.run("open('left', 'w').write('x')")
    reply = await client.run("import os; print(os.path.exists('left'))")
    assert reply["run_result"]["stdout"] == "False\n"


async def test_sixty_four_at_once_have_each_their_own_answer(client):
    replies = await asyncio.gather(*(client.run(f"print({number} ** 2)", run_timeout=120) for number in range(64)))
    assert [reply["run_result"]["stdout"] for reply in replies] == [f"{number**2}\n" for number in range(64)]
    assert len({reply["executor_pod_name"] for reply in replies}) == 64


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "truncated"),
        ({"code": "1"}, "language"),
        ({"code": "1", "language": "klingon"}, "there are python"),
        ({"code": 1, "language": "python"}, "code"),
        ({"code": "1", "language": "python", "run_timeout": -1}, "run_timeout"),
        ({"code": "1", "language": "python", "run_timeout": 1e9}, "at most 600 s"),
        ({"code": "1", "language": "python", "memory_limit_MB": 1e9}, "at most 8192"),
        ({"code": "1", "language": "python", "files": {"a": "%%"}}, "files"),
    ],
)
async def test_a_request_that_makes_no_sense_is_refused_with_the_reason(client, body, complaint):
    status, reply, _ = await client.post(body)
    assert status == 422
    assert complaint in json.loads(reply)["detail"]


async def test_what_is_not_known_here_is_ignored_as_theirs_does(client):
    assert (await client.run("print(1)", something_of_another_version=True))["status"] == "Success"


async def test_a_file_that_cannot_be_written_is_the_requests_fault(client):
    status, reply, _ = await client.post({"code": "1", "language": "python", "files": {"main.py/x": "", "main.py": ""}})
    assert status == 422
    assert "carried out" in json.loads(reply)["detail"]


async def test_a_token_is_wanted_where_there_are_tokens(node):
    async with served(lambda spec, token, owner: Sandbox(spec=spec, node=node), tokens=TOKENS) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer "}):
            assert (await client.post({"code": "1", "language": "python"}, headers))[0] == 401
        right = {"authorization": "Bearer a-token-of-sixteen"}
        assert (await client.post({"code": "1", "language": "python"}, right))[0] == 200


async def test_a_sandbox_belongs_to_whose_token_it_was(node):
    seen = []

    def open_box(spec, token, owner):
        seen.append(owner)
        return Sandbox(spec=spec, node=node, owner=owner)

    async with served(open_box, tokens=TOKENS) as client:
        right = {"authorization": "Bearer a-token-of-sixteen"}
        asking = asyncio.create_task(
            client.post({"code": "import time; time.sleep(60)", "language": "python", "run_timeout": 50}, right)
        )
        while not node.sandboxes("tests"):
            assert not asking.done()
            await asyncio.sleep(0.01)
        assert node.sandboxes("") == ()
        asking.cancel()
        await asyncio.wait([asking])
    assert seen == ["tests"]


async def test_a_node_can_decide_whom_to_let_in(node):
    async with (
        NodeServer(node, "tcp://127.0.0.1:0", tokens=TOKENS) as server,
        served(lambda spec, token, owner: Sandbox(spec=spec, node=server.address, token=token)) as client,
    ):
        for _ in range(2):
            status, reply, _ = await client.post({"code": "1", "language": "python"}, {"authorization": "Bearer no"})
            assert status == 403
            assert b"check the token" in reply
        right = {"authorization": "Bearer a-token-of-sixteen"}
        assert (await client.post({"code": "1", "language": "python"}, right))[0] == 200


async def test_a_request_that_is_too_large_is_refused_however_it_comes(node):
    async def pieces():
        for _ in range(50):
            yield b"x" * 1000
            await asyncio.sleep(0)

    async with served(
        lambda spec, token, owner: Sandbox(spec=spec, node=node), limits=HttpLimits(max_body_bytes=9999)
    ) as client:
        assert (await client.post(b" " * 10_000))[0] == 413
        with contextlib.suppress(aiohttp.ClientError):  # it may be cut off in the middle
            async with client.session.post(f"{client.url}/run_code", data=pieces()) as reply:
                assert reply.status == 413


async def test_a_server_that_is_full_says_when_to_come_again(node):
    async with served(
        lambda spec, token, owner: Sandbox(spec=spec, node=node), limits=HttpLimits(max_requests=1)
    ) as client:
        first = asyncio.create_task(client.run("import time; time.sleep(60)", run_timeout=50))
        while not node.sandboxes():
            await asyncio.sleep(0.01)
        status, reply, headers = await client.post({"code": "1", "language": "python"})
        assert (status, headers.get("retry-after")) == (503, "1"), reply
        first.cancel()
        await asyncio.wait([first])


async def test_a_node_that_is_full_is_passed_on(node):
    class Full(Sandbox):
        async def open(self):
            raise Busy("9 sandboxes wait already", 2.5)

    async with served(lambda spec, token, owner: Full(spec=spec, node=node)) as client:
        status, reply, headers = await client.post({"code": "1", "language": "python"})
        assert (status, headers["retry-after"]) == (503, "3")
        assert b"9 sandboxes" in reply


async def test_a_client_that_leaves_takes_its_sandbox_along(node):
    async with served(lambda spec, token, owner: Sandbox(spec=spec, node=node)) as client:
        asking = asyncio.create_task(client.run("import time; time.sleep(600)", run_timeout=500))
        while not (found := node.sandboxes()) or found[0].usage.num_calls < 3:
            await asyncio.sleep(0.01)
        asking.cancel()
        async with asyncio.timeout(20):
            while node.sandboxes():
                await asyncio.sleep(0.01)


async def test_a_sandbox_that_dies_is_an_error_and_never_an_answer(node):
    async with served(lambda spec, token, owner: Sandbox(spec=spec, node=node)) as client:
        asking = asyncio.create_task(client.run("import time; time.sleep(600)", run_timeout=500))
        while not (found := node.sandboxes()) or found[0].usage.num_calls < 3:
            await asyncio.sleep(0.01)
        os.kill(node.sandbox(found[0].sandbox_id).cell.pid, signal.SIGKILL)
        reply = await asking
        assert (reply["status"], reply["run_result"]) == ("SandboxError", None)
        assert "agent_lost" in reply["message"]


async def test_a_missing_toolchain_is_an_error_and_never_an_answer(client):
    missing = [one for one in LANGUAGES if not shutil.which(one.tool)]
    if not missing:
        pytest.skip("this machine has the toolchains of all languages")
    reply = await client.run("", missing[0].name)
    assert (reply["status"], reply["run_result"]) == ("SandboxError", None)
    assert f"needs the program {missing[0].tool}" in reply["message"]


async def test_a_node_behind_an_address_does_as_well(node, tmp_path):
    address = f"unix:{tmp_path}/node"
    async with NodeServer(node, address), served(lambda spec, token, owner: Sandbox(spec=spec, node=address)) as client:
        assert (await client.run("print(1)"))["run_result"]["stdout"] == "1\n"
    async with served(lambda spec, token, owner: Sandbox(spec=spec, node=f"unix:{tmp_path}/gone")) as client:
        reply = await client.run("print(1)")
        assert reply["status"] == "SandboxError"
        assert Outcome.NODE_LOST in reply["message"]


def test_the_command_line_serves_it(tmp_path):
    hone = [sys.executable, "-m", "hone.cli.main", "sandbox"]
    address, tokens = f"unix:{tmp_path}/socket", tmp_path / "tokens"
    refused = subprocess.run(
        [*hone, "http", "--node", address, "--listen", "127.0.0.1:0"], capture_output=True, check=False, timeout=60
    )
    assert refused.returncode == 2
    assert b"--without-token" in refused.stderr
    tokens.write_text("tests a-token-of-sixteen\n")
    options = {"--listen": address, "--folder": tmp_path / "node", "--tokens": tokens, "--http": "127.0.0.1:0"}
    words = [str(word) for option in options.items() for word in option]
    serving = subprocess.Popen([*hone, "serve", *words], stdout=subprocess.PIPE, text=True)
    try:
        url = serving.stdout.readline().strip().partition(", /run_code at ")[2]
        assert asyncio.run(_once(url, "wrong")) == 401
        assert asyncio.run(_once(url, "a-token-of-sixteen")) == 200
        accounts = tmp_path / "node" / "sandboxes.jsonl"
        assert [json.loads(line)["owner"] for line in accounts.read_text().splitlines()] == ["tests"]
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait(timeout=30)
        serving.stdout.close()
    assert serving.returncode == 0


async def _once(url: str, token: str) -> int:
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {token}"}) as session:
        client = Client(session, url)
        return (await client.post({"code": "print(1)", "language": "python"}))[0]
