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
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from hone.sandbox.beneath import (
    KERNEL_FILE_SYSTEMS,
    BadArchive,
    DiskFull,
    FileProblem,
    LimitExceeded,
    Owner,
    acting_as,
    closing,
    file_system,
    kind_of,
    open_beneath,
    reopen_regular,
)
from hone.schema.sandboxes import FileEntry, Transfer

P = ParamSpec("P")
R = TypeVar("R")

READ_BYTES = 16 << 20
COPY_BYTES = 1 << 20
SPOOL_BYTES = 16 << 20
NUM_NAMED = 100
HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one operation on a tree takes at most; more is `LimitExceeded`.

    total_bytes: of all files as they are long, so that holes count. num_entries: files, folders and links.
    depth: folders inside one another.
    """

    total_bytes: int = 1 << 30
    num_entries: int = 100_000
    depth: int = 100


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
            data = _read_up_to(descriptor, max_bytes + 1)
        if len(data) > max_bytes:  # it grew, or its size is not told
            raise LimitExceeded(f"{path} is longer than {max_bytes} bytes")
        return data

    def write(self, path: str, data: bytes | memoryview, mode: int | None = None) -> None:
        """Put a new file at a path, with the folders above it; readers see the old one or the new one, whole.

        What was there before, be it a link or a file with other names, is replaced and not written through. mode:
        permissions; by default those of the file that was there, or 0o644.
        """
        with self._access() as root, self._parent(root, path, makes_folders=True) as (parent, name):
            old = _status(parent, name)
            if old is not None and stat.S_ISDIR(old.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if mode is None:
                mode = stat.S_IMODE(old.st_mode) if old is not None and stat.S_ISREG(old.st_mode) else 0o644
            unfinished = f".hone-{secrets.token_hex(8)}"
            descriptor = os.open(unfinished, _NEW_FILE, 0o600, dir_fd=parent)
            try:
                with closing(descriptor):
                    _write_all(descriptor, data)
                    os.fchmod(descriptor, mode & 0o777)
                os.rename(unfinished, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:  # a cancellation too: undo, then pass it on
                with contextlib.suppress(OSError):
                    os.unlink(unfinished, dir_fd=parent)
                raise

    def list(self, path: str = ".", max_entries: int = 10_000) -> tuple[FileEntry, ...]:
        """What is in a folder, sorted by name."""
        with self._access() as root, closing(open_beneath(root, self._absolute(path), _FOLDER)) as folder:
            entries = []
            for name in _names(folder, max_entries, path):
                if (status := _status(folder, name)) is not None:
                    entries.append(_entry(name, status))
            return tuple(entries)

    def stat(self, path: str, *, follows_links: bool = True) -> FileEntry:
        """What is at a path. follows_links: tell of a link's target rather than of the link."""
        flags = os.O_PATH | (0 if follows_links else os.O_NOFOLLOW)
        with self._access() as root, closing(open_beneath(root, self._absolute(path), flags)) as located:
            return _entry(posixpath.basename(path.rstrip("/")), os.fstat(located))

    def make_folder(self, path: str) -> None:
        """Make a folder and those above it; harmless where there is one."""
        with self._access() as root, closing(_make_folders(root, self._absolute(path))):
            pass

    def remove(self, path: str, *, is_recursive: bool = False, limits: Limits = Limits()) -> None:
        """Remove a file or link, or a folder if it is empty or the removal is recursive.

        Other file systems below it are an error of the kernel; what was removed until then is gone.
        """
        with self._access() as root, self._parent(root, path) as (parent, name):
            status = _status(parent, name)
            if status is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=parent)
                return
            if is_recursive:
                _empty(parent, name, _Budget(limits), depth=1)
            os.rmdir(name, dir_fd=parent)

    def pack(self, path: str, into: BinaryIO, limits: Limits = Limits()) -> Transfer:
        """Write a folder's content, or one file, as a tar archive.

        Links are packed as links. Devices, fifos, sockets and the kernel's file systems are left out. A file that
        changes meanwhile has the length that it had when it was opened.
        """
        with (
            self._access() as root,
            closing(open_beneath(root, self._absolute(path), os.O_PATH)) as located,
            tarfile.open(fileobj=into, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            packing = _Packing(archive, _Budget(limits))
            if stat.S_ISDIR(os.fstat(located).st_mode):
                with closing(os.open(".", _FOLDER, dir_fd=located)) as folder:
                    packing.add_folder(folder, "", depth=1)
            else:
                packing.add_file(located, posixpath.basename(path.rstrip("/")))
            return packing.budget.transfer()

    def unpack(
        self,
        path: str,
        source: BinaryIO,
        limits: Limits = Limits(),
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
            with closing(_make_folders(root, self._absolute(path))):
                pass
            unpacking = _Unpacking(root, self._absolute(path), _Budget(limits), is_confined, takes_over)
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
        opened = (
            _make_folders(root, folder) if makes_folders else open_beneath(root, folder, os.O_PATH | os.O_DIRECTORY)
        )
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

    async def pack(self, path: str, into: BinaryIO, limits: Limits = Limits()) -> Transfer:
        """As `Tree.pack`."""
        return await self._run(self.tree.pack, path, into, limits)

    async def unpack(self, path: str, source: BinaryIO, limits: Limits = Limits()) -> Transfer:
        """As `Tree.unpack`."""
        return await self._run(self.tree.unpack, path, source, limits)

    async def upload(self, local: Path, path: str, limits: Limits = Limits()) -> Transfer:
        """Copy a local folder's content, or one local file, into a folder of the sandbox."""
        return await self._run(_copy_in, local, self.tree, path, limits)

    async def download(self, path: str, local: Path, limits: Limits = Limits()) -> Transfer:
        """Copy a folder's content, or one file, into a local folder, out of which none of what arrives leads."""
        return await self._run(_copy_out, self.tree, path, local, limits)

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _copy_in(local: Path, tree: Tree, path: str, limits: Limits) -> Transfer:
    is_folder = local.is_dir()
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        with _local_tree(local if is_folder else local.parent) as source:
            packed = source.pack("." if is_folder else local.name, spool, limits)  # type: ignore[arg-type]
        spool.seek(0)
        return _joined(packed, tree.unpack(path, spool, limits))  # type: ignore[arg-type]


def _copy_out(tree: Tree, path: str, local: Path, limits: Limits) -> Transfer:
    local.mkdir(parents=True, exist_ok=True)
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        packed = tree.pack(path, spool, limits)  # type: ignore[arg-type]
        spool.seek(0)
        with _local_tree(local) as target:
            return _joined(packed, target.unpack(".", spool, limits, is_confined=True))  # type: ignore[arg-type]


def _joined(packed: Transfer, unpacked: Transfer) -> Transfer:
    left_out = (packed.left_out + unpacked.left_out)[:NUM_NAMED]
    return Transfer(num_files=unpacked.num_files, num_bytes=unpacked.num_bytes, left_out=left_out)


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


def _status(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _names(folder: int, max_entries: int, path: str) -> list[str]:
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > max_entries:
                raise LimitExceeded(f"the folder {path} has more than {max_entries} names")
    return sorted(names)


def _read_up_to(descriptor: int, size: int) -> bytes:
    pieces = []
    while size > 0 and (piece := os.read(descriptor, min(size, COPY_BYTES))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _make_folders(root: int, path: str, *, follows_links: bool = True) -> int:
    """A descriptor of the folder at a path, made with those above it where there is none."""
    flags = os.O_PATH | os.O_DIRECTORY
    with contextlib.suppress(FileNotFoundError):
        return open_beneath(root, path, flags, follows_links=follows_links)
    names = [name for name in path.split("/") if name]
    folder = open_beneath(root, "/", flags)
    for number, name in enumerate(names, 1):
        reached = "/" + "/".join(names[:number])
        with closing(folder):
            try:
                folder = open_beneath(root, reached, flags, follows_links=follows_links)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=folder)
                folder = open_beneath(root, reached, flags, follows_links=follows_links)
    return folder


def _empty(parent: int, name: str, budget: "_Budget", depth: int) -> None:
    budget.check_depth(depth, name)
    with closing(os.open(name, _FOLDER, dir_fd=parent)) as folder:
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


@dataclass(slots=True)
class _Budget:
    """Counts what an operation has touched, and stops it at its limits."""

    limits: Limits
    num_files: int = 0
    num_bytes: int = 0
    num_entries: int = 0
    left_out: list[str] = field(default_factory=list)

    def count_entry(self) -> None:
        self.num_entries += 1
        if self.num_entries > self.limits.num_entries:
            raise LimitExceeded(f"the tree has more than {self.limits.num_entries} files and folders")

    def count_file(self, size: int) -> None:
        self.num_files += 1
        self.num_bytes += size
        if self.num_bytes > self.limits.total_bytes:
            raise LimitExceeded(f"the tree's files have more than {self.limits.total_bytes} bytes")

    def check_depth(self, depth: int, name: str) -> None:
        if depth > self.limits.depth:
            raise LimitExceeded(f"the folder {name[-200:]} is the {depth}th inside one another; {self.limits.depth} go")

    def leave_out(self, name: str) -> None:
        if len(self.left_out) < NUM_NAMED:
            self.left_out.append(os.fsencode(name).decode(errors="replace"))

    def transfer(self) -> Transfer:
        return Transfer(num_files=self.num_files, num_bytes=self.num_bytes, left_out=tuple(self.left_out))


class _Exactly:
    """A file of which exactly `size` bytes can be read; where the descriptor has fewer, zeros follow."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._rest = size

    def read(self, size: int) -> bytes:
        size = min(size, self._rest, COPY_BYTES)
        data = os.read(self._descriptor, size)
        self._rest -= size
        if len(data) < size:
            data += _read_up_to(self._descriptor, size - len(data))
        return data.ljust(size, b"\0")


class _Packing:
    """Adds what is in folders to an archive."""

    def __init__(self, archive: tarfile.TarFile, budget: _Budget) -> None:
        self.archive = archive
        self.budget = budget

    def add_folder(self, folder: int, path: str, depth: int) -> None:
        self.budget.check_depth(depth, path)
        if file_system(folder) in KERNEL_FILE_SYSTEMS:
            self.budget.leave_out(path)
            return
        for name in _names(folder, self.budget.limits.num_entries, path or "/"):
            try:
                located = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            except FileNotFoundError:
                continue
            with closing(located):
                self.add(folder, located, name, f"{path}{name}", depth)

    def add(self, folder: int, located: int, name: str, path: str, depth: int) -> None:
        status = os.fstat(located)
        if stat.S_ISDIR(status.st_mode):
            self.budget.count_entry()
            self.archive.addfile(_member(path, status, tarfile.DIRTYPE))
            with closing(os.open(".", _FOLDER, dir_fd=located)) as inner:
                self.add_folder(inner, f"{path}/", depth + 1)
        elif stat.S_ISLNK(status.st_mode):
            self.budget.count_entry()
            member = _member(path, status, tarfile.SYMTYPE)
            member.linkname = os.readlink("", dir_fd=located)
            self.archive.addfile(member)
        elif stat.S_ISREG(status.st_mode):
            self.add_file(located, path)
        else:
            self.budget.leave_out(path)

    def add_file(self, located: int, path: str) -> None:
        self.budget.count_entry()
        with closing(reopen_regular(located, os.O_RDONLY, path)) as descriptor:
            status = os.fstat(descriptor)
            self.budget.count_file(status.st_size)
            member = _member(path, status, tarfile.REGTYPE)
            member.size = status.st_size
            self.archive.addfile(member, _Exactly(descriptor, status.st_size))  # type: ignore[arg-type]


def _member(path: str, status: os.stat_result, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.type = kind
    member.mode = status.st_mode & 0o777
    member.mtime = int(status.st_mtime)
    return member


class _Bounded:
    """A stream of which no more is read than a tree within the limits can need, however its headers lie."""

    def __init__(self, source: BinaryIO, limits: Limits) -> None:
        self._source = source
        self._rest = limits.total_bytes + (limits.num_entries + 2) * 4096 + HEADER_BYTES

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self._rest -= len(data)
        if self._rest < 0:
            raise LimitExceeded("the archive is longer than the tree that it may hold")
        return data


class _Unpacking:
    """Makes the members of an archive, each through a descriptor of the folder that it goes to."""

    def __init__(
        self,
        root: int,
        folder: str,
        budget: _Budget,
        is_confined: bool,
        takes_over: Callable[[int, str], bool] | None,
    ) -> None:
        self.budget = budget
        self._root = root if not is_confined else open_beneath(root, folder, os.O_PATH | os.O_DIRECTORY)
        self._folder = folder if not is_confined else "/"
        self._is_confined = is_confined
        self._takes_over = takes_over
        self._parent: tuple[str, int] | None = None
        self._folder_modes: dict[str, int] = {}
        self._made: set[str] = set()

    def run(self, source: BinaryIO) -> Transfer:
        try:
            with tarfile.open(fileobj=_Bounded(source, self.budget.limits), mode="r|") as archive:  # type: ignore[call-overload]
                while (member := archive.next()) is not None:
                    self.make(archive, member)
                    archive.members.clear()  # or it remembers all of them
        except OSError:
            raise
        except (tarfile.TarError, ValueError, EOFError, OverflowError, LookupError, TypeError) as error:
            raise BadArchive(f"the archive is broken: {error}") from error
        for path, mode in reversed(self._folder_modes.items()):
            self.set_mode(path, mode)
        return self.budget.transfer()

    def make(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        names = [name for name in member.name.split("/") if name not in ("", ".")]
        if ".." in names or "\0" in member.name:
            raise BadArchive(f"the archive has a member {member.name[:200]!r}, which may lead anywhere")
        if not names:
            return
        self.budget.count_entry()
        self.budget.check_depth(len(names), member.name)
        path, name = "/".join(names), names[-1]
        parent = self.parent("/".join(names[:-1]))
        if member.isdir():
            self.make_folder(parent, name, path, member.mode)
        elif self._takes_over is not None and self._takes_over(parent, name):
            pass
        elif member.isreg():
            self.make_file(archive, member, parent, name)
            self._made.add(path)
        elif member.issym():
            self.make_link(member, parent, name, path)
        elif member.islnk():
            self.make_hard_link(member, parent, name, path)
        else:
            self.budget.leave_out(member.name)

    def parent(self, path: str) -> int:
        """A descriptor of a folder, made where there is none; members of one folder mostly follow one another."""
        if self._parent is None or self._parent[0] != path:
            self.forget_parent()
            absolute = posixpath.join(self._folder, path)
            self._parent = (path, _make_folders(self._root, absolute, follows_links=not self._is_confined))
        return self._parent[1]

    def forget_parent(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def make_folder(self, parent: int, name: str, path: str, mode: int) -> None:
        old = _status(parent, name)
        if old is not None and not stat.S_ISDIR(old.st_mode):
            if stat.S_ISLNK(old.st_mode) and not self._is_confined:
                return  # a link to a folder, as /lib often is, stays one
            os.unlink(name, dir_fd=parent)
            old = None
        if old is None:
            os.mkdir(name, 0o755, dir_fd=parent)
        self._folder_modes[path] = mode & 0o1777

    def set_mode(self, path: str, mode: int) -> None:
        absolute = posixpath.join(self._folder, path)
        try:
            folder = open_beneath(self._root, absolute, _FOLDER, follows_links=not self._is_confined)
        except (FileNotFoundError, NotADirectoryError):
            return  # the programs inside have removed or replaced it meanwhile
        with closing(folder):
            os.fchmod(folder, mode)

    def make_file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: str) -> None:
        if member.size < 0:
            raise BadArchive(f"the archive's member {member.name[:200]!r} has {member.size} bytes")
        self.budget.count_file(member.size)
        content = archive.extractfile(member)
        assert content is not None, "a regular member has content"
        with closing(_new_file(parent, name)) as descriptor:
            rest = member.size
            while rest > 0:
                data = content.read(min(rest, COPY_BYTES))
                if not data:
                    raise BadArchive(f"the archive ends within {member.name[:200]!r}")
                _write_all(descriptor, data)
                rest -= len(data)
            os.fchmod(descriptor, member.mode & 0o777)
            os.utime(descriptor, (0, min(max(float(member.mtime), 0.0), 2.0**33)))

    def make_link(self, member: tarfile.TarInfo, parent: int, name: str, path: str) -> None:
        if self._is_confined and not _leads_inside(path, member.linkname):
            self.budget.leave_out(member.name)
            return
        _make_way(parent, name)
        os.symlink(member.linkname, name, dir_fd=parent)
        if not self._is_confined:  # elsewhere, by another name, it could lead out
            self._made.add(path)

    def make_hard_link(self, member: tarfile.TarInfo, parent: int, name: str, path: str) -> None:
        target = "/".join(part for part in member.linkname.split("/") if part not in ("", "."))
        if target not in self._made:  # only what this archive brought may get a second name
            raise BadArchive(f"the archive links {member.name[:200]!r} to what is not in it before")
        folder, _, inner = target.rpartition("/")
        absolute = posixpath.join(self._folder, folder)
        opened = open_beneath(self._root, absolute, os.O_PATH | os.O_DIRECTORY, follows_links=not self._is_confined)
        with closing(opened) as source:
            if path != target:
                _make_way(parent, name)
                os.link(inner, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        self._made.add(path)

    def close(self) -> None:
        self.forget_parent()
        if self._is_confined:
            os.close(self._root)


def _new_file(parent: int, name: str) -> int:
    _make_way(parent, name)
    return os.open(name, _NEW_FILE, 0o600, dir_fd=parent)


def _make_way(parent: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def _leads_inside(path: str, target: str) -> bool:
    """Whether a link's target stays in the tree whatever other such links are in it: only names after leading `..`s."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    num_up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and ".." not in parts[num_up:] and num_up <= path.count("/")
