"""Layers of files: held for other cells to lie over, and copied with their marks."""

import asyncio
import contextlib
import os
import socket
import stat
from pathlib import Path

import pytest

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.host import can_share_layers, host_image, look
from hone.sandbox.cells.layers import Layer, Layers, Used, hold, is_too_deep, over, used
from hone.sandbox.cells.plan import Bind, Image
from hone.sandbox.errors import SandboxError
from hone.sandbox.files.layer_copy import OPAQUE, copy_layer, open_folders
from hone.schema.sandboxes import SandboxSpec

SPEC = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)


@pytest.fixture
def layers(cells: Cells) -> Layers:
    if not can_share_layers(cells.host):
        pytest.skip("no cell can lie over another's files here: no compiler, no overlay, or root with Linux before 6.3")
    return Layers()


@pytest.fixture
def rootfs(tmp_path: Path) -> Image:
    """An image of one layer, with the host's programs bound in: it has a root file of its own to be changed."""
    for folder in ("base/data/inner", "base/etc", "base/tmp"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("kept", "changed", "removed", "inner/deep"):
        (tmp_path / "base/data" / name).write_text("of the image\n")
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755)
    host = host_image()
    return Image(layers=(str(tmp_path / "base"),), binds=host.binds, links=host.links, env=host.env)


async def sh(cell: Cell, script: str) -> str:
    result = await cell.exec(["sh", "-c", script])
    assert result.is_success, (script, result)
    return result.stdout


async def taken(layers: Layers, cell: Cell) -> Layer:
    assert cell.spawner is not None
    assert cell.is_quiet()
    cell.is_layer_held = True
    layer = await layers.take_over(cell.spawner, cell.layer_descriptor, cell.uid_base)
    await cell.destroy()
    return layer


async def copied(layers: Layers, cell: Cell) -> Layer:
    assert cell.spawner is not None
    layer = await layers.make(cell.spawner, used(cell.layer_descriptor))
    first_id = cell.uid_base if look().has_id_ranges else 0
    with open_folders(path for path in cell.image.layers if path.startswith("/")) as below:
        copy_layer(cell.layer_descriptor, layer.descriptor, first_id, below)
    return layer


CHANGES = """
cd /data; echo changed > changed; rm removed; rm -r inner; mkdir inner; echo new > inner/new; ln -s kept link; mkfifo fifo
ln changed second; truncate -s 1T sparse; cd; echo 1 > one; chmod 750 one
"""


@pytest.mark.parametrize("way", [taken, copied])
async def test_a_cell_over_the_layer_of_another_sees_what_that_left(cells, layers, rootfs, way) -> None:
    source = await cells.create(SPEC, rootfs)
    await sh(source, CHANGES)
    seen = (
        "cd /data; ls . inner; cat changed kept second inner/new; readlink link; stat -c %a,%u,%g,%s /work/one sparse"
    )
    expected = await sh(source, seen)
    layer = await way(layers, source)
    image = over(rootfs, [layer])
    ones = await asyncio.gather(*(cells.create(SPEC, image) for _ in range(3)))
    for one in ones:
        assert await sh(one, seen) == expected
        await sh(one, "echo mine > /data/changed; rm /data/kept; test ! -s /data/sparse || true")
    assert "changed" in await sh(await cells.create(SPEC, image), "cat /data/changed /data/kept")
    await layers.release(layer)


@pytest.mark.parametrize("way", [taken, copied])
async def test_so_it_does_where_the_image_has_no_layers(cells, layers, way) -> None:
    image = host_image()
    source = await cells.create(SPEC, image)
    await sh(source, "echo 1 > a; mkdir -p /opt/b; echo 2 > /opt/b/c; echo 3 > /tmp/d")
    layer = await way(layers, source)
    one = await cells.create(SPEC, over(image, [layer]))
    assert (
        await sh(one, "cat a /opt/b/c /tmp/d; rm -r /opt/b; mkdir /opt/b; ls /opt/b; python3 -c 'print(4)'")
        == "1\n2\n3\n4\n"
    )
    second = await way(layers, one)
    other = await cells.create(SPEC, over(image, [second, layer]))
    assert await sh(other, "ls -a /opt/b; cat a") == ".\n..\n1\n"
    for each in (second, layer):
        await layers.release(each)


async def test_layers_are_made_one(cells, layers, rootfs, tmp_path) -> None:
    held: list[Layer] = []
    scripts = (
        CHANGES,
        "rm -r /data/inner; echo f > /data/inner; rm /work/one",
        "rm /data/inner; mkdir -p /data/inner/x; echo 2 > two",
    )
    for script in scripts:
        source = await cells.create(SPEC, over(rootfs, held))
        await sh(source, script)
        held.insert(0, await taken(layers, source))
    seen = "cd /; find data | sort; ls work; cat /data/changed /work/two"
    expected = await sh(await cells.create(SPEC, over(rootfs, held)), seen)
    assert "data/inner/x\n" in expected
    assert not {"data/inner/deep", "one"} & set(expected.splitlines())
    merged = await layers.make(held[0].spawner, sum((used(one.descriptor) for one in held), Used(0, 0)))
    with open_folders(rootfs.layers) as below:
        for layer in reversed(held):
            copy_layer(layer.descriptor, merged.descriptor, layer.first_id if cells.host.has_id_ranges else 0, below)
    assert await sh(await cells.create(SPEC, over(rootfs, [merged])), seen) == expected
    for layer in (*held, merged):
        await layers.release(layer)


async def test_a_layer_goes_with_its_last_holder_and_cells_over_it_keep_it(cells, layers) -> None:
    source = await cells.create(SPEC, host_image())
    await sh(source, "head -c 1000000 /dev/zero > a")
    layer = await taken(layers, source)
    assert 1_000_000 <= layer.size_bytes < 2_000_000
    cell = await cells.create(SPEC, over(host_image(), [layer]))
    hold([layer])
    await layers.release(layer)
    again = await cells.create(SPEC, over(host_image(), [layer]))
    await layers.release(layer)
    for each in (cell, again):
        assert await sh(each, "wc -c < a") == "1000000\n"


@pytest.mark.parametrize("target", ["/proc/self/fd/8", "/proc/self/fd/8/x", "/proc/self/root{outside}", "{outside}"])
async def test_links_of_a_layer_lead_nowhere_while_a_cell_is_made(cells, layers, tmp_path, target) -> None:
    """Programs may leave links where the next cell's own folders and mounts will be, also to what a process has open."""
    outside = tmp_path / "outside"
    link = target.format(outside=outside)
    source = await cells.create(SPEC, host_image())
    await sh(source, f"cd /; rmdir /tmp; for name in tmp srv work; do mv $name old-$name; ln -s {link} $name; done")
    layer = await taken(layers, source)
    with contextlib.suppress(SandboxError):  # where a folder for what is bound cannot be made
        cell = await cells.create(SPEC, over(host_image(), [layer]))
        seen = await cell.exec(["sh", "-c", "cat /proc/sys/user/max_user_namespaces; ls /proc/1 | wc -l"], cwd="/")
        assert seen.stdout == "0\n0\n"
    assert not outside.exists()
    await layers.release(layer)


async def test_what_runs_in_a_cell_is_noticed(cells) -> None:
    cell = await cells.create(SPEC)
    assert cell.is_quiet()
    await cell.exec(["sh", "-c", "setsid sleep 60 > /dev/null 2>&1 &"])
    assert not cell.is_quiet()
    other = await cells.create(SPEC)
    process = await other.spawn(["cat"])
    assert not other.is_quiet()
    await process.close()
    assert other.is_quiet()


def test_a_copy_keeps_marks_holes_and_names_and_leaves_sockets_out(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "folder").mkdir(parents=True)
    target.mkdir()
    os.setxattr(source / "folder", OPAQUE, b"y")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/gone").touch()
    for name in ("gone", "nowhere"):
        os.mknod(source / name, stat.S_IFCHR, 0)
    with (source / "sparse").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 20)
        file.write(b"middle")
    os.link(source / "sparse", source / "folder/second")
    (source / "link").symlink_to("/etc/passwd")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(source / "socket"))
    with open_folders(str(path) for path in (source, target, tmp_path / "base")) as (one, other, base):
        copy_layer(one, other, below=[base])
    assert sorted(path.name for path in target.iterdir()) == ["folder", "gone", "link", "sparse"]
    assert os.getxattr(target / "folder", OPAQUE) == b"y"
    assert stat.S_ISCHR((target / "gone").lstat().st_mode)
    assert (target / "link").is_symlink()
    status = (target / "sparse").stat()
    assert (status.st_size, status.st_nlink) == (1 << 40, 2)
    assert status.st_blocks * 512 < 1 << 20
    with (target / "sparse").open("rb") as file:
        assert os.pread(file.fileno(), 6, 1 << 20) == b"middle"


def test_sixteen_layers_are_enough() -> None:
    one = Layer("sys/1", -1, None, 1, 0)  # type: ignore[arg-type]
    assert not is_too_deep(Image(), [one] * 15)
    assert is_too_deep(Image(), [one] * 16)
    assert is_too_deep(Image(layers=("/a",) * 60), [one] * 4)
    assert over(Image(layers=("/a",), links=(("/b", "c"),)), [one]) == Image(layers=("sys/1", "/a"))


@pytest.mark.parametrize(
    "poison",
    [
        "touch /opt",
        "mkfifo /opt",
        "ln -s opt /opt",
        "ln -s nowhere /opt",
        "ln -s /dev /opt",
        "ln -s /usr /opt",
        "ln -s /etc/passwd /opt",
        "mkdir /opt; touch /opt/tool",
        "mkdir /opt; ln -s /x /opt/tool",
        "mv /work /y; touch /work",
        "mv /work /y; ln -s /proc/self /work",
        "rm -r /tmp; touch /tmp",
    ],
)
async def test_no_cell_is_kept_from_being_made_by_what_lies_in_the_way_of_its_mounts(
    cells: Cells, layers: Layers, tmp_path: Path, poison: str
) -> None:
    (tmp_path / "tool").write_text("the tool\n")
    tmp_path.chmod(0o755)
    bind = Bind(str(tmp_path), "/opt/tool")
    image = Image(binds=host_image().binds[:2], links=host_image().links, env=host_image().env)  # /usr and /etc
    first = await cells.create(SPEC, image, binds=[bind])
    made = await first.exec(["sh", "-c", f"mkdir /work/inner; mv /opt /x; {poison}"], cwd="/")
    assert made.is_success, made
    layer = await taken(layers, first)
    second = await cells.create(SPEC, over(image, [layer]), binds=[bind])
    assert await sh(second, "cat /opt/tool/tool; touch /work/a") == "the tool\n"
    await second.destroy()
    await layers.release(layer)


async def test_a_link_to_a_folder_of_its_own_stays_where_nothing_is_mounted(cells: Cells, layers: Layers) -> None:
    first = await cells.create(
        SPEC, Image(binds=host_image().binds[:2], links=host_image().links, env=host_image().env)
    )
    assert (await first.exec(["sh", "-c", "mv /work /home; ln -s home /work; echo 1 > /work/a"], cwd="/")).is_success
    layer = await taken(layers, first)
    second = await cells.create(SPEC, over(first.image, [layer]))
    assert await sh(second, "readlink /work; cat /home/a") == "home\n1\n"
    await second.destroy()
    await layers.release(layer)
