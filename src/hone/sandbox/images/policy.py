"""Which images a node makes sandboxes from: the names are its clients', and what they name is the node's."""

import glob
import os
import posixpath
import shlex
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hone.sandbox.errors import Unsupported
from hone.sandbox.images.registries import REFERENCE, registry_of

HOST_NAMES = ("python", "host")
LOCAL_KINDS = ("dir", "tar", "oci", "build")
PUBLIC = "public"
"""The pattern of all images in the registries below."""
PUBLIC_REGISTRIES = frozenset(
    {
        *("docker.io", "index.docker.io", "ghcr.io", "quay.io", "gcr.io", "registry.k8s.io", "registry.gitlab.com"),
        *("mcr.microsoft.com", "public.ecr.aws", "nvcr.io", "registry.access.redhat.com"),
    }
)
MAX_SHOWN = 200


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What a node's clients may name. "python" and "host" they always may.

    patterns: as of `fnmatch`, for names as clients say them; None lets them name everything, "public" all images in
    `PUBLIC_REGISTRIES`. What lies on the node's own disk (`dir:`, `tar:`, `oci:`, `build:`) is covered by patterns of that
    kind alone, each of an absolute path, and has to be there when links are followed, too. Another registry than the
    public ones is covered by patterns that spell it out, up to the first "/". is_private_allowed: "public" is every
    registry, wherever it is.
    """

    patterns: tuple[str, ...] | None = None
    is_private_allowed: bool = False

    def __post_init__(self) -> None:
        for pattern in self.patterns or ():
            kind, _, path = pattern.partition(":")
            if not pattern or (kind in LOCAL_KINDS and (not path.startswith("/") or ".." in path.split("/"))):
                raise ValueError(f"the pattern {pattern!r} of images has no absolute path without `..`")

    def admitted(self, name: str) -> str:
        """The image to look for, which is the one of this name with no link left in its path.

        Raises `Unsupported` if it is none that clients may name. The disk is looked at only where a pattern leads.
        """
        if self.patterns is None or name in HOST_NAMES:
            return name
        if name.partition(":")[0] in LOCAL_KINDS:
            return self._admitted_path(name)
        if REFERENCE.fullmatch(name) is None:
            raise Unsupported(f"image {name[:MAX_SHOWN]!r} is neither a known kind nor a reference to a registry")
        if not any(self._covers(pattern, name) for pattern in self.patterns):
            raise _refused(name)
        return name

    def _admitted_path(self, name: str) -> str:
        kind, _, rest = name.partition(":")
        path, tag = split_tag(rest) if kind == "oci" else (rest, None)
        if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise Unsupported(f"image {name[:MAX_SHOWN]!r}: give an absolute path without `..`")
        end = "" if tag is None else f":{tag}"
        said = f"{kind}:{posixpath.normpath('/' + path.lstrip('/'))}{end}"
        patterns = [one for one in self.patterns or () if one.startswith(f"{kind}:") and fnmatchcase(said, one)]
        if not patterns:
            raise _refused(said)
        found = f"{kind}:{os.path.realpath(path)}{end}"
        if not any(fnmatchcase(found, _without_links(one)) for one in patterns):
            raise Unsupported(f"image {name[:MAX_SHOWN]!r}: a link in it leads out of what this node gives")
        return found

    def _covers(self, pattern: str, name: str) -> bool:
        registry = registry_of(name)
        is_public = registry in PUBLIC_REGISTRIES
        if pattern == PUBLIC:
            return is_public or self.is_private_allowed
        if pattern.startswith(f"{registry}/"):
            return fnmatchcase(name, glob.escape(registry) + pattern.removeprefix(registry))
        return (is_public or self.is_private_allowed) and fnmatchcase(name, pattern)


def split_tag(text: str) -> tuple[str, str | None]:
    """The path of a layout and the tag behind it, if there is one."""
    path, separator, tag = text.rpartition(":")
    return (path, tag) if separator and "/" not in tag else (text, None)


def _without_links(pattern: str) -> str:
    """The pattern with no link left in the path before what may vary."""
    kind, _, path = pattern.partition(":")
    if not glob.has_magic(path):
        return f"{kind}:{glob.escape(os.path.realpath(path))}"
    first = next(place for place, character in enumerate(path) if character in "*?[")
    folder, slash, _ = path[:first].rpartition("/")
    return f"{kind}:{glob.escape(os.path.realpath(folder + slash)).rstrip('/')}/{path[len(folder) + 1 :]}"


def _refused(name: str) -> Unsupported:
    shown = name[:MAX_SHOWN]
    return Unsupported(
        f"image {shown!r} is none that this node gives; who serves it has to say --image {shlex.quote(shown)}, or a "
        "pattern of such names"
    )
