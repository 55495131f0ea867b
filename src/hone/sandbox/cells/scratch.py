"""Folders on this machine for sandboxes that have no file system of their own, and what crashes left of such."""

import os
import shutil
import tempfile
from pathlib import Path

from hone.sandbox.cells.cgroups import PREFIX, is_orphan, own_name


class Scratch:
    """A folder of this process's own below the temporary one, made at first use; what dead processes left goes then."""

    def __init__(self) -> None:
        self._folder: Path | None = None

    def path(self, name: str) -> Path:
        """Where a sandbox may make its folder."""
        if self._folder is None:
            sweep()
            folder = Path(tempfile.gettempdir()) / own_name()
            folder.mkdir(mode=0o711)
            self._folder = folder
        return self._folder / name

    def close(self) -> None:
        """Remove it."""
        if self._folder is not None:
            remove_tree(self._folder)


def sweep() -> None:
    """Remove what processes of this user that are no more left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if is_orphan(folder.name) and folder.lstat().st_uid == os.geteuid():
            remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours, in which some folders may not be written to."""
    for path, _, _ in os.walk(folder):
        Path(path).chmod(0o700)
    shutil.rmtree(folder)
