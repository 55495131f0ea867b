"""Compiles the C sources on first use into a shared object kept in the user's cache folder, and loads it."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 120
# Contraction of a * b + c is what makes the sums fused; reassociation stays off, or the order would not be ours.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast")  # fmt: skip
MACHINE_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


class BuildError(RuntimeError):
    """There is no compiler, or it does not compile the kernels."""


def load(compilers: Sequence[str] = COMPILERS) -> ctypes.CDLL:
    """The kernels, compiled now if this machine has not compiled these sources before."""
    compiler = _find(compilers)
    name = f"kernels-{_key(compiler)}.so"
    try:
        return _kept(compiler, _cache_folder(), name)
    except OSError as error:
        logger.warning("cannot keep compiled kernels in the cache folder (%s); compiling for this process only", error)
    with tempfile.TemporaryDirectory() as temporary:
        _compile(compiler, Path(temporary), name)
        return ctypes.CDLL(str(Path(temporary) / name))


def _kept(compiler: Path, folder: Path, name: str) -> ctypes.CDLL:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / name).exists():
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError as error:
            logger.warning("the compiled kernels in the cache folder are broken (%s); compiling again", error)
    _compile(compiler, folder, name)
    return ctypes.CDLL(str(folder / name))


def _find(compilers: Sequence[str]) -> Path:
    for compiler in compilers:
        if found := shutil.which(compiler):
            return Path(found).resolve()
    raise BuildError(f"no C compiler found (looked for {', '.join(compilers)}); install gcc for the native kernels")


def _cache_folder() -> Path:
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "hone" / "native"
    try:
        return Path.home() / ".cache" / "hone" / "native"
    except RuntimeError as error:
        raise OSError(f"there is no home folder: {error}") from error


def _key(compiler: Path) -> str:
    """Changes with the sources, the flags, the compiler and the processor."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    status = compiler.stat()
    digest.update(repr((FLAGS, MACHINE_FLAGS, str(compiler), status.st_size, status.st_mtime_ns)).encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    described = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return described
    wanted = ("model name", "flags", "Features", "CPU part")
    return described + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: Path, folder: Path, name: str) -> None:
    """Written beside its place and renamed, so that processes that compile at once do not see half a file."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    handle, unfinished = tempfile.mkstemp(dir=folder, prefix=name, suffix=".tmp")
    os.close(handle)
    try:
        for machine_flags in MACHINE_FLAGS:
            command = [str(compiler), *FLAGS, *machine_flags, *sources, "-o", unfinished, "-lm"]
            complaint = _run(command)
            if complaint is None:
                Path(unfinished).replace(folder / name)
                return
            logger.info("%s does not compile the kernels with %s", compiler, " ".join(machine_flags) or "no flags")
        raise BuildError(f"{compiler} does not compile the native kernels: {complaint}")
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _run(command: list[str]) -> str | None:
    """None when it went well, otherwise the end of what the compiler said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"it took more than {COMPILE_SECONDS} seconds"
    return None if done.returncode == 0 else done.stderr.strip()[-2000:]
