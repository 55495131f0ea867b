"""Runs code of any language in a sandbox: files in, compiler, program, results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hone.sandbox.errors import SandboxError
from hone.sandbox.languages import Language, find_language
from hone.schema.sandboxes import ExecResult, Outcome

LOOK_SECONDS = 30.0
LACKS_IT = 3


class RunsPrograms(Protocol):
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


@dataclass(frozen=True, slots=True)
class Built:
    """Code that lies in a sandbox, compiled where its language wants that, to be run as often as one likes."""

    language: Language
    compiled: ExecResult | None

    @property
    def is_ready(self) -> bool:
        """Whether it can be run."""
        return self.compiled is None or self.compiled.is_success

    async def run(
        self, box: RunsPrograms, stdin: bytes = b"", *, timeout_seconds: float = 10.0, kept_bytes: int = 64 << 10
    ) -> ExecResult:
        """Run it in the sandbox in which it was built."""
        return await box.exec(
            self.language.run,
            stdin=stdin,
            env=dict(self.language.env),
            timeout_seconds=timeout_seconds,
            kept_bytes=kept_bytes,
        )


async def run_code(
    box: RunsPrograms,
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
    built = await build_code(
        box, code, language=language, files=files, timeout_seconds=compile_timeout_seconds, kept_bytes=kept_bytes
    )
    if not built.is_ready:
        return CodeResult(built.language, built.compiled, None)
    ran = await built.run(box, stdin, timeout_seconds=run_timeout_seconds, kept_bytes=kept_bytes)
    return CodeResult(built.language, built.compiled, ran)


async def build_code(
    box: RunsPrograms,
    code: str,
    *,
    language: str | Language = "python",
    files: Mapping[str, bytes] | None = None,
    timeout_seconds: float = 30.0,
    kept_bytes: int = 64 << 10,
) -> Built:
    """The first half of `run_code`: put code into a sandbox and compile it."""
    chosen = find_language(language) if isinstance(language, str) else language
    await _require(box, chosen)
    for path, data in (files or {}).items():
        await box.write(path, data)
    await box.write(chosen.file, code.encode("utf-8", "surrogatepass"))
    if not chosen.compile:
        return Built(chosen, None)
    compiled = await box.exec(
        chosen.compile, env=dict(chosen.env), timeout_seconds=timeout_seconds, kept_bytes=kept_bytes
    )
    return Built(chosen, compiled)


async def _require(box: RunsPrograms, language: Language) -> None:
    """Look for the toolchain before any of the code has run, which could make it disappear.

    An image without a shell cannot be asked; what is missing there shows as the exit code 127.
    """
    look = ["sh", "-c", f'command -v "$1" >/dev/null || exit {LACKS_IT}', "sh", language.tool]
    if (await box.exec(look, timeout_seconds=LOOK_SECONDS)).exit_code == LACKS_IT:
        raise ToolchainMissing(language)
