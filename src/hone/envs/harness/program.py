"""An agent program that is started for each rollout: a command, in a folder of its own or in a sandbox."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

from hone.envs.failures import failures_as
from hone.envs.harness.endpoint import Endpoint
from hone.envs.harness.environment import Harness, HarnessArguments, ProgramCrash
from hone.envs.harness.places import ProgramRun, SandboxRun, Workplace
from hone.envs.providers import provider_of
from hone.envs.rollout import Rollout
from hone.envs.sandboxes import LazySandbox, SandboxProvider
from hone.schema.sandboxes import SandboxSpec
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass

PLACEHOLDER = re.compile(r"\{(base_url|anthropic_base_url|api_key|model|prompt|prompt_file)\}")
KEPT_CHARACTERS = 2000
"""Of each output, in the trace; `Workplace.output` has more."""
CRASH_CHARACTERS = 500


def prompt_text(task: Task) -> str:
    """The messages of the task's prompt, one below the other."""
    return "\n\n".join(message.content for message in task.prompt)


class ProgramHarness(Harness):
    """The program is a command, started for each rollout in an empty folder, and ended with all that it started.

    command: the program and its arguments, in which {base_url} (OpenAI's, with /v1), {anthropic_base_url}, {api_key},
    {model}, {prompt} and {prompt_file} are filled in; no shell reads it. An argument holds up to 128 KiB: a longer
    prompt is read from its file. variables: environment variables, with the same placeholders. Besides these the
    program gets `Endpoint.variables`, PATH and locale, an empty HOME, and no other variable of this process. prompt:
    what the program is told of a task.

    sandboxes: where programs run that are not trusted (a provider, or what `sandboxes_at` takes), each in a sandbox of this spec; its network must reach the proxy
    on this machine. None: as a process of this user.

    `rollout.state` is a `ProgramRun`, or with sandboxes a `SandboxRun`: rewards read the program's files and its output
    there. A program whose exit code is not 0 has crashed. The trace's info has the exit code and the end of the output
    under `program`.
    """

    def __init__(
        self,
        *,
        command: Sequence[str],
        variables: Mapping[str, str] | None = None,
        prompt: Callable[[Task], str] = prompt_text,
        sandboxes: SandboxProvider | str | None = None,
        spec: SandboxSpec = SandboxSpec(network="host", memory_mb=4096),
        **common: Unpack[HarnessArguments],
    ) -> None:
        super().__init__(**common)
        if isinstance(command, str) or not command:
            raise ValueError(
                f"environment {self.name!r}: command {command!r} must be a list: the program and its arguments"
            )
        if sandboxes is not None and spec.network == "none":
            raise ValueError(f"environment {self.name!r}: a sandbox without network cannot reach the proxy; use 'host'")
        self._command = tuple(command)
        self._variables = dict(variables or {})
        self._prompt = prompt
        self._wants_prompt_file = any("{prompt_file}" in text for text in (*command, *self._variables.values()))
        self._sandboxes = None if sandboxes is None else provider_of(sandboxes)
        self._spec = spec

    async def prepare(self, rollout: Rollout, run: Workplace) -> None:
        """Write what the program shall find in its folder, before it starts. The default writes nothing."""

    async def setup(self, rollout: Rollout) -> None:
        """Make the folder or the sandbox."""
        if self._sandboxes is None:
            run: Workplace = ProgramRun()
        else:
            run = SandboxRun(LazySandbox(self._sandboxes, self._spec), self._spec.ttl_seconds)
        rollout.state = run
        await self.prepare(rollout, run)

    async def drive(self, rollout: Rollout, endpoint: Endpoint) -> None:
        """Run the command to its end."""
        run: Workplace = rollout.state
        prompt = self._prompt(rollout.task)
        values = {
            "base_url": endpoint.base_url,
            "anthropic_base_url": endpoint.anthropic_base_url,
            "api_key": endpoint.api_key,
            "model": endpoint.model,
            "prompt": prompt,
            "prompt_file": await run.write_prompt(prompt) if self._wants_prompt_file else "",
        }
        variables = {name: _filled(text, values) for name, text in self._variables.items()}
        command = [_filled(text, values) for text in self._command]
        output = run.output
        try:
            with failures_as(FailureClass.HARNESS, "start the program"):
                await run.execute(command, endpoint.variables | variables)
        finally:
            rollout.info["program"] = {
                "exit_code": output.exit_code,
                "stdout": output.stdout[-KEPT_CHARACTERS:],
                "stderr": output.stderr[-KEPT_CHARACTERS:],
            }
        if output.exit_code:
            said = (output.stderr.strip() or output.stdout.strip())[-CRASH_CHARACTERS:]
            raise ProgramCrash(f"{command[0]} ended with exit code {output.exit_code}: {said or 'it said nothing'}")

    async def teardown(self, rollout: Rollout) -> None:
        """Remove the folder or close the sandbox."""
        if rollout.state is not None:
            await rollout.state.close()


def _filled(text: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: values[found[1]], text)
