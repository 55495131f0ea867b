"""Copies a layer of an overlay, with its marks for what it hides of those below, into another one or over it."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hone.sandbox.files.beneath import FOLDER, NEW_FILE, LimitExceeded, closing, reopen_regular, status_of

OPAQUE = "user.overlay.opaque"
OWN = "user.overlay."
MAX_DEPTH = 200
MAX_ENTRIES = 1_000_000
COPY_BYTES = 16 << 20


def copy_layer(source: int, target: int, first_id: int = 0, below: Sequence[int] = ()) -> None:
    """Make the folder `target` what an overlay shows of it below the folder `source`, and still a layer itself.

    Both are descriptors; the target is nobody else's. The source's programs may have made anything and may be changing
    it: nothing but regular files and folders is opened, and links are copied as links. Sockets are left out; holes stay
    holes. first_id: the id that owns what root owns, which the target's shall not have. below: the folders that will lie
    below the target; marks are kept for what is in one of them, as an overlay shows other marks as files. Blocks.

    Raises `OSError`, of the kernel (a full disk, for one), `LimitExceeded`, or `NotRegular` for a file that a lease holds.
    """
    with closing(os.open(".", FOLDER, dir_fd=source)) as folder, closing(os.open(".", FOLDER, dir_fd=target)) as into:
        copying = _Copying(into, first_id)
        copying.folder(folder, into, "", 1, below)
        copying.finish_folder(folder, into)


def drop_marks(layer: int) -> None:
    """Remove what an overlay would take for its own marks from a layer that programs wrote without one above it.

    layer: a descriptor of its folder, in which nothing changes meanwhile. Blocks. Raises `OSError` as `copy_layer` does.
    """
    with closing(os.open(".", FOLDER, dir_fd=layer)) as folder:
        _drop_mark(f"/proc/self/fd/{folder}/.")
        _drop_marks_in(folder, 1)


@contextlib.contextmanager
def open_folders(paths: Iterable[str]) -> Iterator[list[int]]:
    """Descriptors of folders."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(closing(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))) for path in paths]


@dataclass(slots=True)
class _Copying:
    root: int
    first_id: int
    links: dict[int, str] = field(default_factory=dict)
    num_entries: int = 0

    def folder(self, source: int, target: int, path: str, depth: int, below: Sequence[int]) -> None:
        if depth > MAX_DEPTH:
            raise LimitExceeded(f"the folder {path[-200:]} is the {depth}th inside one another; {MAX_DEPTH} go")
        for name in os.listdir(source):
            self.num_entries += 1
            if self.num_entries > MAX_ENTRIES:
                raise LimitExceeded(f"the layer has more than {MAX_ENTRIES} files and folders")
            with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                self.entry(source, target, name, f"{path}{name}", depth, below)

    def entry(self, source: int, target: int, name: str, path: str, depth: int, below: Sequence[int]) -> None:
        with closing(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)) as located:
            status = os.fstat(located)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFDIR:
                with closing(os.open(".", FOLDER, dir_fd=located)) as inner:
                    self.inner_folder(inner, target, name, path, depth, below)
            elif kind == stat.S_IFREG:
                _clear(target, name)
                self.file(located, status, target, name, path)
            elif kind == stat.S_IFLNK:
                _clear(target, name)
                os.symlink(os.readlink("", dir_fd=located), name, dir_fd=target)
                self.own(status, name, target)
            elif kind == stat.S_IFIFO:
                _clear(target, name)
                os.mkfifo(name, status.st_mode & 0o777, dir_fd=target)
                self.own(status, name, target)
            elif kind == stat.S_IFCHR and status.st_rdev == 0:
                _clear(target, name)
                if any(status_of(folder, name) is not None for folder in below):
                    os.mknod(name, stat.S_IFCHR, 0, dir_fd=target)

    def inner_folder(self, inner: int, target: int, name: str, path: str, depth: int, below: Sequence[int]) -> None:
        old = status_of(target, name)
        is_new = old is None or not stat.S_ISDIR(old.st_mode)
        hides = _is_opaque(inner) or (old is not None and is_new)
        if hides:
            _clear(target, name)
            is_new = True
        if is_new:
            os.mkdir(name, 0o700, dir_fd=target)
        with closing(os.open(name, FOLDER, dir_fd=target)) as into:
            if hides:
                os.setxattr(into, OPAQUE, b"y")
            with contextlib.ExitStack() as stack:
                seen = [] if _is_opaque(into) else [stack.enter_context(one) for one in _folders(below, name)]
                self.folder(inner, into, f"{path}/", depth + 1, seen)
            self.finish_folder(inner, into)

    def finish_folder(self, source: int, target: int) -> None:
        status = os.fstat(source)
        _copy_attributes(source, target)
        self.own(status, target)
        os.fchmod(target, stat.S_IMODE(status.st_mode))
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def file(self, located: int, status: os.stat_result, target: int, name: str, path: str) -> None:
        if status.st_nlink > 1 and (known := self.links.get(status.st_ino)) is not None:
            os.link(known, name, src_dir_fd=self.root, dst_dir_fd=target, follow_symlinks=False)
            return
        with (
            closing(reopen_regular(located, os.O_RDONLY, path)) as source,
            closing(os.open(name, NEW_FILE, 0o600, dir_fd=target)) as into,
        ):
            _copy_content(source, into, status.st_size)
            _copy_attributes(source, into)
            self.own(status, into)
            os.fchmod(into, stat.S_IMODE(status.st_mode) & 0o777)
            os.utime(into, ns=(status.st_atime_ns, status.st_mtime_ns))
        if status.st_nlink > 1:
            self.links[status.st_ino] = path

    def own(self, status: os.stat_result, what: int | str, folder: int | None = None) -> None:
        if self.first_id:
            uid, gid = status.st_uid - self.first_id, status.st_gid - self.first_id
            os.chown(what, uid, gid, dir_fd=folder, follow_symlinks=isinstance(what, int))


def _copy_content(source: int, target: int, size: int) -> None:
    os.ftruncate(target, size)
    position = 0
    while position < size:
        try:
            position = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                return
            raise
        end = min(size, os.lseek(source, position, os.SEEK_HOLE))
        os.lseek(target, position, os.SEEK_SET)
        while position < end:
            copied = os.sendfile(target, source, position, min(end - position, COPY_BYTES))
            if not copied:  # it became shorter meanwhile
                return
            position += copied


def _copy_attributes(source: int, target: int) -> None:
    with contextlib.suppress(OSError):  # where there are none
        for name in os.listxattr(source):
            if name.startswith("user.") and not name.startswith(OWN):
                os.setxattr(target, name, os.getxattr(source, name))


def _drop_marks_in(folder: int, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise LimitExceeded(f"the layer has a {depth}th folder inside one another; {MAX_DEPTH} go")
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_folder or entry.is_file(follow_symlinks=False):  # others have none
                _drop_mark(f"/proc/self/fd/{folder}/{entry.name}")
            if is_folder:
                with closing(os.open(entry.name, FOLDER, dir_fd=folder)) as inner:
                    _drop_marks_in(inner, depth + 1)


def _drop_mark(path: str) -> None:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return
        raise
    for name in names:
        if name.startswith(OWN):
            os.removexattr(path, name, follow_symlinks=False)


def _is_opaque(folder: int) -> bool:
    try:
        return os.getxattr(folder, OPAQUE) == b"y"
    except OSError:
        return False


def _folders(below: Sequence[int], name: str) -> Iterator[contextlib.AbstractContextManager[int]]:
    for folder in below:
        with contextlib.suppress(OSError):  # there is none
            yield closing(os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder))


def _clear(folder: int, name: str) -> None:
    """Remove what an earlier layer had there."""
    old = status_of(folder, name)
    if old is None:
        return
    if stat.S_ISDIR(old.st_mode):
        shutil.rmtree(name, dir_fd=folder)
    else:
        os.unlink(name, dir_fd=folder)
