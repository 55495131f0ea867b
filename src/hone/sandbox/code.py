"""Runs code of any language in a sandbox: files in, compiler, program, results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hone.sandbox.errors import SandboxError
from hone.sandbox.languages import Language, find_language
from hone.schema.sandboxes import ExecResult, Outcome

LOOK_SECONDS = 30.0
LACKS_IT = 3


class Box(Protocol):
    """What a sandbox must be able to do for code to run in it."""

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        timeout_seconds: float = 60.0,
        kept_bytes: int = 64 << 10,
    ) -> ExecResult:
        """Run a program to its end."""

    async def write(self, path: str, data: bytes) -> None:
        """Put a file at a path."""


class ToolchainMissing(SandboxError):
    """The sandbox's image lacks the compiler or interpreter: nobody's answer. program: which."""

    def __init__(self, language: Language) -> None:
        hint = f"; put it into the image, in Debian with: {language.packages}" if language.packages else ""
        message = f"code in {language.name} needs the program {language.tool}, which this sandbox's image lacks{hint}"
        super().__init__(message, Outcome.POLICY_DENIED)
        self.program = language.tool


@dataclass(frozen=True, slots=True)
class CodeResult:
    """What became of code. compiled: of the compiler, None where there is none. ran: None where it did not compile."""

    language: Language
    compiled: ExecResult | None
    ran: ExecResult | None

    @property
    def is_success(self) -> bool:
        """Whether it compiled, ran, and ended by itself with exit code 0."""
        return self.ran is not None and self.ran.is_success


async def run_code(
    box: Box,
    code: str,
    *,
    language: str | Language = "python",
    stdin: bytes = b"",
    files: Mapping[str, bytes] | None = None,
    compile_timeout_seconds: float = 30.0,
    run_timeout_seconds: float = 10.0,
    kept_bytes: int = 64 << 10,
) -> CodeResult:
    """Compile code where its language wants that, and run it, in the working folder of a sandbox.

    box: a `Sandbox`, fresh for each code that shall not meet what other code left behind. files: by path, written before.
    kept_bytes: of each of stdout and stderr, half of it from the beginning and half from the end.

    What the code does wrong is in the result. A language that is not known is a `ValueError`, a compiler or interpreter
    that the image lacks is `ToolchainMissing`, and other trouble of the infrastructure another `SandboxError`.
    """
    chosen = find_language(language) if isinstance(language, str) else language
    await _require(box, chosen)
    for path, data in (files or {}).items():
        await box.write(path, data)
    await box.write(chosen.file, code.encode("utf-8", "surrogatepass"))
    env = dict(chosen.env)
    compiled = None
    if chosen.compile:
        compiled = await box.exec(
            chosen.compile, env=env, timeout_seconds=compile_timeout_seconds, kept_bytes=kept_bytes
        )
        if not compiled.is_success:
            return CodeResult(chosen, compiled, None)
    ran = await box.exec(chosen.run, stdin=stdin, env=env, timeout_seconds=run_timeout_seconds, kept_bytes=kept_bytes)
    return CodeResult(chosen, compiled, ran)


async def _require(box: Box, language: Language) -> None:
    """Look for the toolchain before any of the code has run, which could make it disappear.

    An image without a shell cannot be asked; what is missing there shows as the exit code 127.
    """
    look = ["sh", "-c", f'command -v "$1" >/dev/null || exit {LACKS_IT}', "sh", language.tool]
    if (await box.exec(look, timeout_seconds=LOOK_SECONDS)).exit_code == LACKS_IT:
        raise ToolchainMissing(language)
