"""A Python session and a shell as tools, and the environment in which the policy uses them in a sandbox of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

from hone.envs.environment import EnvironmentArguments
from hone.envs.providers import HERE, provider_of
from hone.envs.rollout import Rollout
from hone.envs.sandboxes import LazySandbox, Sandbox, SandboxProvider
from hone.envs.sessions import PythonSession
from hone.envs.tools import Function, OnError, Tool, Toolset, ToolUse, tool
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec

WAIT_SECONDS = 600.0
"""Of a call of a tool in all; the code itself has less, and the creation of the sandbox its own deadline."""


@dataclass(frozen=True, slots=True)
class SandboxState:
    """What a rollout of a `SandboxToolUse` has in its `state`: its sandbox, and the Python session in it."""

    sandbox: LazySandbox
    session: PythonSession


class SandboxToolUse(ToolUse):
    """The policy works in a sandbox with the tools `python` and `shell`, and answers when it is done.

    The sandbox's creation starts with the rollout, is awaited at the first call, and hidden by the first turn. Rewards
    that name `state` find the sandbox in `state.sandbox`, as the policy left it; it is closed after the scoring::

        @reward
        async def tests_pass(state: SandboxState) -> float:
            return float((await state.sandbox.exec(["python", "-m", "pytest", "-q"])).is_success)

    sandboxes: a provider, or what `sandboxes_at` takes. timeout_seconds: of each snippet and each command. tools: further tools.
    """

    def __init__(
        self,
        *,
        sandboxes: SandboxProvider | str = HERE,
        spec: SandboxSpec = SandboxSpec(),
        timeout_seconds: float = 30.0,
        tools: Sequence[Tool | Toolset | Function] = (),
        on_error: OnError = "show",
        **common: Unpack[EnvironmentArguments],
    ) -> None:
        self._sandboxes = provider_of(sandboxes)
        self._spec = spec
        self._timeout_seconds = timeout_seconds
        super().__init__(
            tools=[
                python_tool(lambda rollout: rollout.state.session),
                shell_tool(lambda rollout: rollout.state.sandbox, timeout_seconds),
                *tools,
            ],
            on_error=on_error,
            **common,
        )

    async def setup(self, rollout: Rollout) -> None:
        """Begin to create the sandbox."""
        sandbox = LazySandbox(self._sandboxes, self._spec)
        rollout.state = SandboxState(sandbox, PythonSession(sandbox, self._timeout_seconds))

    async def teardown(self, rollout: Rollout) -> None:
        """Close the sandbox."""
        if rollout.state is not None:
            await rollout.state.sandbox.close()


def python_tool(session: Callable[[Rollout], PythonSession]) -> Tool:
    """The tool `python` over a rollout's session."""

    async def python(code: str, session: PythonSession) -> str:
        """Run Python code in a session that keeps its variables between calls.

        Shows what the code prints, the value of its last line, and the traceback of an exception.

        code: the lines to run.
        """
        return await session.run(code)

    return tool(hidden={"session": session}, timeout_seconds=WAIT_SECONDS)(python)


def shell_tool(sandbox: Callable[[Rollout], Sandbox], timeout_seconds: float) -> Tool:
    """The tool `shell` over a rollout's sandbox."""

    async def shell(command: str, sandbox: Sandbox) -> str:
        """Run a shell command in the working folder; shows stdout, stderr and an exit code that is not 0.

        Each call starts in the same folder; files stay, variables and the current folder do not.

        command: as one would type it, also several lines.
        """
        return shell_text(await sandbox.exec(["sh", "-c", BASH_OR_SH, "sh", command], timeout_seconds=timeout_seconds))

    return tool(hidden={"sandbox": sandbox}, timeout_seconds=WAIT_SECONDS)(shell)


BASH_OR_SH = 'exec "$(command -v bash || command -v sh)" -c "$1"'


LIMITS = {
    Outcome.OUT_OF_MEMORY: ", out of memory",
    Outcome.DISK_FULL: ", the disk is full",
    Outcome.PIDS_LIMIT: ", too many processes",
}


def shell_text(result: ExecResult) -> str:
    """What a command did, as the policy reads it."""
    parts = [result.stdout.removesuffix("\n"), result.stderr.removesuffix("\n")]
    if result.outcome is Outcome.TIMEOUT:
        parts.append(f"[Killed after {result.usage.wall_seconds:.0f} s.]")
    elif result.outcome is Outcome.OUTPUT_LIMIT:
        parts.append("[Killed: too much output.]")
    elif not result.is_success:
        parts.append(f"[Exit code {result.exit_code}{LIMITS.get(result.outcome, '')}.]")
    return "\n".join(part for part in parts if part)
