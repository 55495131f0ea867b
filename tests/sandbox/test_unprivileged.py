"""The tests of cells once more, as a user without any powers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOBODY = 65534
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "test_abuse",
        "test_cells",
        "test_code",
        "test_files",
        "test_gateway_cells",
        "test_grading",
        "test_hoards",
        "test_hostile_agents",
        "test_hostile_python",
        "test_http",
        "test_layers",
        "test_network",
        "test_node",
        "test_ports",
        "test_prime",
        "test_python",
        "test_resume",
        "test_runtimes",
        "test_state",
        "test_observation",
        "test_images",
        "test_image_policy",
        "test_registries",
        "test_debian",
    ],
)
def test_cells_keep_their_promises_for_an_unprivileged_user(module: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("this is an unprivileged user already")
    python = python_for_all()
    if python is None or shutil.which("setpriv") is None:
        pytest.skip("no setpriv, or no Python of this version that others may run")
    home = Path("/tmp") / f"hone-test-nobody-{os.getpid()}"
    home.mkdir(mode=0o700)
    os.chown(home, NOBODY, NOBODY)
    paths = [str(ROOT / "src"), *(path for path in sys.path if path.endswith("site-packages"))]
    try:
        done = subprocess.run(
            ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", python, "-m", "pytest", "-rs",
             "-m", "not slow and not gpu and not cluster and not network",
             "-p", "no:cacheprovider", f"--basetemp={home}/tests", f"tests/sandbox/{module}.py"],
            cwd=ROOT, env={"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": ":".join(paths),
                           "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(home)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def python_for_all() -> str | None:
    """A Python like this one that any user may start, also from itself: setpriv may yet reach what its user may not."""
    wanted = f"{sys.version_info[0]}.{sys.version_info[1]}"
    own = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print(*sys.version_info[:2], sep=\".\")'])"
    for python in (sys.executable, f"/usr/bin/python{wanted}", "/usr/bin/python3"):
        if Path(python).exists():
            command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", python, "-c", own]
            if subprocess.run(command, capture_output=True, text=True, check=False, cwd="/").stdout.strip() == wanted:
                return python
    return None
