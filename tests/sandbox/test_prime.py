"""The client with the names of `prime-sandboxes`: what it does on a real node, and that its names are still theirs."""

import ast
import asyncio
import importlib.util
from pathlib import Path

import pytest

from hone.sandbox.bridges import prime, prime_models
from hone.sandbox.bridges.prime import (
    AsyncSandboxClient,
    CommandTimeoutError,
    CreateSandboxRequest,
    SandboxFileNotFoundError,
    SandboxNotRunningError,
)
from hone.sandbox.client import SandboxError
from hone.sandbox.node.node import Node

OURS = {"node"}
"""Arguments that theirs do not have."""


@pytest.fixture
async def client():
    try:
        async with Node() as node, AsyncSandboxClient(node=node) as client:
            await client.wait_for_creation((await client.create(request())).id)
            await client.bulk_delete(labels=["probe"])
            yield client
    except SandboxError as error:
        pytest.skip(str(error))


def request(**changes) -> CreateSandboxRequest:
    settings = {"name": "one", "memory_gb": 0.125, "disk_size_gb": 0.0625, "labels": ["probe"], **changes}
    return CreateSandboxRequest(**settings)


async def begun(client: AsyncSandboxClient, **changes) -> str:
    sandbox = await client.create(request(**changes))
    await client.wait_for_creation(sandbox.id)
    return sandbox.id


async def test_a_command_line_runs_with_its_variables_and_folder(client):
    box = await begun(client, environment_vars={"A": "1"}, secrets={"B": "2"})
    done = await client.execute_command(box, "echo $A$B$C | cat; pwd; echo oh >&2; exit 3", "/tmp", {"C": "3"})
    assert (done.stdout, done.stderr, done.exit_code) == ("123\n/tmp\n", "oh\n", 3)


async def test_a_command_that_is_late_is_an_error_of_its_own(client):
    box = await begun(client)
    with pytest.raises(CommandTimeoutError, match="longer than 1 s"):
        await client.execute_command(box, "sleep 60", timeout=1)
    assert (await client.execute_command(box, "echo on")).stdout == "on\n"


async def test_files_come_and_go(client, tmp_path):
    box = await begun(client)
    (tmp_path / "here").write_bytes(b"\x00abc")
    sent = await client.upload_file(box, "/work/deep/there", str(tmp_path / "here"))
    assert (sent.success, sent.size) == (True, 4)
    await client.download_file(box, "deep/there", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == b"\x00abc"
    await client.upload_bytes(box, "text", b"0123456789", "text")
    piece = await client.read_file(box, "text", offset=2, length=3)
    assert (piece.content, piece.total_size, piece.truncated) == ("234", 10, True)
    with pytest.raises(SandboxFileNotFoundError, match="no file none"):
        await client.read_file(box, "none")


async def test_a_job_runs_on_while_others_do(client):
    box = await begun(client)
    job = await client.start_background_job(box, "echo 'it''s'; while [ ! -e go ]; do sleep 0.02; done; exit 4")
    assert not (await client.get_background_job(box, job)).completed
    await client.execute_command(box, "touch go")
    async with asyncio.timeout(20):
        while not (status := await client.get_background_job(box, job)).completed:
            await asyncio.sleep(0.02)
    assert (status.exit_code, status.stdout, status.stderr) == (4, "its\n", "")
    assert (await client.run_background_job(box, "echo done", poll_interval=0)).stdout == "done\n"


async def test_sandboxes_are_listed_by_state_and_label_and_deleted_by_it(client):
    boxes = [await begun(client, labels=["many", str(number)]) for number in range(3)]
    page = await client.list(labels=["many"], per_page=2)
    assert ([one.id for one in page.sandboxes], page.total, page.has_next) == (boxes[:2], 3, True)
    assert {one.status for one in page.sandboxes} == {"RUNNING"}
    assert (await client.delete(boxes[0]))["status"] == "TERMINATED"
    assert (await client.list(labels=["many"], exclude_terminated=True)).total == 2
    deleted = await client.bulk_delete([boxes[1], "none.1.1"])
    assert deleted.succeeded == [boxes[1]]
    assert [one["sandbox_id"] for one in deleted.failed] == ["none.1.1"]
    assert (await client.bulk_delete(labels=["many"])).succeeded == boxes
    with pytest.raises(SandboxNotRunningError):
        await client.execute_command(boxes[2], "true")


def test_a_list_of_hosts_is_all_the_network_there_is():
    assert request().spec().network == "none"
    spec = request(network_allowlist=["pypi.org"]).spec()
    assert (spec.network, spec.allow) == ("allow", ("pypi.org",))


async def test_several_are_awaited_together(client):
    boxes = [(await client.create(request())).id for _ in range(8)]
    assert await client.bulk_wait_for_creation(boxes) == dict.fromkeys(boxes, "RUNNING")


async def test_the_same_key_is_the_same_sandbox(client):
    first, second = [await client.create(request(idempotency_key="k")) for _ in range(2)]
    assert first.id == second.id


async def test_a_sandbox_that_cannot_be_made_says_why(client):
    sandbox = await client.create(request(docker_image="dir:/none-such"))
    with pytest.raises(SandboxNotRunningError, match="none-such"):
        await client.wait_for_creation(sandbox.id)
    shown = await client.get(sandbox.id)
    assert shown.status == "ERROR"
    assert "none-such" in shown.error_message


async def test_what_nobody_can_keep_is_refused(client):
    with pytest.raises(ValueError, match="no GPUs"):
        request(gpu_count=1, gpu_type="H100")
    with pytest.raises(ValueError, match="root of their own sandbox"):
        await client.execute_command(await begun(client), "true", user="nobody")
    with pytest.raises(SandboxNotRunningError, match="no sandbox of this client"):
        await client.execute_command("other.1.1", "true")
    with pytest.raises(ValueError, match="or their labels"):
        await client.bulk_delete()
    for argument, value in (("team_id", "t"), ("user_id", "u"), ("all_users", True)):
        with pytest.raises(ValueError, match=f"{argument}={value!r}"):
            await client.bulk_delete(labels=["probe"], **{argument: value})
    for argument in ("team_id", "user_id"):
        with pytest.raises(ValueError, match=argument):
            await client.list(**{argument: "x"})


def theirs(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module of the SDK, from its source: importing it would read its user's settings."""
    found = importlib.util.find_spec("prime_sandboxes")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs prime-sandboxes: pip install prime-sandboxes")
    tree = ast.parse((Path(found.submodule_search_locations[0]) / f"{module}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def classes(path: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(Path(path).read_text()).body if isinstance(node, ast.ClassDef)}


def methods(node: ast.ClassDef) -> dict[str, list[str]]:
    """Public methods with the names of their arguments in order."""
    return {
        one.name: [argument.arg for argument in (*one.args.args[1:], *one.args.kwonlyargs)]
        for one in node.body
        if isinstance(one, ast.AsyncFunctionDef) and not one.name.startswith("_")
    }


def fields(node: ast.ClassDef) -> set[str]:
    return {one.target.id for one in node.body if isinstance(one, ast.AnnAssign)}


def test_every_method_takes_what_theirs_takes_in_the_same_order():
    peer = methods(theirs("sandbox")["AsyncSandboxClient"])
    for name, arguments in methods(classes(prime.__file__)["AsyncSandboxClient"]).items():
        assert arguments == peer[name], name


def test_every_field_is_one_of_theirs():
    peer = theirs("models")
    for name, node in classes(prime_models.__file__).items():
        if name.endswith("Error"):
            assert name in theirs("exceptions")
        else:
            assert fields(node) - OURS <= fields(peer[name]), name
