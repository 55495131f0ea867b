"""What a person reads when a sandbox cannot be had."""

import subprocess
import sys
from pathlib import Path

HONE = Path(sys.executable).with_name("hone")


def test_an_image_that_cannot_be_had_ends_with_one_readable_line() -> None:
    # An image of a registry: without a program that fetches it, or without such an image, or without cells at all.
    command = [HONE, "sandbox", "run", "localhost:1/nope", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
