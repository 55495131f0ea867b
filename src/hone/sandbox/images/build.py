"""Builds an image from a short TOML file: a base, packages of Debian and of Python, files and variables; kept by content."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import msgspec

from hone.sandbox.cells.plan import Image
from hone.sandbox.errors import ImageError
from hone.sandbox.images.children import run
from hone.sandbox.images.debian_packages import Packages
from hone.sandbox.images.regular_files import read_regular

VERSION = 1  # of how layers are built: another one does not find those of this one
PACKAGES = "/opt/packages"
PIP_SECONDS = 1800.0


class ImageDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an image is made of.

    base: a name of an image. apt: packages, where the base is Debian or Ubuntu; they are unpacked, and their scripts are
    not run. pip: requirements for this Python, installed from wheels only, so that nothing of theirs
    runs while they are; the programs of the image find them by PYTHONPATH. files: absolute path in the image to a local
    file, relative to the TOML file. env: variables of every program.
    """

    base: str = "host"
    apt: list[str] = []
    pip: list[str] = []
    files: dict[str, str] = {}
    env: dict[str, str] = {}


def build_image(
    path: Path, find: Callable[[str], Image], keep: Callable[[str, Callable[[Path], object]], Path]
) -> Image:
    """The image that a TOML file defines. find: an image by name; keep: `ImageStore.keep`."""
    try:
        definition = msgspec.toml.decode(read_regular(path), type=ImageDefinition)
    except msgspec.MsgspecError as error:
        raise ImageError(f"{path}: {error}") from error
    sources = {target: path.parent / source for target, source in sorted(definition.files.items())}
    contents = {_inside(target): read_regular(source) for target, source in sources.items()}
    base = find(definition.base)
    env = {**base.env, **definition.env}
    layers = list(base.layers)
    if definition.apt:
        layers.insert(0, str(_add_packages(definition, base, path, keep)))
    if definition.pip:
        key = _key(("pip", sorted(definition.pip), sys.version, sys.platform))
        layers.insert(0, str(keep(key, lambda folder: _install(definition.pip, folder))))
        env["PYTHONPATH"] = ":".join(filter(None, (PACKAGES, env.get("PYTHONPATH"))))
    if contents:
        layers.insert(0, str(keep(_key(sorted(contents.items())), lambda folder: _put(contents, folder))))
    return replace(base, layers=tuple(layers), env=env)


def _add_packages(
    definition: ImageDefinition, base: Image, path: Path, keep: Callable[[str, Callable[[Path], object]], Path]
) -> Path:
    try:
        packages = Packages(definition.apt, base.layers)
        return keep(_key(("apt", packages.key())), packages.install)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def _key(content: object) -> str:
    return hashlib.sha256(repr((VERSION, content)).encode()).hexdigest()


def _inside(target: str) -> str:
    path = PurePosixPath(target)
    if not path.is_absolute() or ".." in path.parts or not path.name:
        raise ImageError(f"the file {target!r} of an image needs an absolute path without `..`")
    return str(path)


def _put(contents: dict[str, bytes], layer: Path) -> None:
    for target, content in contents.items():
        path = layer / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _install(requirements: list[str], layer: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--only-binary=:all:", "--target", str(layer / PACKAGES.lstrip("/")), "--", *requirements]
    try:
        done = run(command, PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"pip takes more than {PIP_SECONDS:g} s for {', '.join(requirements)}") from error
    if done.returncode:
        raise ImageError(f"pip cannot install {', '.join(requirements)}: {done.stderr.strip()[-1000:]}")
