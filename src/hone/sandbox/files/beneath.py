"""Opens files beneath a root descriptor, whatever links, `..` and renames lie on the way, as the owner of the files."""

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

COPY_BYTES = 1 << 20
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
OPENAT2 = 437  # the number is the same on every architecture
NO_MAGIC_LINKS, NO_SYMBOLIC_LINKS, IN_ROOT = 0x02, 0x04, 0x10  # RESOLVE_...
MAX_RETRIES = 128
PROC = 0x9FA0
# Files of these are the kernel's: reading may block, or answer with what concerns the reader.
KERNEL_FILE_SYSTEMS = {
    PROC,
    0x62656572,  # sysfs
    0x27E0EB,  # cgroup
    0x63677270,  # cgroup2
    0x64626720,  # debugfs
    0x74726163,  # tracefs
    0x6165676C,  # pstore
    0x65735546,  # fuse
}

_libc = ctypes.CDLL(None, use_errno=True)


class FileProblem(OSError):
    """What a file operation refuses, beyond the kernel's own errors; each kind has an error number of its own."""

    number = errno.EIO

    def __init__(self, message: str) -> None:
        super().__init__(self.number, message)


class NotRegular(FileProblem):
    """A device, fifo, socket, file of the kernel or file that a lease holds is where a regular one is wanted; not opened."""

    number = errno.EINVAL


class LimitExceeded(FileProblem):
    """A file, folder or tree is larger, deeper or has more names than the caller takes."""

    number = errno.EFBIG


class BadArchive(FileProblem):
    """A tar archive that is broken, or has members that no tree has."""

    number = errno.EBADMSG


class DiskFull(FileProblem):
    """The sandbox's disk takes no more bytes or names."""

    number = errno.ENOSPC


PROBLEMS: dict[int, type[FileProblem]] = {
    kind.number: kind for kind in (NotRegular, LimitExceeded, BadArchive, DiskFull)
}


@dataclass(frozen=True, slots=True)
class Owner:
    """Who the files of a tree belong to, as this machine counts ids."""

    uid: int
    gid: int


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: int, path: str, flags: int, *, follows_links: bool = True) -> int:
    """A descriptor of what a program whose root folder is `root` finds at `path`; `OSError` as open(2).

    follows_links: whether symbolic links on the way are followed, inside the root; links of /proc never are.
    """
    resolve = IN_ROOT | NO_MAGIC_LINKS | (0 if follows_links else NO_SYMBOLIC_LINKS)
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    name = os.fsencode(path)
    for _ in range(MAX_RETRIES):
        descriptor: int = _libc.syscall(OPENAT2, root, name, ctypes.byref(how), ctypes.sizeof(how))
        if descriptor >= 0:
            return descriptor
        number = ctypes.get_errno()
        if number != errno.EAGAIN:  # a rename raced with a `..`: the kernel wants us to look again
            raise OSError(number, os.strerror(number), path)
    raise OSError(errno.EAGAIN, "the folders on the way are renamed all the time", path)


@contextlib.contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close a descriptor at the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def status_of(parent: int, name: str) -> os.stat_result | None:
    """Of what a folder has by this name, a link itself rather than its target; None if there is nothing."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def names_in(folder: int, max_entries: int, path: str) -> list[str]:
    """What is in a folder, sorted; `LimitExceeded` if that is more."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > max_entries:
                raise LimitExceeded(f"the folder {path} has more than {max_entries} names")
    return sorted(names)


def read_up_to(descriptor: int, size: int) -> bytes:
    """So many bytes, or all there are."""
    pieces = []
    while size > 0 and (piece := os.read(descriptor, min(size, COPY_BYTES))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it, in as many calls as it takes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_folders(root: int, path: str, *, follows_links: bool = True) -> int:
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


def reopen_regular(located: int, flags: int, path: str) -> int:
    """Open, for good, a file that an O_PATH descriptor names, if it is a regular file of a file system with content.

    Nothing else is ever opened: opening a fifo may block, opening a device may do anything. A file on which a program
    has a lease (fcntl(2)), which would keep us waiting for it, is `NotRegular`, too.
    """
    mode = os.fstat(located).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise NotRegular(f"{path} is a {kind_of(mode)}, not a regular file")
    if file_system(located) in KERNEL_FILE_SYSTEMS:
        raise NotRegular(f"{path} is a file of the kernel")
    try:
        return os.open(f"/proc/self/fd/{located}", flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except BlockingIOError as error:
        raise NotRegular(f"{path} is held by a lease of a program inside") from error


def kind_of(mode: int) -> str:
    """What a file is: file, folder, link, fifo, socket or device."""
    return _KINDS.get(stat.S_IFMT(mode), "device")


_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def file_system(descriptor: int) -> int:
    """Which kind of file system it is of, as statfs(2) numbers them."""
    room = ctypes.create_string_buffer(256)  # struct statfs; its first word is the type
    if _libc.fstatfs(descriptor, room) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int.from_bytes(room.raw[:4], "little")


def file_threads(num_threads: int = 2) -> ThreadPoolExecutor:
    """Threads that may act as other owners: they belong to no group but the one they act as."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="sandbox-files", initializer=_leave_groups)


@contextlib.contextmanager
def acting_as(owner: Owner | None) -> Iterator[None]:
    """Let the files that this thread makes belong to `owner`, and let it do what `owner` may and no more.

    The kernel keeps these ids per thread. Only root, in a thread that does nothing else, can be somebody else.
    """
    if owner is None:
        yield
        return
    _libc.setfsgid(owner.gid)
    _libc.setfsuid(owner.uid)
    try:
        if _libc.setfsuid(-1) & 0xFFFFFFFF != owner.uid:  # the call cannot fail loudly
            raise PermissionError(errno.EPERM, f"this process may not act as uid {owner.uid}; only root may")
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())


def _leave_groups() -> None:
    """The C library would change the groups of all threads; the system call changes this one's."""
    if os.geteuid() == 0:
        _libc.syscall(_SETGROUPS[os.uname().machine], 0, None)


_SETGROUPS = {"x86_64": 116, "aarch64": 159}
