"""Compressed streams by their first bytes, and streams that know the hash of what was read from them."""

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hone.sandbox.errors import ImageError
from hone.sandbox.files.beneath import BadArchive


@contextlib.contextmanager
def decompressed(file: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """What is in a file from where it stands on, gzip, bzip2, xz or zstd, or as it is. path: to name in errors."""
    begin = file.tell()
    magic = file.read(6)
    file.seek(begin)
    if magic.startswith(b"\x1f\x8b"):
        with gzip.open(file) as content:
            yield content  # type: ignore[misc]
    elif magic.startswith(b"BZh"):
        with bz2.open(file) as content:
            yield content  # type: ignore[misc]
    elif magic == b"\xfd7zXZ\0":
        with lzma.open(file) as content:
            yield content  # type: ignore[misc]
    elif magic.startswith(b"\x28\xb5\x2f\xfd"):
        with _by_program("zstd", file, path) as content:
            yield content
    else:
        yield file


@contextlib.contextmanager
def _by_program(program: str, file: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    if shutil.which(program) is None:
        raise ImageError(f"{path} is compressed with {program}, and there is no such program; install it")
    os.lseek(file.fileno(), file.tell(), os.SEEK_SET)  # a buffer has read ahead of what was asked for
    command = [program, "-dc"]
    with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process.stdout  # type: ignore[misc]
            process.stdout.close()
            if process.wait():
                said = process.stderr.read(1000).decode(errors="replace").strip()
                raise BadArchive(f"{path} is broken: {program} says: {said}")
        finally:
            process.kill()


class Hashed:
    """A stream that knows the hash of what was read from it."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self.digest.update(data)
        return data
