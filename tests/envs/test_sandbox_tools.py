"""Tools over a sandbox: a session that remembers, a shell, and a sandbox whose creation nobody waits for too early."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from hone.envs import (
    FailureClass,
    RolloutFailure,
    Rubric,
    SamplingParameters,
    Task,
    Turn,
    assistant,
    play,
    reward,
    run_rollout,
    tool_call,
    user,
)
from hone.envs.local_processes import LocalProcesses
from hone.envs.providers import sandboxes_at
from hone.envs.sandbox_tools import SandboxState, SandboxToolUse, shell_text
from hone.envs.sandboxes import LazySandbox
from hone.envs.sessions import PythonSession
from hone.schema.sampling import FinishReason
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec, Usage

STOP = FinishReason.STOP
TASK = Task(prompt=(user("compute"),))


class Slow:
    """A provider whose sandboxes come when `gate` opens, and which remembers them."""

    def __init__(self, error=None):
        self.gate = asyncio.Event()
        self.error = error
        self.num_asked = 0
        self.sandboxes = []

    async def create(self, spec):
        self.num_asked += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.sandboxes.append(await LocalProcesses().create(spec))
        return self.sandboxes[-1]


@pytest.fixture(params=["processes", "cells"])
async def sandbox(request):
    async with LazySandbox(sandboxes_at(request.param), SandboxSpec()) as sandbox:
        try:
            await sandbox.exec(["true"])
        except RolloutFailure as failure:
            pytest.skip(str(failure))
        yield sandbox


# --- the session ---------------------------------------------------------------------------------------------------


async def test_a_session_keeps_its_variables_and_shows_the_last_value(sandbox):
    session = PythonSession(sandbox)
    assert await session.run("import math\nx = 6") == ""
    assert await session.run("print('hello'); x * 7") == "hello\n42\n"
    assert await session.run("def f(y):\n    return math.sqrt(y)\nf(16)") == "4.0\n"
    assert await session.run("_ + 1") == "5.0\n"


async def test_a_session_shows_exceptions_with_their_lines_and_goes_on(sandbox):
    session = PythonSession(sandbox)
    shown = await session.run("x = 1\ndef f():\n    return x / 0\nf()")
    assert shown.startswith('Traceback (most recent call last):\n  File "<snippet 1>", line 4, in <module>')
    assert "    return x / 0\n" in shown
    assert shown.endswith("ZeroDivisionError: division by zero\n")
    assert "SyntaxError" in await session.run("x = = 2")
    assert "SystemExit: 3" in await session.run("raise SystemExit(3)")
    assert await session.run("x") == "1\n"


async def test_a_session_shows_what_children_print_and_cuts_long_output(sandbox):
    session = PythonSession(sandbox)
    assert await session.run("import subprocess\n_ = subprocess.run(['echo', 'child'])") == "child\n"
    shown = await session.run("print('x' * 1_000_000); print('end')")
    assert len(shown) < 70_000
    assert "bytes left out" in shown
    assert shown.endswith("x\nend\n")


async def test_a_late_snippet_is_interrupted_and_the_session_goes_on(sandbox):
    session = PythonSession(sandbox)
    await session.run("x = 1")
    session._timeout_seconds = 0.3  # not before it has started, which takes its time, too
    shown = await session.run("print('before')\nwhile True: x += 1")
    assert shown.startswith("before\nTraceback")
    assert "KeyboardInterrupt\n[Interrupted after 0.3 s. The session goes on" in shown
    assert await session.run("x > 1") == "True\n"


async def test_a_snippet_that_ignores_the_interrupt_costs_the_session(sandbox, monkeypatch):
    monkeypatch.setattr("hone.envs.guest_sessions.INTERRUPT_SECONDS", 0.2)
    monkeypatch.setattr("hone.sandbox.python.INTERRUPT_SECONDS", 0.2)
    session = PythonSession(sandbox, timeout_seconds=0.3)
    ignore = "import signal\nx = 1\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    assert "Killed after 0.3 s. The next call begins a new session" in await session.run(ignore)
    assert "NameError" in await session.run("x")


@pytest.mark.parametrize(
    "code", ["import os; os._exit(0)", "import os; os.close(3); os.close(4)", "import os; os.write(4, b'x' * 99)"]
)
async def test_a_snippet_that_ends_the_process_costs_the_session(sandbox, code):
    session = PythonSession(sandbox, timeout_seconds=5)
    await session.run("x = 1")
    await session.run(code)
    await session.run("1")
    assert "42" in await session.run("6 * 7")


async def test_snippets_at_the_same_time_run_one_after_another(sandbox):
    session = PythonSession(sandbox)
    await session.run("x = []")
    await asyncio.gather(*(session.run(f"x.append({number})") for number in range(5)))
    assert await session.run("sorted(x)") == "[0, 1, 2, 3, 4]\n"


async def test_a_cancelled_snippet_does_not_answer_the_next(sandbox):
    session = PythonSession(sandbox)
    await session.run("1")
    call = asyncio.create_task(session.run("import time; time.sleep(60); 'late'"))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await session.run("'new'") == "'new'\n"


async def test_a_sandbox_that_is_gone_is_a_failure_of_class_sandbox():
    inner = await LocalProcesses().create(SandboxSpec())
    session = PythonSession(inner)
    await session.run("1")
    os.kill(inner._guardian, signal.SIGKILL)
    with pytest.raises(RolloutFailure) as failure:
        await session.run("import time; time.sleep(60)")
    assert failure.value.failure.kind is FailureClass.SANDBOX
    await inner.close()


# --- a sandbox that comes when it is wanted ------------------------------------------------------------------------


async def test_creation_starts_at_once_and_is_awaited_at_the_first_call():
    provider = Slow()
    async with LazySandbox(provider) as sandbox:
        call = asyncio.create_task(sandbox.exec(["echo", "hello"]))
        await asyncio.sleep(0.01)
        assert provider.num_asked == 1
        assert not call.done()
        provider.gate.set()
        assert (await call).stdout == "hello\n"
    with pytest.raises(RolloutFailure, match="closed"):
        await provider.sandboxes[0].exec(["true"])


async def test_a_creation_that_fails_is_a_failure_at_every_call_and_none_at_the_close():
    provider = Slow(OSError("no room"))
    provider.gate.set()
    sandbox = LazySandbox(provider)
    for _ in range(2):
        with pytest.raises(RolloutFailure, match="no room") as failure:
            await sandbox.list()
        assert failure.value.failure.kind is FailureClass.SANDBOX
    await sandbox.close()


async def test_a_creation_that_takes_too_long_is_a_failure():
    sandbox = LazySandbox(Slow(), create_seconds=0.05)
    with pytest.raises(RolloutFailure, match=r"longer than 0\.05 s") as failure:
        await sandbox.read("file")
    assert failure.value.failure.kind is FailureClass.SANDBOX
    await sandbox.close()


async def test_a_creation_that_nobody_waits_for_is_given_up_at_the_close():
    provider = Slow()
    sandbox = LazySandbox(provider)
    await asyncio.sleep(0)
    call = asyncio.create_task(sandbox.list())
    await asyncio.sleep(0)
    await sandbox.close()
    with pytest.raises(RolloutFailure, match="closed"):
        await call
    with pytest.raises(RolloutFailure, match="closed"):
        await sandbox.list()


# --- the environment -----------------------------------------------------------------------------------------------


@reward
async def wrote_the_file(state: SandboxState) -> float:
    with contextlib.suppress(FileNotFoundError):
        return float(await state.sandbox.read("answer") == b"42\n")
    return 0.0


def environment(provider="here", **settings):
    return SandboxToolUse(name="work", rubric=Rubric([wrote_the_file]), train=[TASK], sandboxes=provider, **settings)


def calls(*given):
    return assistant("", *(tool_call(name, arguments, id=str(index)) for index, (name, arguments) in enumerate(given)))


async def test_a_policy_works_in_its_sandbox_and_the_reward_looks_at_it():
    trace = await play(
        environment(),
        TASK,
        calls(("python", {"code": "x = 6 * 7\nopen('answer', 'w').write(f'{x}\\n')"})),
        calls(("shell", {"command": "cat answer; echo oops >&2; exit 2"}), ("python", {"code": "x"})),
        "done",
    )
    assert trace.failure is None
    assert [message.content for message in trace.messages if message.role == "tool"] == [
        "3\n",
        "42\noops\n[Exit code 2.]",
        "42\n",
    ]
    assert trace.reward == 1.0


async def test_the_policy_sees_two_tools_and_nothing_of_the_machinery():
    specs = {spec.name: spec for spec in environment().tools}
    assert list(specs) == ["python", "shell"]
    assert list(specs["python"].parameters["properties"]) == ["code"]
    assert list(specs["shell"].parameters["properties"]) == ["command"]


async def test_a_late_command_is_shown_as_killed():
    trace = await play(
        environment(timeout_seconds=0.3), TASK, calls(("shell", {"command": "echo begun; sleep 60"})), "done"
    )
    assert trace.messages[2].content == "begun\n[Killed after 0 s.]"
    assert trace.reward == 0.0


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (Outcome.OUT_OF_MEMORY, "out of memory"),
        (Outcome.DISK_FULL, "the disk is full"),
        (Outcome.PIDS_LIMIT, "too many processes"),
    ],
)
def test_a_command_that_failed_at_a_limit_says_at_which(outcome, reason):
    result = ExecResult(outcome, 1, "", "no\n", Usage(0.0, 0.0, 0))
    assert shell_text(result) == f"no\n[Exit code 1, {reason}.]"


async def test_the_first_turn_hides_the_creation():
    provider = Slow()
    seen = []

    class Sampler:
        async def sample(self, branch, tools, sampling):
            await asyncio.sleep(0.01)
            seen.append((provider.num_asked, len(provider.sandboxes)))
            provider.gate.set()
            return Turn(
                calls(("shell", {"command": "echo 42 > answer"})) if len(seen) == 1 else assistant("done"), STOP
            )

    trace = await run_rollout(environment(provider), TASK, 0, Sampler(), SamplingParameters(), seed=0)
    assert seen == [(1, 0), (1, 1)]
    assert trace.reward == 1.0


async def test_a_sandbox_that_cannot_be_created_fails_the_rollout_that_uses_it():
    provider = Slow(OSError("no room"))
    provider.gate.set()
    trace = await play(environment(provider), TASK, calls(("shell", {"command": "true"})), "done")
    assert trace.failure.kind is FailureClass.SANDBOX


def descriptors():
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


async def test_rollouts_leave_no_descriptor_open():
    work = environment()
    turn = calls(("python", {"code": "1"}), ("shell", {"command": "true"}))
    await play(work, TASK, turn, "done")
    before = descriptors()
    for answers in ((turn, "done"), (turn,), ("done",)):
        await play(work, TASK, *answers)
    assert descriptors() == before


async def test_a_sandbox_is_closed_whatever_happens():
    provider = Slow()
    provider.gate.set()
    trace = await play(environment(provider), TASK, calls(("shell", {"command": "true"})))
    assert trace.failure is not None  # the policy had nothing more to say
    assert not provider.sandboxes[0]._folder.exists()
