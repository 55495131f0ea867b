"""Files that images are made from: regular ones, as what waits or has no end would hold a thread for ever."""

import os
import stat
from io import BufferedReader
from pathlib import Path

from hone.sandbox.errors import ImageError


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read; `ImageError` if it is a device, fifo, socket or folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError(f"image file {path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """A regular file's content."""
    with open_regular(path) as file:
        return file.read()
