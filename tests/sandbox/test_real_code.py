"""Public code in cells: canonical solutions pass their tests and stubs do not, by command and in a forked interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hone.sandbox.cells.host import look
from public_data import ABSENT, DATA

ROOT = Path(__file__).parents[2]
NUM_ALL = 164 + 974

pytestmark = [
    pytest.mark.skipif(not (DATA / "humaneval").exists(), reason=ABSENT),
    pytest.mark.skipif(not look().has_user_namespaces, reason="no user namespaces"),
]


def measured(*words: str, timeout: float) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "sandbox_real_code.py"), *words],
        capture_output=True,
        check=False,
        timeout=timeout,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_all_are_told_apart(figures: dict, num_programs: int) -> None:
    assert figures["num_programs"] == num_programs
    for side in ("plain", "exec", "snippet"):
        assert figures[side]["solutions_not_passed"] == []
        assert figures[side]["stubs_not_failed"] == []
        assert figures[side]["solutions_passed"] == figures[side]["stubs_failed"] == num_programs


def test_a_sample_of_forty_solutions_passes_and_their_stubs_fail():
    every = NUM_ALL // 40
    assert_all_are_told_apart(measured("--every", str(every), timeout=300), len(range(0, NUM_ALL, every)))


@pytest.mark.slow
def test_all_solutions_pass_and_all_stubs_fail():
    assert_all_are_told_apart(measured(timeout=3600), NUM_ALL)
