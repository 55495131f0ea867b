"""An agent program that is started as a process for each rollout: a command in a folder of its own."""

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hone.envs.failures import failures_as
from hone.envs.harness.endpoint import Endpoint
from hone.envs.harness.environment import Harness, OnCrash, ProgramCrash
from hone.envs.harness.process import Output, run_process
from hone.envs.rollout import Rollout
from hone.envs.rubric import Rubric
from hone.envs.sources import Tasks
from hone.schema.messages import Message
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass

PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ")
PLACEHOLDER = re.compile(r"\{(base_url|anthropic_base_url|api_key|model|prompt|prompt_file)\}")
KEPT_CHARACTERS = 2000
"""Of each output, in the trace; `ProgramRun.output` has more."""
CRASH_CHARACTERS = 500


@dataclass(slots=True)
class ProgramRun:
    """A rollout's state: `folder` is where the program works, kept until the rollout is scored."""

    scratch: Path
    output: Output = field(default_factory=Output)

    @property
    def folder(self) -> Path:
        return self.scratch / "work"

    @property
    def home(self) -> Path:
        return self.scratch / "home"

    @property
    def prompt_file(self) -> Path:
        return self.scratch / "prompt.txt"


def prompt_text(task: Task) -> str:
    """The messages of the task's prompt, one below the other."""
    return "\n\n".join(message.content for message in task.prompt)


class ProgramHarness(Harness):
    """The program is a command, started for each rollout in an empty folder, with a process group of its own.

    command: the program and its arguments, in which {base_url} (OpenAI's, with /v1), {anthropic_base_url}, {api_key},
    {model}, {prompt} and {prompt_file} are filled in; no shell reads it. variables: environment variables, with the
    same placeholders. Besides these the program gets PATH, locale and time zone, an empty HOME, and OPENAI_BASE_URL,
    OPENAI_API_KEY, OPENAI_MODEL, ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY and ANTHROPIC_MODEL: no secrets of this process.
    prompt: what the program is told of a task.

    `rollout.state` is a `ProgramRun`: rewards find the folder and the output there. A program whose exit code is not 0
    has crashed. The trace's info has the exit code and the end of the output under `program`.
    """

    def __init__(
        self,
        *,
        name: str,
        rubric: Rubric,
        train: Sequence[Task] | Tasks,
        command: Sequence[str],
        held_out: Sequence[Task] | Tasks = (),
        variables: Mapping[str, str] | None = None,
        prompt: Callable[[Task], str] = prompt_text,
        version: str = "",
        max_turns: int | None = None,
        max_tool_calls: int | None = None,
        gold: Callable[[Task], Sequence[Message]] | None = None,
        on_crash: OnCrash = "fail",
        grace_seconds: float = 5.0,
        model: str = "policy",
    ) -> None:
        if isinstance(command, str) or not command:
            raise ValueError(f"environment {name!r}: command {command!r} must be a list: the program and its arguments")
        super().__init__(
            name=name,
            rubric=rubric,
            train=train,
            held_out=held_out,
            version=version,
            max_turns=max_turns,
            max_tool_calls=max_tool_calls,
            gold=gold,
            on_crash=on_crash,
            grace_seconds=grace_seconds,
            model=model,
        )
        self._command = tuple(command)
        self._variables = dict(variables or {})
        self._prompt = prompt

    async def prepare(self, rollout: Rollout, folder: Path) -> None:
        """Put what the program shall find into its folder, before it starts. The default puts nothing."""

    async def setup(self, rollout: Rollout) -> None:
        """Make the folder."""
        rollout.state = run = ProgramRun(Path(tempfile.mkdtemp(prefix="hone-harness-")))
        run.folder.mkdir()
        run.home.mkdir()
        run.prompt_file.write_text(self._prompt(rollout.task), encoding="utf-8")
        await self.prepare(rollout, run.folder)

    async def drive(self, rollout: Rollout, endpoint: Endpoint) -> None:
        """Start the process and wait for its end."""
        run: ProgramRun = rollout.state
        values = {
            "base_url": endpoint.base_url,
            "anthropic_base_url": endpoint.anthropic_base_url,
            "api_key": endpoint.api_key,
            "model": endpoint.model,
            "prompt": self._prompt(rollout.task),
            "prompt_file": str(run.prompt_file),
        }
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        variables |= {"HOME": str(run.home), **endpoint.variables}
        variables |= {name: _filled(text, values) for name, text in self._variables.items()}
        command = [_filled(text, values) for text in self._command]
        try:
            with failures_as(FailureClass.HARNESS, "start the program"):
                await run_process(command, run.folder, variables, run.output)
        finally:
            output = run.output
            rollout.info["program"] = {
                "exit_code": output.exit_code,
                "stdout": output.stdout[-KEPT_CHARACTERS:],
                "stderr": output.stderr[-KEPT_CHARACTERS:],
            }
        if output.exit_code:
            said = (output.stderr.strip() or output.stdout.strip())[-CRASH_CHARACTERS:]
            raise ProgramCrash(f"{command[0]} ended with exit code {output.exit_code}: {said or 'it said nothing'}")

    async def teardown(self, rollout: Rollout) -> None:
        """Remove the folder."""
        if rollout.state is not None:
            await asyncio.to_thread(shutil.rmtree, rollout.state.scratch, ignore_errors=True)


def _filled(text: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: values[found[1]], text)
