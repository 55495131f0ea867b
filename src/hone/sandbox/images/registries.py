"""Images out of registries, fetched as OCI layouts by skopeo or crane, whichever is there."""

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

from hone.sandbox.errors import ImageError
from hone.sandbox.images.children import run

PULL_SECONDS = 3600.0
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
REFERENCE = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._/:@\[\]-]*")
LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?/")
HUB_NAME = re.compile(r"(?!localhost$)[a-z0-9_-]+")
MESSAGE = re.compile(r'msg=("(?:[^"\\]|\\.)*")')
HINTS = (
    (("manifest unknown", "MANIFEST_UNKNOWN", "name unknown", "NAME_UNKNOWN"), "the registry has no such image or tag"),
    (
        ("unauthorized", "authentication required", "UNAUTHORIZED"),
        "the registry wants a login; `skopeo login` or `crane auth login` keeps one",
    ),
    (("denied", "DENIED"), "the registry does not give it to this login"),
    (("no such host", "connection refused", "i/o timeout", "network is unreachable"), "the registry cannot be reached"),
    (
        ("server gave HTTP response to HTTPS client", "x509:"),
        "the registry's TLS is not in order; without TLS only this machine's own are asked",
    ),
    (("no image found in manifest list", "no child with platform"), "the image is not for this machine"),
)


def pull(reference: str, layout: Path) -> None:
    """Fetch an image into a folder that is not there yet. A registry on this machine may do without TLS.

    Raises `ImageError`, of one line.
    """
    if not REFERENCE.fullmatch(reference):
        raise ImageError(f"image {reference!r} is neither a kind that this store knows nor a reference to a registry")
    for program, arguments in _commands(_without_idle_tag(reference), layout).items():
        if (found := shutil.which(program)) is not None:
            _run(reference, program, [found, *arguments])
            return
    raise ImageError(f"image {reference!r} is in a registry; install skopeo or crane to fetch it")


def registry_of(reference: str) -> str:
    """Where a reference is to be asked for, as the programs understand it: a first part without dots is no host's name."""
    first, slash, _ = reference.partition("/")
    return "docker.io" if not slash or HUB_NAME.fullmatch(first) else first


def architecture() -> str:
    """Of this machine, as images name it."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


def explain(program: str, said: str) -> str:
    """What a program's complaint is about, in a line."""
    found = MESSAGE.findall(said)
    last = _unquoted(found[-1]) if found else next(iter(reversed(said.strip().splitlines())), "nothing")
    hint = next((f"{hint}; " for words, hint in HINTS if any(word in said for word in words)), "")
    return f"{hint}{program} says: {' '.join(last.split())[-500:]}"


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:  # quoted as Go does it, not as JSON is
        return text.strip('"')


def _commands(reference: str, layout: Path) -> dict[str, list[str]]:
    is_local = LOCAL_HOST.match(reference) is not None
    return {
        "skopeo": [
            "copy",
            *(["--src-tls-verify=false"] if is_local else []),
            f"docker://{reference}",
            f"oci:{layout}",
        ],
        "crane": [
            "pull",
            *(["--insecure"] if is_local else []),
            "--format=oci",
            f"--platform=linux/{architecture()}",
            reference,
            str(layout),
        ],
    }


def _without_idle_tag(reference: str) -> str:
    """A digest says it all; with a tag beside it skopeo refuses."""
    name, at, digest = reference.partition("@")
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition(':')[0]}{at}{digest}" if at else reference


def _run(reference: str, program: str, command: list[str]) -> None:
    try:
        done = run(command, PULL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"image {reference!r}: {program} takes more than {PULL_SECONDS:g} s") from error
    if done.returncode:
        raise ImageError(f"image {reference!r}: {explain(program, done.stderr)}")
