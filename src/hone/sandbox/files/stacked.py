"""Layers as the cell will see them, one over the other, without a mount: files that a build looks up in its base."""

import contextlib
import os
import posixpath
import stat
from collections.abc import Iterator, Sequence

from hone.sandbox.files.beneath import closing, open_beneath

MAX_FILE_BYTES = 64 << 20
MAX_LINKS = 16


class Stacked:
    """layers: folders of this machine, the first on top. Links lead to what they mean inside, never out."""

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = tuple(layers)

    def read(self, path: str) -> bytes | None:
        """The content of a regular file; None if there is none, or a longer one than anybody reads here."""
        for _ in range(MAX_LINKS):
            if (target := self.link(path)) is None:
                break
            path = posixpath.normpath(posixpath.join("/", posixpath.dirname(path), target))
        layer = self._layer_of(path)
        if layer is None:
            return None
        with self._opened(layer, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
            if descriptor is None or not stat.S_ISREG((status := os.fstat(descriptor)).st_mode):
                return None
            if status.st_size > MAX_FILE_BYTES:
                return None
            with os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read(MAX_FILE_BYTES)

    def link(self, path: str) -> str | None:
        """Where a symbolic link leads; None if there is none."""
        layer = self._layer_of(path)
        if layer is None:
            return None
        with self._opened(layer, path, os.O_PATH | os.O_NOFOLLOW) as descriptor:
            if descriptor is None or not stat.S_ISLNK(os.fstat(descriptor).st_mode):
                return None
            return os.readlink("", dir_fd=descriptor)

    def names(self, folder: str) -> list[str]:
        """What is in a folder, sorted; nothing if there is no folder."""
        found: set[str] = set()
        for layer in self._layers:
            with self._opened(layer, folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
                if descriptor is not None:
                    found.update(os.listdir(descriptor))  # noqa: PTH208 - of a descriptor
        return sorted(name for name in found if self._layer_of(f"{folder}/{name}") is not None)

    def _layer_of(self, path: str) -> str | None:
        """The topmost layer that has something at a path which none above it hides."""
        for layer in self._layers:
            with self._opened(layer, path, os.O_PATH | os.O_NOFOLLOW) as descriptor:
                if descriptor is not None:
                    return None if _is_whiteout(descriptor) else layer
            if self._hides(layer, posixpath.dirname(path)):
                return None
        return None

    def _hides(self, layer: str, folder: str) -> bool:
        """Whether a layer hides what lies below it in a folder: it or one above it is opaque, or no folder at all."""
        while folder not in ("", "/"):
            with self._opened(layer, folder, os.O_PATH | os.O_NOFOLLOW) as descriptor:
                if descriptor is not None and (
                    _is_opaque(descriptor) or not stat.S_ISDIR(os.fstat(descriptor).st_mode)
                ):
                    return True
            folder = posixpath.dirname(folder)
        return False

    @contextlib.contextmanager
    def _opened(self, layer: str, path: str, flags: int) -> Iterator[int | None]:
        with contextlib.ExitStack() as stack:
            descriptor = None
            with contextlib.suppress(OSError):
                root = stack.enter_context(closing(os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
                opened = open_beneath(root, path, flags, follows_links=False)
                descriptor = stack.enter_context(closing(opened))
            yield descriptor


def _is_whiteout(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return os.getxattr(f"/proc/self/fd/{descriptor}", "user.overlay.opaque") == b"y"
    return False
