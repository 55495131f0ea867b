"""Compiles spawner, agent and the library of warm Pythons on first use into the user's cache folder."""

import errno
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
PREBUILT = "built"
"""The folder beside the sources in which a wheel has them compiled."""
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 60
FLAGS = ("-O2", "-std=gnu11", "-s", "-static")
# The agent has no libc, and nothing may call for one.
AGENT_FLAGS = ("-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pie", "-no-pie",
               "-fno-tree-loop-distribute-patterns", "-Wl,--build-id=none", "-Wl,-z,noseparate-code")  # fmt: skip
LIBRARY_FLAGS = ("-O2", "-std=gnu11", "-s", "-shared", "-fPIC")


PASSING = tuple(
    os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.EMFILE)
)


class BuildError(RuntimeError):
    """There is no compiler, or it does not compile the programs. is_passing: it may well do so another time."""

    def __init__(self, message: str, *, is_passing: bool = False) -> None:
        super().__init__(message)
        self.is_passing = is_passing


@dataclass(frozen=True, slots=True)
class Programs:
    """Where spawner and agent lie, the agent's content, and where the library of warm Pythons lies."""

    spawner: Path
    agent_path: Path
    agent: bytes
    warm: Path


def build(compilers: Sequence[str] = COMPILERS) -> Programs:
    """All of them: those that came with the package, or compiled now if this machine has not compiled these sources before.

    Raises `BuildError`.
    """
    if (folder := prebuilt_folder()) is None:
        compiler = _find(compilers)
        folder = cache_folder() / f"cells-{_key(compiler)}"
        if not (folder / "agent").exists():
            _compile_into(compiler, folder)
    agent = folder / "agent"
    return Programs(folder / "spawner", agent, agent.read_bytes(), folder / "warm.so")


def prebuilt_folder() -> Path | None:
    """Where those lie that came with the package, if they are of these very sources and this kind of machine."""
    folder = SOURCES / PREBUILT
    try:
        is_fitting = (folder / "key").read_text() == _content_key()
    except OSError:
        return None
    return folder if is_fitting and os.access(folder / "spawner", os.X_OK) else None


def can_build() -> bool:
    """Whether they are there, or there is a compiler."""
    return prebuilt_folder() is not None or any(shutil.which(compiler) for compiler in COMPILERS)


def compile_for_wheel(parent: Path) -> Path:
    """Compile all of them into a new folder in `parent`, with what says of which sources they are. Raises `BuildError`."""
    folder = parent / PREBUILT
    _compile_into(_find(COMPILERS), folder)
    (folder / "key").write_text(_content_key())
    return folder


def cache_folder() -> Path:
    """The user's, or one for this user beneath the temporary folder where there is no home to write to.

    As `hone.sandbox.cache`, which this module cannot import: the build of the wheel loads it alone.
    """
    wanted = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(wanted) if wanted else Path.home() / ".cache") / "hone" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError):
        fallback = Path(tempfile.gettempdir()) / f"hone-native-{os.getuid()}"
        fallback.mkdir(mode=0o700, exist_ok=True)
        status = fallback.stat(follow_symlinks=False)
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise BuildError(f"{fallback} is not this user's alone; set XDG_CACHE_HOME") from None
        return fallback


def _find(compilers: Sequence[str]) -> Path:
    for compiler in compilers:
        if found := shutil.which(compiler):
            return Path(found).resolve()
    raise BuildError(f"no C compiler found (looked for {', '.join(compilers)})")


def _key(compiler: Path) -> str:
    """Changes with the sources, the flags and the compiler."""
    status = compiler.stat()
    compiled_by = repr((str(compiler), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(f"{_content_key()} {compiled_by}".encode()).hexdigest()[:24]


def _content_key() -> str:
    """Changes with the sources, the flags and the kind of machine."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(repr((FLAGS, AGENT_FLAGS, LIBRARY_FLAGS, platform.machine())).encode())
    return digest.hexdigest()[:24]


def _compile_into(compiler: Path, folder: Path) -> None:
    """Compiled beside its place and renamed, so that processes that compile at once do not see half of it."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / "programs"
        unfinished.mkdir()
        for name, flags in (("spawner", FLAGS), ("agent", (*FLAGS, *AGENT_FLAGS))):
            _compile(compiler, [*flags, str(SOURCES / f"{name}.c"), "-o", str(unfinished / name)])
        _compile(compiler, [*LIBRARY_FLAGS, str(SOURCES / "warm.c"), "-o", str(unfinished / "warm.so")])
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / "agent").exists():
                raise


def _compile(compiler: Path, arguments: list[str]) -> None:
    try:
        done = subprocess.run(
            [str(compiler), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler} takes more than {COMPILE_SECONDS} seconds", is_passing=True) from error
    if done.returncode:
        said = done.stderr.strip()[-2000:]
        is_killed = done.returncode < 0 or "Killed" in said
        raise BuildError(
            f"{compiler} does not compile the programs of cells: {said}",
            is_passing=is_killed or any(problem in said for problem in PASSING),
        )
