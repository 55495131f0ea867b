"""The messages of SandboxFusion's `/run_code`, and how what happened in a sandbox reads in them."""

from enum import StrEnum
from typing import Annotated

import msgspec

from hone.sandbox.client import CodeResult, Outcome
from hone.schema.sandboxes import ExecResult

Seconds = Annotated[float, msgspec.Meta(gt=0)]
LANGUAGES = {"python_gpu": "python"}
"""Names that are theirs alone."""


class RunCodeRequest(msgspec.Struct, frozen=True):
    """Code to run. Files come and go as base64. What is not known here is ignored, as they do.

    memory_limit_MB: of the program; -1 leaves it to the server.
    """

    code: str
    language: str
    stdin: str | None = None
    compile_timeout: Seconds = 10.0
    run_timeout: Seconds = 10.0
    files: dict[str, bytes | None] = {}
    fetch_files: list[str] = []
    memory_limit_MB: float = -1.0


class CommandStatus(StrEnum):
    """How a compiler or a program ended."""

    FINISHED = "Finished"
    ERROR = "Error"
    TIME_LIMIT_EXCEEDED = "TimeLimitExceeded"


class RunStatus(StrEnum):
    """Whether all went well, the code is to blame, or nobody knows what the code is worth."""

    SUCCESS = "Success"
    FAILED = "Failed"
    SANDBOX_ERROR = "SandboxError"


class CommandResult(msgspec.Struct, frozen=True):
    """What a compiler or a program did."""

    status: CommandStatus
    execution_time: float | None = None
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None


class RunCodeResponse(msgspec.Struct, frozen=True):
    """The answer. message: what there is to say beyond the results, for people. executor_pod_name: the sandbox."""

    status: RunStatus
    message: str
    compile_result: CommandResult | None = None
    run_result: CommandResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, bytes] = {}


def language_of(request: RunCodeRequest) -> str:
    """What the language of a request is called here."""
    return LANGUAGES.get(request.language, request.language)


def answer(
    result: CodeResult, sandbox_id: str = "", files: dict[str, bytes] | None = None, problems: list[str] | None = None
) -> RunCodeResponse:
    """The answer for code that was run. problems: with the files that were asked for."""
    status = RunStatus.SUCCESS if result.is_success else RunStatus.FAILED
    remarks = [*_remarks("compiler", result.compiled), *_remarks("program", result.ran), *(problems or [])]
    return RunCodeResponse(
        status, "; ".join(remarks), _command(result.compiled), _command(result.ran), sandbox_id or None, files or {}
    )


def no_answer(problem: str, sandbox_id: str = "") -> RunCodeResponse:
    """The answer when it is not the code that is to blame."""
    return RunCodeResponse(RunStatus.SANDBOX_ERROR, problem, executor_pod_name=sandbox_id or None)


def _command(result: ExecResult | None) -> CommandResult | None:
    if result is None:
        return None
    is_late = result.outcome is Outcome.TIMEOUT
    return CommandResult(
        CommandStatus.TIME_LIMIT_EXCEEDED if is_late else CommandStatus.FINISHED,
        result.usage.wall_seconds,
        None if is_late else result.exit_code,
        result.stdout,
        result.stderr,
    )


def _remarks(what: str, result: ExecResult | None) -> list[str]:
    """Ends that an exit code does not tell."""
    if result is None or result.outcome in (Outcome.EXITED, Outcome.TIMEOUT):
        return []
    return [f"the {what} ended with {result.outcome}"]
