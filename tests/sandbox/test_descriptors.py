"""Room for the descriptors of many cells, in processes that begin with little of it."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from hone.sandbox.descriptors import provide, provide_for_cells
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(provide_for_cells(wanted), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "expected"),
    [
        (256, 4096, 100, "100 1056 4096"),  # raised as far as needed
        (256, 1056, 4096, "100 1056 1056"),  # and no further than allowed: fewer cells then
        (2048, 4096, 10, "10 2048 4096"),  # never lowered
        (64, 64, 10, "1 64 64"),
    ],
)
def test_the_limit_is_raised_and_says_how_many_cells_there_is_room_for(
    soft: int, hard: int, wanted: int, expected: str
) -> None:
    arguments = [sys.executable, "-c", CODE, str(soft), str(hard), str(wanted)]
    finished = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == expected
