from pathlib import Path

import pytest

from hone.sandbox.native.build import BuildError, build


def test_programs_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build()
    assert len(first.agent) < 16 << 10
    assert first.agent[:4] == b"\x7fELF"
    modified = first.spawner.stat().st_mtime_ns
    assert build() == first
    assert first.spawner.stat().st_mtime_ns == modified


def test_a_missing_compiler_is_named() -> None:
    with pytest.raises(BuildError, match="no-such-compiler"):
        build(["no-such-compiler"])
