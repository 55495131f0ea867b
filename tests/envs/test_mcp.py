import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hone.envs import (
    FailureClass,
    Rubric,
    Task,
    ToolUse,
    assistant,
    play,
    reward,
    user,
)
from hone.schema.messages import ToolCall

pytest.importorskip("mcp", reason="the extra mcp is not installed")

from hone.envs.mcp import McpServer

SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]
TASK = Task(prompt=(user("use the tools"),), reference="done")


@reward
def exact(answer, reference):
    return answer == reference


def environment(*servers, **settings):
    return ToolUse(name="mcp", rubric=Rubric([exact]), train=[TASK], tools=servers, **settings)


def calls(*given):
    return assistant(
        "", *(ToolCall(f"call_{i}", name, json.dumps(arguments)) for i, (name, arguments) in enumerate(given))
    )


async def results(env, *turns):
    trace = await play(env, TASK, *(calls(*turn) for turn in turns), "done")
    assert trace.failure is None, trace.failure
    return [message.content for message in trace.messages if message.role == "tool"]


async def failure(env, *turns):
    trace = await play(env, TASK, *(calls(*turn) for turn in turns), "done")
    assert trace.failure is not None
    return trace.failure


async def test_the_tools_of_a_server_over_stdio_are_called_and_their_errors_are_read():
    server = McpServer.stdio(SERVER, env={"COLOUR": "red"}, timeout_seconds=20)
    shown = await results(
        environment(server),
        [("add", {"left": 2}), ("add", {"left": 2, "right": 3}), ("environment", {"name": "COLOUR"})],
        [("fail", {}), ("add", {"left": "x"}), ("subtract", {})],
    )
    assert shown[:3] == ["3", "5", "red"]
    assert shown[3] == "Error: Error executing tool fail: it broke"
    assert shown[4].startswith("Error: ")
    assert "no tool 'subtract'; there are add, " in shown[5]
    found = await failure(environment(server, on_error="fail"), [("fail", {})])
    assert (found.kind, found.where) == (FailureClass.TOOL, "tool fail")
    await server.close()


async def test_rollouts_share_a_connection_until_it_breaks_and_the_next_one_connects_anew():
    server = McpServer.stdio(SERVER)
    env = environment(server)
    seen = await asyncio.gather(*(results(env, [("note", {"text": "a"})]) for _ in range(3)))
    assert sorted(seen) == [["a"], ["a, a"], ["a, a, a"]]
    died, also = await asyncio.gather(
        failure(env, [("die", {})]), failure(env, [("add", {"left": 1}), ("sleep", {"seconds": 30})])
    )
    assert died.kind is also.kind is FailureClass.TOOL
    assert "Connection closed" in died.message
    assert await results(env, [("note", {"text": "b"})]) == ["b"]
    await server.close()


async def test_a_connection_for_each_rollout_keeps_them_apart():
    env = environment(McpServer.stdio(SERVER, per_rollout=True, only=["note"], prefix="book_"))
    seen = await asyncio.gather(
        *(results(env, [("book_note", {"text": name})], [("book_note", {"text": name})]) for name in "ab")
    )
    assert seen == [["a", "a, a"], ["b", "b, b"]]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_late_tool_is_an_error_of_the_tool_and_leaves_the_connection():
    server = McpServer.stdio(SERVER, timeout_seconds=0.2)
    env = environment(server)
    assert await results(env, [("sleep", {"seconds": 1})]) == ["Error: took longer than 0.2 s"]
    server_of_many = environment(server, on_error="fail")
    found = await failure(server_of_many, [("sleep", {"seconds": 1})])
    assert (found.kind, "took longer than 0.2 s" in found.message) == (FailureClass.TOOL, True)
    await server.close()


@pytest.mark.slow  # a process that is stopped takes seconds to be given up and ended
async def test_a_server_that_hangs_is_a_failure_even_where_errors_are_shown():
    server = McpServer.stdio(SERVER, timeout_seconds=0.2)
    env = environment(server)
    found = await failure(env, [("hang", {})])
    assert (found.kind, found.where) == (FailureClass.TOOL, "MCP hang")
    assert await results(env, [("add", {"left": 1})]) == ["2"]
    await server.close()


async def test_an_error_of_the_protocol_fails_its_rollout_and_leaves_the_connection():
    server = McpServer.stdio(SERVER)
    env = environment(server)
    assert await results(env, [("note", {"text": "a"})]) == ["a"]
    found = await failure(env, [("refuse", {})])
    assert (found.kind, "no more today" in found.message) == (FailureClass.TOOL, True)
    assert await results(env, [("note", {"text": "b"})]) == ["a, b"]
    await server.close()


async def test_a_cancelled_rollout_leaves_the_shared_connection_to_the_others():
    server = McpServer.stdio(SERVER)
    env = environment(server)
    assert await results(env, [("add", {"left": 1})]) == ["2"]
    rollout = asyncio.create_task(results(env, [("sleep", {"seconds": 1})]))
    await asyncio.sleep(0.05)
    rollout.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rollout
    assert await results(env, [("add", {"left": 1})]) == ["2"]
    await server.close()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["/no/such/program"], "No such file"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "onnection closed"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "took longer than 0.5 s"),
    ],
)
async def test_a_server_that_does_not_come_up_is_a_failure_of_class_tool(command, why):
    server = McpServer.stdio(command, connect_seconds=0.5 if "sleep" in command[-1] else 20)
    found = await failure(environment(server), [("add", {"left": 1})])
    assert (found.kind, found.where) == (FailureClass.TOOL, "MCP connect")
    assert why in found.message
    await server.close()


async def test_a_tool_that_the_server_lacks_is_a_failure():
    server = McpServer.stdio(SERVER, only=["multiply"])
    found = await failure(environment(server), [("add", {"left": 1})])
    assert "has no tool 'multiply'; it has add, note" in found.message
    await server.close()


def start_http_server(port):
    process = subprocess.Popen([*SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < give_up:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    process.kill()
    raise RuntimeError("the HTTP server of the test does not come up")


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def test_a_server_over_http_is_called_dies_and_is_reached_again(free_port):
    server = McpServer.http(f"http://127.0.0.1:{free_port}/mcp", connect_seconds=20, headers={"X-Test": "1"})
    env = environment(server)
    found = await failure(env, [("add", {"left": 1})])
    assert (found.kind, found.where) == (FailureClass.TOOL, "MCP connect")
    process = start_http_server(free_port)
    try:
        assert await results(env, [("add", {"left": 2}), ("fail", {})]) == [
            "3",
            "Error: Error executing tool fail: it broke",
        ]
        died = await failure(env, [("die", {})])
        assert died.kind is FailureClass.TOOL
        process.wait(30)
        assert (await failure(env, [("add", {"left": 2})])).kind is FailureClass.TOOL
        process = start_http_server(free_port)
        assert await results(env, [("add", {"left": 2})]) == ["3"]
    finally:
        await server.close()
        process.kill()
        process.wait(30)


def test_a_server_needs_a_command_and_time():
    with pytest.raises(ValueError, match="empty"):
        McpServer.stdio([])
    with pytest.raises(ValueError, match="must be positive"):
        McpServer.stdio(["python"], timeout_seconds=0)


def test_environments_without_mcp_do_not_import_it():
    code = "import hone.envs, sys; assert 'mcp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
