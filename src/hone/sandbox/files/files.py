"""The files of a sandbox, for those outside it: read, write, list, remove, and whole trees in and out."""

import asyncio
import contextlib
import errno
import os
import posixpath
import secrets
import stat
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar, cast

from hone.sandbox.errors import SandboxError
from hone.sandbox.files.archives import NUM_NAMED, Budget, Packing, TreeLimits, Unpacking
from hone.sandbox.files.beneath import (
    FOLDER,
    NEW_FILE,
    DiskFull,
    FileProblem,
    LimitExceeded,
    Owner,
    acting_as,
    closing,
    kind_of,
    make_folders,
    names_in,
    open_beneath,
    read_up_to,
    reopen_regular,
    status_of,
    write_all,
)
from hone.schema.sandboxes import FileEntry, Transfer

P = ParamSpec("P")
R = TypeVar("R")

READ_BYTES = 16 << 20
OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # shortages of the node's, which no sandbox is to hear of as its own
SPOOL_BYTES = 16 << 20


class Tree:
    """The files beneath a root descriptor, which the programs inside may change at any moment.

    root: of a folder; the tree keeps a copy of it. owner: whom files that are made belong to, and whose rights hold; this
    process's own by default. folder: where relative paths start.

    Paths mean what they mean to a program inside: links and `..` are followed and never lead out of the root. Only
    regular files and folders are ever opened. Raises the `OSError` of the kernel (`FileNotFoundError`,
    `PermissionError`, ...) or a `FileProblem`, and `ValueError` for a path that names nothing. All of it blocks, for as
    long as the disk takes.
    """

    def __init__(self, root: int, owner: Owner | None = None, folder: str = "/") -> None:
        self._root = os.dup(root)
        self._owner = owner
        self._folder = folder
        self._lock = threading.Lock()
        self._num_uses = 1  # the tree itself, until it is closed
        self._is_closed = False

    def read(self, path: str, max_bytes: int = READ_BYTES) -> bytes:
        """A regular file's content, if it is no longer than `max_bytes`."""
        with (
            self._access() as root,
            closing(open_beneath(root, self._absolute(path), os.O_PATH)) as located,
            closing(reopen_regular(located, os.O_RDONLY, path)) as descriptor,
        ):
            if os.fstat(descriptor).st_size > max_bytes:
                raise LimitExceeded(f"{path} is longer than {max_bytes} bytes")
            data = read_up_to(descriptor, max_bytes + 1)
        if len(data) > max_bytes:  # it grew, or its size is not told
            raise LimitExceeded(f"{path} is longer than {max_bytes} bytes")
        return data

    def write(self, path: str, data: bytes | memoryview, mode: int | None = None) -> None:
        """Put a new file at a path, with the folders above it; readers see the old one or the new one, whole.

        What was there before, be it a link or a file with other names, is replaced and not written through. mode:
        permissions; by default those of the file that was there, or 0o644.
        """
        with self._access() as root, self._parent(root, path, makes_folders=True) as (parent, name):
            old = status_of(parent, name)
            if old is not None and stat.S_ISDIR(old.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if mode is None:
                mode = stat.S_IMODE(old.st_mode) if old is not None and stat.S_ISREG(old.st_mode) else 0o644
            unfinished = f".hone-{secrets.token_hex(8)}"
            descriptor = os.open(unfinished, NEW_FILE, 0o600, dir_fd=parent)
            try:
                with closing(descriptor):
                    write_all(descriptor, data)
                    os.fchmod(descriptor, mode & 0o777)
                os.rename(unfinished, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:  # a cancellation too: undo, then pass it on
                with contextlib.suppress(OSError):
                    os.unlink(unfinished, dir_fd=parent)
                raise

    def list(self, path: str = ".", max_entries: int = 10_000) -> tuple[FileEntry, ...]:
        """What is in a folder, sorted by name."""
        with self._access() as root, closing(open_beneath(root, self._absolute(path), FOLDER)) as folder:
            entries = []
            for name in names_in(folder, max_entries, path):
                if (status := status_of(folder, name)) is not None:
                    entries.append(_entry(name, status))
            return tuple(entries)

    def stat(self, path: str, *, follows_links: bool = True) -> FileEntry:
        """What is at a path. follows_links: tell of a link's target rather than of the link."""
        flags = os.O_PATH | (0 if follows_links else os.O_NOFOLLOW)
        with self._access() as root, closing(open_beneath(root, self._absolute(path), flags)) as located:
            return _entry(posixpath.basename(path.rstrip("/")), os.fstat(located))

    def make_folder(self, path: str) -> None:
        """Make a folder and those above it; harmless where there is one."""
        with self._access() as root, closing(make_folders(root, self._absolute(path))):
            pass

    def remove(self, path: str, *, is_recursive: bool = False, limits: TreeLimits = TreeLimits()) -> None:
        """Remove a file or link, or a folder if it is empty or the removal is recursive.

        Other file systems below it are an error of the kernel; what was removed until then is gone.
        """
        with self._access() as root, self._parent(root, path) as (parent, name):
            status = status_of(parent, name)
            if status is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=parent)
                return
            if is_recursive:
                _empty(parent, name, Budget(limits), depth=1)
            os.rmdir(name, dir_fd=parent)

    def pack(self, path: str, into: BinaryIO, limits: TreeLimits = TreeLimits()) -> Transfer:
        """Write a folder's content, or one file, as a tar archive.

        Links are packed as links. Devices, fifos, sockets, the kernel's file systems and files that a program holds by a
        lease are left out. A file that changes meanwhile has the length that it had when it was opened.
        """
        with (
            self._access() as root,
            closing(open_beneath(root, self._absolute(path), os.O_PATH)) as located,
            tarfile.open(fileobj=into, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            packing = Packing(archive, Budget(limits))
            if stat.S_ISDIR(os.fstat(located).st_mode):
                with closing(os.open(".", FOLDER, dir_fd=located)) as folder:
                    packing.add_folder(folder, "", depth=1)
            else:
                packing.add_file(located, posixpath.basename(path.rstrip("/")))
            return packing.budget.transfer()

    def unpack(
        self,
        path: str,
        source: BinaryIO,
        limits: TreeLimits = TreeLimits(),
        *,
        is_confined: bool = False,
        takes_over: Callable[[int, str], bool] | None = None,
    ) -> Transfer:
        """Unpack a tar archive into a folder, which is made if there is none; what it has of the same name is replaced.

        Absolute names start at the folder; a name with `..` makes the archive bad. Set-id bits, owners and extended
        attributes are dropped, devices and fifos left out. An archive that is refused midway leaves what it had
        unpacked.

        is_confined: no link is followed on the way to a member, and a link that leads out of the folder is left out: for
        a folder whose later readers have another root. takes_over: is asked for every file that is no folder, with a
        descriptor of its folder and its name, and returns whether it has done what the member means.
        """
        with self._access() as root:
            with closing(make_folders(root, self._absolute(path))):
                pass
            unpacking = Unpacking(root, self._absolute(path), Budget(limits), is_confined, takes_over)
            with contextlib.closing(unpacking):
                return unpacking.run(source)

    def close(self) -> None:
        """Let go of the root once the operations under way have ended; later ones are refused."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self._release()

    @contextlib.contextmanager
    def _access(self) -> Iterator[int]:
        """The root, which stays open for as long, with this thread acting as the owner of the files."""
        with self._lock:
            if self._is_closed:
                raise FileNotFoundError(errno.ENOENT, "the sandbox of these files is closed")
            self._num_uses += 1
        try:
            with acting_as(self._owner):
                yield self._root
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, FileProblem):
                raise DiskFull(f"the sandbox's disk is full ({error})") from error
            if error.errno in OURS:
                raise SandboxError(f"the node has not enough for this: {error}") from error
            raise
        finally:
            self._release()

    def _release(self) -> None:
        with self._lock:
            self._num_uses -= 1
            is_last = self._num_uses == 0
        if is_last:
            os.close(self._root)

    def _absolute(self, path: str) -> str:
        if not path or "\0" in path:
            raise ValueError(f"the path {path!r} names nothing")
        return posixpath.join(self._folder, path)

    @contextlib.contextmanager
    def _parent(self, root: int, path: str, *, makes_folders: bool = False) -> Iterator[tuple[int, str]]:
        """A descriptor of the folder that a path's last name is in, and that name, which no link can turn elsewhere."""
        folder, name = posixpath.split(self._absolute(path).rstrip("/"))
        if name in ("", ".", ".."):
            raise ValueError(f"the path {path!r} does not end in a name")
        opened = make_folders(root, folder) if makes_folders else open_beneath(root, folder, os.O_PATH | os.O_DIRECTORY)
        with closing(opened) as parent:
            yield parent, name


class Files:
    """The files of a sandbox for an event loop: each operation of a `Tree` in one of the threads given.

    An operation whose caller is cancelled ends by itself; the tree stays open until then.
    """

    def __init__(self, tree: Tree, threads: Executor) -> None:
        self.tree = tree
        self._threads = threads

    async def read(self, path: str, max_bytes: int = READ_BYTES) -> bytes:
        """As `Tree.read`."""
        return await self._run(self.tree.read, path, max_bytes)

    async def write(self, path: str, data: bytes, mode: int | None = None) -> None:
        """As `Tree.write`."""
        await self._run(self.tree.write, path, data, mode)

    async def list(self, path: str = ".", max_entries: int = 10_000) -> tuple[FileEntry, ...]:
        """As `Tree.list`."""
        return await self._run(self.tree.list, path, max_entries)

    async def stat(self, path: str, *, follows_links: bool = True) -> FileEntry:
        """As `Tree.stat`."""
        return await self._run(lambda: self.tree.stat(path, follows_links=follows_links))

    async def make_folder(self, path: str) -> None:
        """As `Tree.make_folder`."""
        await self._run(self.tree.make_folder, path)

    async def remove(self, path: str, *, is_recursive: bool = False) -> None:
        """As `Tree.remove`."""
        await self._run(lambda: self.tree.remove(path, is_recursive=is_recursive))

    async def pack(self, path: str, into: BinaryIO, limits: TreeLimits = TreeLimits()) -> Transfer:
        """As `Tree.pack`."""
        return await self._run(self.tree.pack, path, into, limits)

    async def unpack(self, path: str, source: BinaryIO, limits: TreeLimits = TreeLimits()) -> Transfer:
        """As `Tree.unpack`."""
        return await self._run(self.tree.unpack, path, source, limits)

    async def upload(self, local: Path, path: str, limits: TreeLimits = TreeLimits()) -> Transfer:
        """Copy a local folder's content, or one local file, into a folder of the sandbox."""
        return await self._run(_copy_in, local, self.tree, path, limits)

    async def download(self, path: str, local: Path, limits: TreeLimits = TreeLimits()) -> Transfer:
        """Copy a folder's content, or one file, into a local folder, out of which none of what arrives leads."""
        return await self._run(_copy_out, self.tree, path, local, limits)

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))


def pack_local(local: Path, into: BinaryIO, limits: TreeLimits = TreeLimits()) -> Transfer:
    """As `Tree.pack`, of a local folder's content or of one local file. Blocks."""
    is_folder = local.is_dir()
    with _local_tree(local if is_folder else local.parent) as source:
        return source.pack("." if is_folder else local.name, into, limits)


def unpack_local(source: BinaryIO, local: Path, limits: TreeLimits = TreeLimits()) -> Transfer:
    """As `Tree.unpack`, into a local folder, out of which none of what arrives leads. Blocks."""
    local.mkdir(parents=True, exist_ok=True)
    with _local_tree(local) as target:
        return target.unpack(".", source, limits, is_confined=True)


def joined(packed: Transfer, unpacked: Transfer) -> Transfer:
    """What a tree that was packed and unpacked had in the end."""
    left_out = (packed.left_out + unpacked.left_out)[:NUM_NAMED]
    return Transfer(num_files=unpacked.num_files, num_bytes=unpacked.num_bytes, left_out=left_out)


def _copy_in(local: Path, tree: Tree, path: str, limits: TreeLimits) -> Transfer:
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        archive = cast(BinaryIO, spool)
        packed = pack_local(local, archive, limits)
        archive.seek(0)
        return joined(packed, tree.unpack(path, archive, limits))


def _copy_out(tree: Tree, path: str, local: Path, limits: TreeLimits) -> Transfer:
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        archive = cast(BinaryIO, spool)
        packed = tree.pack(path, archive, limits)
        archive.seek(0)
        return joined(packed, unpack_local(archive, local, limits))


@contextlib.contextmanager
def _local_tree(folder: Path) -> Iterator[Tree]:
    with closing(os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        tree = Tree(root)
    with contextlib.closing(tree):
        yield tree


def _entry(name: str, status: os.stat_result) -> FileEntry:
    return FileEntry(
        name=os.fsencode(name).decode(errors="replace"),
        kind=kind_of(status.st_mode),
        size_bytes=status.st_size,
        mode=stat.S_IMODE(status.st_mode),
        modified_seconds=status.st_mtime,
    )


def _empty(parent: int, name: str, budget: Budget, depth: int) -> None:
    budget.check_depth(depth, name)
    with closing(os.open(name, FOLDER, dir_fd=parent)) as folder:
        while names := _some_names(folder):
            for inner in names:
                budget.count_entry()
                try:
                    os.unlink(inner, dir_fd=folder)
                except IsADirectoryError:
                    _empty(folder, inner, budget, depth + 1)
                    os.rmdir(inner, dir_fd=folder)
                except FileNotFoundError:
                    pass


def _some_names(folder: int) -> list[str]:
    os.lseek(folder, 0, os.SEEK_SET)
    with os.scandir(folder) as entries:
        return [entry.name for entry, _ in zip(entries, range(1000), strict=False)]
