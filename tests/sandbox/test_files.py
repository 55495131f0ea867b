"""Files of a sandbox: what programs inside may put in the way leads nowhere else, blocks nothing and fills nothing."""

import contextlib
import io
import os
import socket
import stat
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hone.sandbox.files.archives import TreeLimits
from hone.sandbox.files.beneath import BadArchive, LimitExceeded, NotRegular, Owner, file_threads, open_beneath
from hone.sandbox.files.files import Files, Tree

SECRET = b"outside"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root acts as others")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root folder beside a file that nobody inside may reach."""
    (tmp_path / "secret").write_bytes(SECRET)
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def tree(root: Path) -> Iterator[Tree]:
    made = tree_of(root)
    yield made
    made.close()


def tree_of(folder: Path, owner: Owner | None = None, start: str = "/") -> Tree:
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        return Tree(descriptor, owner, start)
    finally:
        os.close(descriptor)


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    packed.seek(0)
    return packed


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode = kind, target, mode
    return made


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_file_that_was_written_is_read_listed_told_of_and_removed(tree: Tree) -> None:
    tree.write("work/data/a.bin", b"\0\xff" * 1000, mode=0o600)
    assert tree.read("/work/data/../data/a.bin") == b"\0\xff" * 1000
    (entry,) = tree.list("work/data")
    assert (entry.name, entry.kind, entry.size_bytes, entry.mode) == ("a.bin", "file", 2000, 0o600)
    assert tree.stat("work").kind == "folder"
    tree.remove("work/data/a.bin")
    with pytest.raises(FileNotFoundError):
        tree.read("work/data/a.bin")
    with pytest.raises(OSError, match="not empty"):
        tree.remove("work")
    tree.remove("work", is_recursive=True)
    assert tree.list("/") == ()


def test_relative_paths_start_at_the_working_folder(root: Path) -> None:
    tree = tree_of(root, start="/work")
    tree.write("a", b"1")
    tree.write("/b", b"2")
    assert everything_below(root) == {"work", "work/a", "b"}
    tree.close()


@pytest.mark.parametrize("path", ["", "/", "..", "a/..", "a/.", "zero\0byte"])
def test_a_path_without_a_name_is_refused_for_writing(tree: Tree, path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        tree.write(path, b"")


@pytest.mark.parametrize(
    "target", ["/secret", "../secret", "../../../../../../secret", "/proc/self/root/etc/passwd", "{outside}"]
)
def test_a_link_never_leads_out_of_the_root(root: Path, tree: Tree, target: str) -> None:
    (root / "link").symlink_to(target.format(outside=root.parent / "secret"))
    with pytest.raises(FileNotFoundError):
        tree.read("link")
    tree.write("link", b"replaced")
    assert not (root / "link").is_symlink()
    assert (root.parent / "secret").read_bytes() == SECRET


def test_a_link_to_a_folder_is_followed_inside_the_root(root: Path, tree: Tree) -> None:
    (root / "usr" / "lib").mkdir(parents=True)
    (root / "lib").symlink_to("/usr/lib")
    (root / "up").symlink_to("../../../../usr")
    tree.write("lib/a", b"1")
    assert tree.read("up/lib/a") == b"1"
    assert tree.stat("lib", follows_links=False).kind == "link"
    assert tree.stat("lib").kind == "folder"


def test_links_of_proc_are_never_followed(root: Path) -> None:
    slash = os.open("/", os.O_PATH)
    with pytest.raises(OSError, match="symbolic links"):
        open_beneath(slash, f"/proc/self/cwd/{root}", os.O_PATH)
    os.close(slash)


def test_files_of_the_kernel_are_not_read() -> None:
    tree = tree_of(Path("/"))
    with pytest.raises(NotRegular, match="of the kernel"):
        tree.read("/proc/self/environ")
    tree.close()


def test_another_name_of_a_file_is_not_written_through(root: Path, tree: Tree) -> None:
    (root / "inside").hardlink_to(root.parent / "secret")
    tree.write("inside", b"new")
    assert (root.parent / "secret").read_bytes() == SECRET
    assert tree.read("inside") == b"new"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_device(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root makes devices")
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device])
def test_what_is_no_regular_file_is_neither_opened_nor_packed(
    root: Path, tree: Tree, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)  # paths of sockets are short
    make(Path("odd"))
    (root / "even").write_bytes(b"1")
    with pytest.raises(NotRegular, match="not a regular file"):
        tree.read("odd")
    packed = io.BytesIO()
    transfer = tree.pack("/", packed)
    assert (transfer.num_files, transfer.left_out) == (1, ("odd",))
    tree.write("odd", b"now a file")
    assert tree.read("odd") == b"now a file"


def test_long_files_are_refused_before_they_are_read(root: Path, tree: Tree) -> None:
    with (root / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LimitExceeded, match="longer than"):
        tree.read("sparse", max_bytes=1 << 20)
    with pytest.raises(LimitExceeded, match="bytes"):
        tree.pack("/", io.BytesIO(), TreeLimits(total_bytes=1 << 30))


def test_folders_with_too_many_names_and_too_deep_ones_are_refused(root: Path, tree: Tree) -> None:
    for number in range(20):
        (root / f"{number}").touch()
    with pytest.raises(LimitExceeded, match="more than 10 names"):
        tree.list("/", max_entries=10)
    with pytest.raises(LimitExceeded, match="more than 10 "):
        tree.pack("/", io.BytesIO(), TreeLimits(num_entries=10))
    deep = root.joinpath(*["d"] * 120)
    deep.mkdir(parents=True)
    with pytest.raises(LimitExceeded, match="inside one another"):
        tree.pack("/", io.BytesIO())
    with pytest.raises(LimitExceeded, match="inside one another"):
        tree.remove("d", is_recursive=True)


def test_a_name_that_is_no_text_is_listed_and_packed(root: Path, tree: Tree) -> None:
    os.close(os.open(os.fsencode(root) + b"/\xff", os.O_CREAT | os.O_WRONLY))
    assert tree.list("/")[0].name == "\ufffd"
    packed = io.BytesIO()
    assert tree.pack("/", packed).num_files == 1
    packed.seek(0)
    tree.unpack("copy", packed)
    assert [os.fsencode(name) for name in names_in(root / "copy")] == [b"\xff"]


def test_renames_that_race_with_the_path_never_lead_out(root: Path, tree: Tree) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_bytes(b"inside")
    (root / "link").symlink_to("/..")
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            (root / "a" / "b").rename(root / "c")
            (root / "link").rename(root / "a" / "b")
            (root / "a" / "b").rename(root / "link")
            (root / "c").rename(root / "a" / "b")

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen = set()
    try:
        for path in ["a/b/../../a/b/file", "a/b/../secret", "a/b/../../secret", "a/b/secret"] * 300:
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                seen.add(tree.read(path))
    finally:
        is_over.set()
        swapping.join()
    assert seen <= {b"inside"}


def test_a_tree_goes_out_and_comes_back_the_same(root: Path, tree: Tree) -> None:
    tree.write("one/script", b"#!/bin/sh\n", mode=0o755)
    tree.write("one/two/data", bytes(range(256)) * 5000)
    tree.make_folder("one/empty")
    (root / "one" / "link").symlink_to("two/data")
    packed = io.BytesIO()
    assert tree.pack("one", packed).num_files == 2
    packed.seek(0)
    tree.unpack("copy", packed)
    assert everything_below(root / "copy") == everything_below(root / "one")
    assert (root / "copy" / "script").stat().st_mode & 0o777 == 0o755
    assert (root / "copy" / "link").readlink() == Path("two/data")
    assert (root / "copy" / "two" / "data").read_bytes() == bytes(range(256)) * 5000


def test_an_archive_by_a_real_tar_is_unpacked(root: Path, tree: Tree, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    (source / "folder" / ("long" * 60)).write_bytes(b"long name")
    (source / "a").write_bytes(b"1")
    (source / "b").hardlink_to(source / "a")
    with (source / "sparse").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"middle")
    for number, layout in enumerate(["gnu", "pax"]):
        done = subprocess.run(
            ["tar", "--sparse", f"--format={layout}", "-C", source, "-c", "."], capture_output=True, check=True
        )
        tree.unpack(f"copy{number}", io.BytesIO(done.stdout))
        copy = root / f"copy{number}"
        assert everything_below(copy) == everything_below(source)
        assert (copy / "sparse").read_bytes() == (source / "sparse").read_bytes()
        assert (copy / "a").stat().st_nlink == 2


@pytest.mark.parametrize(
    "bad",
    [
        member("../escaped"),
        member("a/../../escaped"),
        member("escaped", tarfile.LNKTYPE, "/secret"),
        member("escaped", tarfile.LNKTYPE, "../secret"),
    ],
    ids=lambda bad: f"{bad.name}-{bad.linkname}",
)
def test_an_archive_that_points_elsewhere_is_refused(root: Path, tree: Tree, bad: tarfile.TarInfo) -> None:
    with pytest.raises(BadArchive):
        tree.unpack("/", tar((bad, b"")))
    assert everything_below(root.parent) == {"root", "secret"}


def test_members_of_other_kinds_are_left_out_and_powers_dropped(root: Path, tree: Tree) -> None:
    device = member("dev/sda", tarfile.BLKTYPE)
    device.devmajor = 8
    archive = tar(
        (device, b""),
        (member("fifo", tarfile.FIFOTYPE), b""),
        (member("/usr/bin/sudo", mode=0o6755), b"x"),
        (member("tmp", tarfile.DIRTYPE, mode=0o1777), b""),
    )
    assert tree.unpack("/", archive).left_out == ("dev/sda", "fifo")
    assert everything_below(root) == {"dev", "usr", "usr/bin", "usr/bin/sudo", "tmp"}
    assert stat.S_IMODE((root / "usr/bin/sudo").stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777


def test_a_link_in_an_archive_does_not_lead_its_next_member_out(root: Path, tree: Tree) -> None:
    archive = tar((member("a", tarfile.SYMTYPE, str(root.parent)), b""), (member("a/escaped"), b"x"))
    with pytest.raises(FileNotFoundError):  # inside, the link leads nowhere
        tree.unpack("/", archive)
    assert not (root.parent / "escaped").exists()


def test_an_archive_with_more_than_the_limits_is_refused(tree: Tree) -> None:
    with pytest.raises(LimitExceeded, match="bytes"):
        tree.unpack("/", tar((member("a"), b"x" * 600), (member("b"), b"x" * 600)), TreeLimits(total_bytes=1000))
    with pytest.raises(LimitExceeded, match="files and folders"):
        tree.unpack("/", tar(*[(member(f"{i}"), b"") for i in range(11)]), TreeLimits(num_entries=10))
    with pytest.raises(LimitExceeded, match="inside one another"):
        tree.unpack("/", tar((member("d/" * 200 + "f"), b"")))


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_broken_archive_is_told_and_leads_nowhere(root: Path, tree: Tree, data: st.DataObject) -> None:
    names = st.text(st.sampled_from("ab/.\0é"), min_size=1, max_size=8)
    kinds = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
    drawn = data.draw(st.lists(st.tuples(names, kinds, names, st.binary(max_size=20)), max_size=6))
    packed = bytearray(tar(*[(member(n, k, t), c if k == tarfile.REGTYPE else b"") for n, k, t, c in drawn]).getvalue())
    for position, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(packed) - 1), st.integers(0, 255)), max_size=4)
    ):
        packed[position] = byte
    is_confined = data.draw(st.booleans())
    with contextlib.suppress(OSError):
        tree.unpack("target", io.BytesIO(bytes(packed)), TreeLimits(total_bytes=1 << 20), is_confined=is_confined)
    assert names_in(root.parent) == {"root", "secret"}
    assert names_in(root) <= {"target"}
    assert (root.parent / "secret").read_bytes() == SECRET
    tree.remove("target", is_recursive=True)


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.sampled_from(["a", "b", "link", "..", ".", "", "/"]), min_size=1, max_size=8))
def test_any_path_stays_inside(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        outer = Path(name)
        root = outer / "root"
        (root / "a").mkdir(parents=True)
        (root / "a" / "link").symlink_to("../../..")
        (root / "link").symlink_to(outer)
        tree = tree_of(root)
        with contextlib.suppress(OSError, ValueError):
            tree.write("/".join(parts), b"x")
        tree.close()
        assert names_in(outer) == {"root"}


async def test_upload_and_download_copy_trees_and_no_way_out(root: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"
    (local / "src").mkdir(parents=True)
    (local / "src" / "main.py").write_text("print(1)")
    with file_threads() as threads:
        files = Files(tree_of(root), threads)
        assert (await files.upload(local, "/work")).num_files == 1
        assert (await files.upload(local / "src" / "main.py", "/work")).num_files == 1
        assert await files.read("/work/main.py") == await files.read("/work/src/main.py") == b"print(1)"
        (root / "work" / "good").symlink_to("src/main.py")
        (root / "work" / "bad").symlink_to("../secret")
        (root / "work" / "src" / "worse").symlink_to("../good/../../..")
        (root / "work" / "worst").symlink_to("/etc/passwd")
        transfer = await files.download("/work", tmp_path / "back")
        assert set(transfer.left_out) == {"bad", "src/worse", "worst"}
        assert everything_below(tmp_path / "back") == {"src", "src/main.py", "main.py", "good"}
        files.tree.close()


async def test_a_local_folder_with_a_link_in_it_is_not_left_by_a_download(root: Path, tmp_path: Path) -> None:
    (root / "a").mkdir()
    (root / "a" / "f").write_bytes(b"x")
    back = tmp_path / "back"
    back.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (back / "a").symlink_to(tmp_path / "elsewhere")
    with file_threads() as threads:
        files = Files(tree_of(root), threads)
        await files.download("/", back)
        files.tree.close()
    assert everything_below(tmp_path / "elsewhere") == set()
    assert (back / "a" / "f").read_bytes() == b"x"


async def test_a_closed_tree_refuses(root: Path) -> None:
    with file_threads() as threads:
        files = Files(tree_of(root), threads)
        files.tree.close()
        files.tree.close()
        with pytest.raises(FileNotFoundError, match="closed"):
            await files.read("a")


@needs_root
async def test_files_belong_to_the_owner_and_its_rights_hold(root: Path) -> None:
    owner = Owner(uid=(1 << 31) + 65536, gid=(1 << 31) + 65537)
    os.chown(root, owner.uid, owner.gid)
    root.parent.chmod(0o755)
    (root / "roots").write_bytes(b"root's")
    (root / "roots").chmod(0o600)
    with file_threads() as threads:
        files = Files(tree_of(root, owner), threads)
        await files.write("work/a", b"1")
        await files.unpack("tar", tar((member("b"), b"2")))
        for path in ("work", "work/a", "tar", "tar/b"):
            status = (root / path).stat()
            assert (status.st_uid, status.st_gid) == (owner.uid, owner.gid)
        with pytest.raises(PermissionError):
            await files.read("roots")
        files.tree.close()
        assert threads.submit(os.geteuid).result() == 0
    tree = tree_of(root)
    assert tree.read("roots") == b"root's"
    tree.close()
