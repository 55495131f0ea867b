"""Images: every kind of name, what is broken is told, and layers that hide what lies below them."""

import gzip
import json
import lzma
import os
import platform
import stat
import zipfile
from pathlib import Path

import pytest

from hone.sandbox.errors import ImageError
from hone.sandbox.images.store import ImageStore
from oci_layouts import Files, Layout, archive_of


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def test_the_host_is_the_default_image(store: ImageStore) -> None:
    assert store.find("python") == store.find("host")
    assert "/usr" in {bind.target for bind in store.find("host").binds}
    assert not store.folder.exists()


def test_a_folder_is_an_image(store: ImageStore, tmp_path: Path) -> None:
    assert store.find(f"dir:{tmp_path}").layers == (str(tmp_path),)
    with pytest.raises(ImageError, match="absolute path"):
        store.find("dir:here")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_an_archive_is_unpacked_once(store: ImageStore, tmp_path: Path, compress: object) -> None:
    archive = tmp_path / "root.tar"
    archive.write_bytes(compress(archive_of({"etc": None, "etc/name": b"image"})))  # type: ignore[operator]
    (layer,) = store.find(f"tar:{archive}").layers
    assert (Path(layer) / "etc" / "name").read_bytes() == b"image"
    before = Path(layer).stat().st_ino
    assert store.find(f"tar:{archive}").layers == (layer,)
    assert Path(layer).stat().st_ino == before
    assert [path.name for path in (store.folder / "layers").iterdir()] == [Path(layer).name]


@pytest.mark.parametrize("name", ["tar:/nowhere", "oci:/nowhere", "oci:/nowhere:1", "../etc", "-x", "a b", ""])
def test_a_name_of_nothing_is_told(store: ImageStore, name: str) -> None:
    with pytest.raises(ImageError, match="image"):
        store.find(name)


def test_a_broken_archive_leaves_nothing(store: ImageStore, tmp_path: Path) -> None:
    archive = tmp_path / "root.tar"
    archive.write_bytes(gzip.compress(archive_of({"a": b"x" * 100_000}))[:-60])
    with pytest.raises(ImageError, match="broken"):
        store.find(f"tar:{archive}")
    assert list((store.folder / "layers").iterdir()) == []


def test_layers_are_stacked_with_what_they_hide(store: ImageStore, layout: Layout) -> None:
    layout.add(
        {"etc": None, "etc/a": b"1", "etc/b": b"2", "data": None, "data/old": b"3"},
        {"etc/.wh.a": b"", "data": None, "data/.wh..wh..opq": b"", "data/new": b"4", "private": None},
    )
    image = store.find(f"oci:{layout.folder}")
    top, bottom = map(Path, image.layers)
    assert (bottom / "etc" / "a").read_bytes() == b"1"
    hidden = (top / "etc" / "a").lstat()
    assert stat.S_ISCHR(hidden.st_mode)
    assert hidden.st_rdev == 0
    assert os.getxattr(top / "data", "user.overlay.opaque") == b"y"
    assert image.env == {"PATH": "/opt/bin:/bin", "WITH": "a=b"}
    assert image.working_folder == "/srv"


@pytest.mark.parametrize(
    ("said", "folder"),
    [
        ("/srv/../../../etc", "/etc"),
        ("//a/./b/", "/a/b"),
        ("/..", "/work"),
        ("/", "/work"),
        ("", "/work"),
        ("a", "/work"),
        ("../a", "/work"),
    ],
)
def test_a_working_folder_leads_nowhere_else(store: ImageStore, layout: Layout, said: str, folder: str) -> None:
    layout.add({"a": b"1"}, runtime={"WorkingDir": said})
    assert store.find(f"oci:{layout.folder}").working_folder == folder


@pytest.mark.parametrize("kind", ["tar", "oci", "build"])
def test_what_has_no_end_or_waits_is_not_read(store: ImageStore, tmp_path: Path, kind: str) -> None:
    fifo = tmp_path / ("index.json" if kind == "oci" else "fifo")
    os.mkfifo(fifo)
    with pytest.raises(ImageError, match="not a regular file"):
        store.find(f"{kind}:{tmp_path if kind == 'oci' else fifo}")
    fifo.unlink()
    fifo.symlink_to("/dev/zero")
    with pytest.raises(ImageError, match="not a regular file"):
        store.find(f"{kind}:{tmp_path if kind == 'oci' else fifo}")


def test_images_share_their_layers(store: ImageStore, layout: Layout) -> None:
    base: Files = {"base": b"1"}
    layout.add(base, {"one": b"1"}, tag="one")
    layout.add(base, {"two": b"2"}, tag="two")
    one, two = (store.find(f"oci:{layout.folder}:{tag}") for tag in ("one", "two"))
    assert one.layers[1] == two.layers[1]
    assert one.layers[0] != two.layers[0]
    with pytest.raises(ImageError, match="'three'"):
        store.find(f"oci:{layout.folder}:three")


def test_the_manifest_for_this_machine_is_chosen(store: ImageStore, layout: Layout) -> None:
    ours = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    layout.add({"other": b""}, architecture="s390x")
    layout.add({"ours": b""}, architecture=ours)
    inner = layout.document({"schemaVersion": 2, "manifests": layout.manifests})
    layout.manifests = [inner]
    layout.save()
    assert (Path(store.find(f"oci:{layout.folder}").layers[0]) / "ours").exists()


def test_a_blob_that_was_changed_is_refused(store: ImageStore, layout: Layout) -> None:
    layout.add({"a": b"1"})
    for blob in (layout.folder / "blobs" / "sha256").iterdir():
        if blob.read_bytes().startswith(b"\x1f\x8b"):
            blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(ImageError, match="not what its name says"):
        store.find(f"oci:{layout.folder}")


def test_a_layer_with_other_content_than_configured_is_refused(store: ImageStore, layout: Layout) -> None:
    layout.add({"a": b"1"})
    manifest = json.loads(
        (layout.folder / "blobs/sha256" / str(layout.manifests[0]["digest"]).removeprefix("sha256:")).read_text()
    )
    manifest["layers"] = [layout.blob(gzip.compress(archive_of({"a": b"2"})))]
    layout.manifests = [layout.document(manifest)]
    layout.save()
    with pytest.raises(ImageError, match="of the configuration"):
        store.find(f"oci:{layout.folder}")


@pytest.mark.parametrize("digest", ["sha256:../../../../etc/passwd", "md5:0", "sha256:" + "A" * 64])
def test_a_digest_that_could_name_another_file_is_refused(store: ImageStore, layout: Layout, digest: str) -> None:
    layout.manifests = [{"digest": digest, "size": 1}]
    layout.save()
    with pytest.raises(ImageError, match="digest"):
        store.find(f"oci:{layout.folder}")


def test_a_mark_that_would_remove_a_folder_itself_is_refused(store: ImageStore, layout: Layout) -> None:
    layout.add({".wh..": b""})
    with pytest.raises(ImageError, match="removes nothing"):
        store.find(f"oci:{layout.folder}")


def test_a_reference_is_pulled_once_by_the_program_there_is(
    store: ImageStore, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.add({"pulled": b"1"})
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    calls = tmp_path / "calls"
    script = (
        f'#!/bin/sh\necho "$@" >> {calls}\ncase $3 in oci:*) cp -r {layout.folder} "${{3#oci:}}";; *) exit 1;; esac\n'
    )
    (programs / "skopeo").write_text(script)
    (programs / "skopeo").chmod(0o755)
    for _ in range(2):
        (layer,) = store.find("registry.example/name/image:1").layers
        assert (Path(layer) / "pulled").exists()
    (call,) = calls.read_text().splitlines()
    assert call.startswith("copy docker://registry.example/name/image:1 oci:")


def test_a_missing_program_is_named(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="install skopeo or crane"):
        store.find("debian:12")


def test_a_definition_puts_files_and_variables_on_a_base(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text("print(1)")
    definition = tmp_path / "image.toml"
    definition.write_text('base = "host"\n[files]\n"/opt/tool.py" = "tool.py"\n[env]\nA = "1"\n')
    image = store.find(f"build:{definition}")
    (layer,) = image.layers
    assert (Path(layer) / "opt" / "tool.py").read_text() == "print(1)"
    assert image.env["A"] == "1"
    assert image.binds == store.find("host").binds
    assert store.find(f"build:{definition}").layers == (layer,)
    (tmp_path / "tool.py").write_text("print(2)")
    assert store.find(f"build:{definition}").layers != (layer,)


@pytest.mark.parametrize(
    "text", ['[files]\n"../a" = "image.toml"', 'apt = ["x"]', "base =", '[files]\n"/a" = "missing"']
)
def test_a_definition_that_cannot_be_is_told(store: ImageStore, tmp_path: Path, text: str) -> None:
    (tmp_path / "image.toml").write_text(text)
    with pytest.raises(ImageError):
        store.find(f"build:{tmp_path}/image.toml")


def test_packages_of_a_definition_are_installed_from_wheels(store: ImageStore, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    name = "made-0.1-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr("made.py", "value = 42\n")
        wheel.writestr("made-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: made\nVersion: 0.1\n")
        wheel.writestr("made-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("made-0.1.dist-info/RECORD", "made.py,,\n")
    (tmp_path / "image.toml").write_text(f'pip = ["{tmp_path / name}"]')
    image = store.find(f"build:{tmp_path}/image.toml")
    assert (Path(image.layers[0]) / "opt" / "packages" / "made.py").exists()
    assert image.env["PYTHONPATH"] == "/opt/packages"
