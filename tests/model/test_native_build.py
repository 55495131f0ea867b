"""Compiling the native kernels: once, safely side by side, and without fuss where there is no compiler."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hone.model import ops
from hone.model.native import build, library

needs_compiler = pytest.mark.skipif(not library.available(), reason="needs a C compiler")
COMPILED = library.functions()._name if library.available() else ""
USE = (
    "import torch; from hone.model.native import kernels; assert kernels.available();"
    "print(kernels.linear(torch.ones(1, 3), torch.ones(2, 3)).tolist())"
)


def environment(cache: Path, path: str) -> dict[str, str]:
    source = str(Path(build.__file__).parents[3])
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PATH": path, "PYTHONPATH": source}


def copying_compiler(folder: Path) -> Path:
    """Gives out the kernels that are compiled already."""
    compiler = folder / "copying-cc"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp "{COMPILED}" "$2"\n')
    compiler.chmod(0o755)
    return compiler


def test_without_a_compiler_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C compiler found \(looked for nothing-like-cc\)"):
        build.load(("nothing-like-cc",))


def test_without_a_compiler_the_kernels_are_unavailable_and_nothing_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    library.functions.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not library.available.__wrapped__()
        with pytest.raises(ValueError, match=r"strict numerics need, .* install gcc"):
            ops.set_backend("native")
    finally:
        library.functions.cache_clear()
    assert "install gcc" in caplog.text


@needs_compiler
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no space for your vectors' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="no space for your vectors"):
        build.load((str(broken),))
    assert not list((tmp_path / "hone" / "native").iterdir())


@needs_compiler
def test_a_broken_file_in_the_cache_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = copying_compiler(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "hone" / "native"
    folder.mkdir(parents=True)
    (folder / f"kernels-{build._key(compiler)}.so").write_bytes(b"")
    assert build.load((str(compiler),)).hone_packed_size(3, 5) > 0
    assert "compiling again" in caplog.text


@pytest.mark.slow
@needs_compiler
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", USE],
            env=environment(tmp_path, os.environ["PATH"]),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0].strip() for process in processes]
    assert outputs == ["[[3.0, 3.0]]"] * 2
    assert [path.suffix for path in (tmp_path / "hone" / "native").iterdir()] == [".so"]


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hone").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = build.load((str(copying_compiler(tmp_path)),))
    assert loaded.hone_packed_size(3, 5) > 0
    assert "for this process only" in caplog.text


@needs_compiler
def test_what_was_compiled_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = copying_compiler(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load((str(compiler),))
    written = [path.stat().st_mtime_ns for path in (tmp_path / "hone" / "native").iterdir()]
    build.load((str(compiler),))
    assert [path.stat().st_mtime_ns for path in (tmp_path / "hone" / "native").iterdir()] == written


@pytest.mark.slow
@needs_compiler
def test_the_kernels_compile_for_a_plain_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc")
    assert compiler
    monkeypatch.setattr(build, "MACHINE_FLAGS", ((),))
    build._compile(Path(compiler), tmp_path, "plain.so")
    assert (tmp_path / "plain.so").stat().st_size > 0
