"""A wheel of the package: with the programs of sandboxes where there is a compiler, and of use without one either way."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE = """
import asyncio, sys
from hone.sandbox.client import Sandbox
from hone.sandbox.native.build import prebuilt_folder

async def main():
    async with Sandbox(memory_mb=128, disk_mb=16, network="off") as box:
        await box.write("given", b"6")
        print(prebuilt_folder() is not None, (await box.exec(["sh", "-c", "cat given; echo ' * 7'"])).stdout.strip())
        print((await box.snippet("print(6 * 7)")).stdout.strip())

asyncio.run(main())
"""

pytestmark = [pytest.mark.slow, pytest.mark.network]


def build_wheel(folder: Path, path: str) -> Path:
    """As pip does it, in a place of its own; skipped where pip has nowhere to get the build backend from."""
    pip = [str(Path(sys.base_prefix, "bin", "python3")), "-m", "pip"]
    command = [*pip, "wheel", "--no-deps", "-q", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300,
                          env={**os.environ, "PATH": path})  # fmt: skip
    if done.returncode and ("hatchling" in done.stderr or "No module named pip" in done.stderr):
        pytest.skip(f"no pip, or no build backend to be had: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def path_without_compiler(folder: Path) -> str:
    """A PATH with what building and sandboxes need, and no C compiler."""
    folder.mkdir()
    for name in ("sh", "env", "git", "uname"):
        if (found := shutil.which(name)) is not None:
            (folder / name).symlink_to(found)
    return str(folder)


def use(wheel: Path, folder: Path, path: str) -> list[str]:
    """What sandboxes of the unpacked wheel have to say, with nothing of this source tree in reach."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        for member in archive.infolist():  # as pip does it
            if member.external_attr >> 16 & 0o111:
                (folder / member.filename).chmod(0o755)
    others = [one for one in sys.path if one.endswith("site-packages")]
    done = subprocess.run(
        [sys.executable, "-c", USE], capture_output=True, text=True, check=False, timeout=120, cwd="/",
        env={"PATH": path, "PYTHONPATH": ":".join([str(folder), *others]), "HOME": str(folder)},
    )  # fmt: skip
    if "Unsupported" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_wheel_with_programs_needs_no_compiler(tmp_path: Path) -> None:
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    wheel = build_wheel(tmp_path / "wheels", os.environ["PATH"])
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    assert use(wheel, tmp_path / "site", path_without_compiler(tmp_path / "bin")) == ["True 6 * 7", "42"]


def test_a_wheel_built_without_a_compiler_is_of_any_machine_and_falls_back_to_python(tmp_path: Path) -> None:
    path = path_without_compiler(tmp_path / "bin")
    wheel = build_wheel(tmp_path / "wheels", path)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert use(wheel, tmp_path / "site", path) == ["False 6 * 7", "42"]
