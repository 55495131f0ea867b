"""Images by name: what a cell's root file system is made of, unpacked once by content and shared by all cells."""

import contextlib
import hashlib
import lzma
import os
import posixpath
import re
import secrets
import stat
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from hone.sandbox.cache import cache_folder
from hone.sandbox.cells.host import host_image
from hone.sandbox.cells.plan import Image
from hone.sandbox.cells.scratch import remove_tree
from hone.sandbox.errors import ImageError
from hone.sandbox.files.archives import TreeLimits
from hone.sandbox.files.beneath import BadArchive, closing, open_beneath
from hone.sandbox.files.compression import Hashed, decompressed
from hone.sandbox.files.files import Tree
from hone.sandbox.images.build import build_image
from hone.sandbox.images.policy import HOST_NAMES, split_tag
from hone.sandbox.images.registries import architecture, pull
from hone.sandbox.images.regular_files import open_regular

LAYER_LIMITS = TreeLimits(total_bytes=64 << 30, num_entries=4_000_000)
MANIFEST_BYTES = 8 << 20
MAX_INDEX_DEPTH = 4
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
WHITEOUT, OPAQUE, RESERVED = ".wh.", ".wh..wh..opq", ".wh..wh."
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
T = TypeVar("T")


class ImageStore:
    """Images of this machine. Layers lie in `folder`, one folder for each by the hash of its content.

    Names: "python" or "host", this machine's programs and Python; "dir:PATH", a folder as it is; "tar:PATH", a tar
    archive of a root file system, compressed or not; "oci:PATH" or "oci:PATH:TAG", a folder in the OCI image layout;
    "build:PATH", what a TOML file defines (`ImageDefinition`); anything else is a reference to a registry ("debian:12",
    "ghcr.io/name/image@sha256:..."), fetched by skopeo or crane.

    folder: by default in this user's cache. Several processes may use one folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder("images")

    def find(self, name: str) -> Image:
        """The image of a name. Blocks, for the time it takes to unpack it where that has not been done before.

        Raises `ImageError`.
        """
        kind, _, rest = name.partition(":")
        try:
            if name in HOST_NAMES:
                return host_image()
            if kind == "dir":
                return self._of_folder(Path(rest))
            if kind == "tar":
                return _image((self._layer_of_archive(Path(rest)),))
            if kind == "build":
                return build_image(Path(rest), self.find, self.keep)
            if kind == "oci":
                path, tag = split_tag(rest)
                return self._of_layout(Path(path), tag)
            return self._of_registry(name)
        except (OSError, msgspec.MsgspecError) as error:
            raise ImageError(f"image {name!r}: {error}") from error

    def keep(self, key: str, make: Callable[[Path], object]) -> Path:
        """The folder of a layer, made by `make` in a new folder if there is none of this key yet.

        key: 64 hexadecimal digits that stand for the content.
        """
        layers = self._subfolder("layers")
        layer = layers / key
        if layer.is_dir():
            return layer
        unfinished = layers / f".{key}-{secrets.token_hex(4)}"
        unfinished.mkdir(mode=0o755)
        try:
            make(unfinished)
            with contextlib.suppress(OSError):  # another process was faster
                unfinished.rename(layer)
        finally:
            if unfinished.exists():
                remove_tree(unfinished)
        return layer

    def _subfolder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _of_folder(self, folder: Path) -> Image:
        if not folder.is_absolute() or not folder.is_dir():
            raise ImageError(f"image 'dir:{folder}': give the absolute path of a folder")
        return _image((folder,))

    def _layer_of_archive(self, archive: Path) -> Path:
        with open_regular(archive) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return self.keep(digest, lambda folder: _unpack_file(archive, folder))

    def _of_layout(self, layout: Path, tag: str | None) -> Image:
        index = _read(layout / "index.json", _Index)
        chosen = _choose(index.manifests, tag, layout)
        for _ in range(MAX_INDEX_DEPTH):
            document = _blob(layout, chosen)
            if (found := _decode(document, _Manifest)).layers or found.config is not None:
                return self._of_manifest(layout, found)
            chosen = _choose(_decode(document, _Index).manifests, None, layout)
        raise ImageError(f"{layout}: its indexes point to one another more than {MAX_INDEX_DEPTH} deep")

    def _of_manifest(self, layout: Path, manifest: "_Manifest") -> Image:
        if manifest.config is None:
            raise ImageError(f"{layout}: the manifest has no configuration")
        config = _decode(_blob(layout, manifest.config), _Configuration)
        expected = config.rootfs.diff_ids
        if len(expected) != len(manifest.layers):
            raise ImageError(
                f"{layout}: {len(manifest.layers)} layers, but {len(expected)} of them in the configuration"
            )
        layers = [
            self._layer_of_blob(layout, layer, content)
            for layer, content in zip(manifest.layers, expected, strict=True)
        ]
        variables = dict(variable.partition("=")[::2] for variable in config.config.env)
        return _image(tuple(reversed(layers)), variables, config.config.working_folder)

    def _layer_of_blob(self, layout: Path, layer: "_Descriptor", content: str) -> Path:
        """Known by the hash of its content without compression, so that images share it however they compress it."""

        def make(folder: Path) -> None:
            path = _verified(layout, layer)
            if (found := _unpack_file(path, folder)) != _hex(content):
                raise ImageError(f"{path}: its content has the hash {found}, not the {content} of the configuration")

        return self.keep(_hex(content), make)

    def _of_registry(self, reference: str) -> Image:
        """Pulled layouts are kept by reference, so that an image does not change under a running job."""
        layout = self._subfolder("pulled") / hashlib.sha256(reference.encode()).hexdigest()
        if not layout.is_dir():
            with tempfile.TemporaryDirectory(dir=layout.parent) as temporary:
                pulled = Path(temporary) / "layout"
                pull(reference, pulled)
                with contextlib.suppress(OSError):  # another process was faster
                    pulled.rename(layout)
        return self._of_layout(layout, None)


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    annotations: dict[str, str] = {}
    platform: dict[str, object] = {}


class _Index(msgspec.Struct, frozen=True):
    manifests: list[_Descriptor] = []


class _Manifest(msgspec.Struct, frozen=True):
    config: _Descriptor | None = None
    layers: list[_Descriptor] = []


class _RootFileSystem(msgspec.Struct, frozen=True):
    diff_ids: list[str] = []


class _Runtime(msgspec.Struct, frozen=True):
    env: list[str] = msgspec.field(name="Env", default_factory=list)
    working_folder: str = msgspec.field(name="WorkingDir", default="")


class _Configuration(msgspec.Struct, frozen=True):
    rootfs: _RootFileSystem
    config: _Runtime = _Runtime()


def _image(layers: tuple[Path, ...], variables: dict[str, str] | None = None, working_folder: str = "") -> Image:
    env = {"PATH": DEFAULT_PATH, **(variables or {})}
    folder = posixpath.normpath("/" + working_folder.lstrip("/")) if working_folder.startswith("/") else "/"
    return Image(
        layers=tuple(str(layer) for layer in layers), env=env, working_folder=folder if folder != "/" else "/work"
    )


def _choose(manifests: list[_Descriptor], tag: str | None, layout: Path) -> _Descriptor:
    """The manifest with a tag, or the one for this machine."""
    if tag is not None:
        manifests = [one for one in manifests if one.annotations.get("org.opencontainers.image.ref.name") == tag]
    if len(manifests) == 1:
        return manifests[0]
    wanted = architecture()
    for one in manifests:
        if one.platform.get("architecture") == wanted and one.platform.get("os", "linux") == "linux":
            return one
    what = f"with the tag {tag!r}" if tag is not None else f"for {wanted}"
    raise ImageError(f"{layout}: none of its {len(manifests)} manifests is {what}")


def _hex(digest: str) -> str:
    """Of a digest, what is also the name of a file; anything else could name a file elsewhere."""
    if (match := DIGEST.fullmatch(digest)) is None:
        raise ImageError(f"the digest {digest[:80]!r} is not a sha256 one")
    return match[1]


def _read(path: Path, kind: type[T]) -> T:
    with open_regular(path) as file:
        document = file.read(MANIFEST_BYTES + 1)
    if len(document) > MANIFEST_BYTES:
        raise ImageError(f"{path} is longer than {MANIFEST_BYTES} bytes")
    return _decode(document, kind)


def _decode(document: bytes, kind: type[T]) -> T:
    return msgspec.json.decode(document, type=kind)


def _blob(layout: Path, descriptor: _Descriptor) -> bytes:
    if descriptor.size > MANIFEST_BYTES:
        raise ImageError(f"{layout}: {descriptor.digest} is longer than {MANIFEST_BYTES} bytes")
    return _verified(layout, descriptor).read_bytes()


def _verified(layout: Path, descriptor: _Descriptor) -> Path:
    path = layout / "blobs" / "sha256" / _hex(descriptor.digest)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if size != descriptor.size or found != _hex(descriptor.digest):
        raise ImageError(f"{path} is not what its name says: {size} bytes with the hash {found}")
    return path


def _unpack_file(archive: Path, folder: Path) -> str:
    """Unpack a layer; returns the hash of its content without compression."""
    with open_regular(archive) as file, decompressed(file, archive) as content:
        hashed = Hashed(content)
        try:
            unpack_layer(hashed, folder)
            while hashed.read(1 << 20):  # what follows the end of the archive belongs to the hash
                pass
        except (zlib.error, lzma.LZMAError, EOFError) as error:
            raise BadArchive(f"{archive} is broken: {error}") from error
    return hashed.digest.hexdigest()


def unpack_layer(content: BinaryIO | Hashed, folder: Path) -> None:
    with closing(os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        marks = _Marks(root)
        with contextlib.closing(Tree(root)) as tree:
            tree.unpack("/", content, LAYER_LIMITS, takes_over=marks.hide)  # type: ignore[arg-type]
        marks.finish()


class _Marks:
    """Turns the marks of an OCI layer for what it removes from those below into those of an overlay.

    A mark is about the layers below, never about what its own layer has of that name, wherever it stands in the archive.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._hidden: list[str] = []

    def hide(self, parent: int, name: str) -> bool:
        """Whether a file is a mark, which is done then."""
        if not name.startswith(WHITEOUT):
            return False
        if name == OPAQUE:
            _make_opaque(parent)
        elif not name.startswith(RESERVED):
            hidden = name.removeprefix(WHITEOUT)
            if hidden in ("", ".", ".."):
                raise BadArchive(f"the layer has a mark {name!r} that removes nothing")
            self._hidden.append(os.path.relpath(f"{_path_of(parent)}/{hidden}", _path_of(self._root)))
            with contextlib.suppress(FileExistsError):
                os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)  # needs no privilege: it is no device
        return True

    def finish(self) -> None:
        """A folder in place of what is hidden shows nothing of the folder below."""
        for path in self._hidden:
            with (
                contextlib.suppress(OSError),  # it is no folder
                closing(open_beneath(self._root, path, os.O_PATH | os.O_DIRECTORY, follows_links=False)) as folder,
            ):
                _make_opaque(folder)


def _make_opaque(folder: int) -> None:
    os.setxattr(f"/proc/self/fd/{folder}", "user.overlay.opaque", b"y")


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
