"""Trees of files as tar archives: packed within limits, and unpacked so that no member leads out of its folder."""

import contextlib
import os
import posixpath
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from hone.sandbox.files.beneath import (
    COPY_BYTES,
    FOLDER,
    KERNEL_FILE_SYSTEMS,
    NEW_FILE,
    BadArchive,
    LimitExceeded,
    NotRegular,
    closing,
    file_system,
    make_folders,
    names_in,
    open_beneath,
    read_up_to,
    reopen_regular,
    status_of,
    write_all,
)
from hone.schema.sandboxes import Transfer

NUM_NAMED = 100
HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """What one operation on a tree takes at most; more is `LimitExceeded`.

    total_bytes: of all files as they are long, so that holes count. num_entries: files, folders and links.
    depth: folders inside one another.
    """

    total_bytes: int = 1 << 30
    num_entries: int = 100_000
    depth: int = 100

    @property
    def archive_bytes(self) -> int:
        """The longest archive of such a tree."""
        return self.total_bytes + (self.num_entries + 2) * 4096 + HEADER_BYTES


@dataclass(slots=True)
class Budget:
    """Counts what an operation has touched, and stops it at its limits."""

    limits: TreeLimits
    num_files: int = 0
    num_bytes: int = 0
    num_entries: int = 0
    left_out: list[str] = field(default_factory=list)

    def count_entry(self) -> None:
        """One more file, folder or link."""
        self.num_entries += 1
        if self.num_entries > self.limits.num_entries:
            raise LimitExceeded(f"the tree has more than {self.limits.num_entries} files and folders")

    def count_file(self, size: int) -> None:
        """One more file, as long as this."""
        self.num_files += 1
        self.num_bytes += size
        if self.num_bytes > self.limits.total_bytes:
            raise LimitExceeded(f"the tree's files have more than {self.limits.total_bytes} bytes")

    def check_depth(self, depth: int, name: str) -> None:
        """A folder is so deep."""
        if depth > self.limits.depth:
            raise LimitExceeded(f"the folder {name[-200:]} is the {depth}th inside one another; {self.limits.depth} go")

    def leave_out(self, name: str) -> None:
        """It is not copied, and the result says so."""
        if len(self.left_out) < NUM_NAMED:
            self.left_out.append(os.fsencode(name).decode(errors="replace"))

    def transfer(self) -> Transfer:
        """What there is to say in the end."""
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
            data += read_up_to(self._descriptor, size - len(data))
        return data.ljust(size, b"\0")


class Packing:
    """Adds what is in folders to an archive."""

    def __init__(self, archive: tarfile.TarFile, budget: Budget) -> None:
        self.archive = archive
        self.budget = budget

    def add_folder(self, folder: int, path: str, depth: int) -> None:
        """What is in a folder; path: its own in the archive, with a slash behind it, or nothing."""
        self.budget.check_depth(depth, path)
        if file_system(folder) in KERNEL_FILE_SYSTEMS:
            self.budget.leave_out(path)
            return
        for name in names_in(folder, self.budget.limits.num_entries, path or "/"):
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
            with closing(os.open(".", FOLDER, dir_fd=located)) as inner:
                self.add_folder(inner, f"{path}/", depth + 1)
        elif stat.S_ISLNK(status.st_mode):
            self.budget.count_entry()
            member = _member(path, status, tarfile.SYMTYPE)
            member.linkname = os.readlink("", dir_fd=located)
            self.archive.addfile(member)
        elif stat.S_ISREG(status.st_mode):
            try:
                self.add_file(located, path)
            except NotRegular:
                self.budget.leave_out(path)
        else:
            self.budget.leave_out(path)

    def add_file(self, located: int, path: str) -> None:
        """One regular file."""
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

    def __init__(self, source: BinaryIO, limits: TreeLimits) -> None:
        self._source = source
        self._rest = limits.archive_bytes

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self._rest -= len(data)
        if self._rest < 0:
            raise LimitExceeded("the archive is longer than the tree that it may hold")
        return data


class Unpacking:
    """Makes the members of an archive, each through a descriptor of the folder that it goes to."""

    def __init__(
        self,
        root: int,
        folder: str,
        budget: Budget,
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
        """Make all members; called once."""
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
            self._parent = (path, make_folders(self._root, absolute, follows_links=not self._is_confined))
        return self._parent[1]

    def forget_parent(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def make_folder(self, parent: int, name: str, path: str, mode: int) -> None:
        old = status_of(parent, name)
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
            folder = open_beneath(self._root, absolute, FOLDER, follows_links=not self._is_confined)
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
                write_all(descriptor, data)
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
    return os.open(name, NEW_FILE, 0o600, dir_fd=parent)


def _make_way(parent: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def _leads_inside(path: str, target: str) -> bool:
    """Whether a link's target stays in the tree whatever other such links are in it: only names after leading `..`s."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    num_up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and ".." not in parts[num_up:] and num_up <= path.count("/")
