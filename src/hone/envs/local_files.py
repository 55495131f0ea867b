"""Files of a local sandbox, reached below its working folder whatever links its programs put in the way."""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path


def parts_of(path: str) -> list[str]:
    """The names in a path, `ValueError` for one that could lead out of the working folder."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError(f"path {path!r} in a sandbox; use one relative to its working folder, without '..'")
    return parts


@contextlib.contextmanager
def _folder(root: Path, parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder below `root`, reached without following a symbolic link."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def _file(root: Path, parts: Sequence[str], flags: int, *, make: bool = False) -> Iterator[int]:
    """A descriptor of a regular file; a fifo or a device cannot make the caller wait."""
    if not parts:
        raise IsADirectoryError("the working folder is not a file")
    with _folder(root, parts[:-1], make=make) as folder:
        file = os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(f"{'/'.join(parts)} is not a regular file")
        yield file
    finally:
        os.close(file)


def read_file(root: Path, parts: Sequence[str], max_bytes: int) -> bytes:
    """As `Sandbox.read`."""
    with _file(root, parts, os.O_RDONLY) as file, open(file, "rb", closefd=False) as reader:
        data = reader.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{'/'.join(parts)} is longer than {max_bytes} bytes; read it with a larger max_bytes")
    return data


def write_file(root: Path, parts: Sequence[str], data: bytes) -> None:
    """As `Sandbox.write`."""
    with _file(root, parts, os.O_WRONLY | os.O_CREAT, make=True) as file, open(file, "wb", closefd=False) as writer:
        writer.truncate(0)
        writer.write(data)


def list_folder(root: Path, parts: Sequence[str]) -> tuple[str, ...]:
    """As `Sandbox.list`."""
    with _folder(root, parts) as folder, os.scandir(folder) as entries:
        names = [f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries]
    return tuple(sorted(names))
