"""Packages of Debian and Ubuntu as a layer: chosen and fetched by apt, unpacked by us, none of their scripts run."""

import contextlib
import hashlib
import os
import posixpath
import pwd
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO

from hone.sandbox.errors import ImageError
from hone.sandbox.files.archives import TreeLimits
from hone.sandbox.files.beneath import BadArchive, closing, make_folders
from hone.sandbox.files.compression import decompressed
from hone.sandbox.files.files import Tree
from hone.sandbox.files.stacked import Stacked
from hone.sandbox.images.children import run
from hone.sandbox.images.debian_sources import Source, sources_of
from hone.sandbox.images.registries import architecture

STATUS = "/var/lib/dpkg/status"
TRUSTED = "/etc/apt/trusted.gpg.d"
USUAL_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr/lib64", "var/run", "var/lock")
NAME = re.compile(r"[a-z0-9][a-z0-9+.-]*(=[A-Za-z0-9.+:~-]+)?")
APT_SECONDS = 1800.0
LIMITS = TreeLimits(total_bytes=16 << 30, num_entries=1_000_000)
MAX_CONTROL_BYTES = 16 << 20
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60
HOST_SETTINGS = ("Acquire::http", "Acquire::https", "Acquire::Retries")


class Packages:
    """What is to be added to a base. names: packages, also as `name=version`. Raises `ImageError` for what cannot be."""

    def __init__(self, names: Sequence[str], layers: Sequence[str]) -> None:
        for name in names:
            if not NAME.fullmatch(name):
                raise ImageError(f"apt: {name!r} is no name of a package")
        if not layers:
            raise ImageError(
                'apt needs a base that is an image of Debian or Ubuntu; what this machine has, "host" shows'
            )
        self._names = sorted(set(names))
        self._base = Stacked(layers)
        status = self._base.read(STATUS)
        if status is None:
            raise ImageError(f"apt: the base is no image of Debian or Ubuntu: it has no {STATUS}")
        self._status = status
        self._sources = sources_of(self._base)
        if not self._sources:
            raise ImageError("apt: the base names no sources of packages in /etc/apt")

    def key(self) -> str:
        """Stands for the names, the base and its sources. The same key later may have been other versions."""
        content = (
            self._names,
            architecture(),
            self._sources,
            hashlib.sha256(self._status).hexdigest(),
        )
        return repr(content)

    def install(self, layer: Path) -> None:
        """Fill a layer with the packages and what they need, as far as the base does not have it."""
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            self._prepare(root)
            _apt(root, ["update"], self._names)
            _apt(root, ["install", "--download-only", "--no-remove", "--", *self._names], self._names)
            archives = sorted((root / "var/cache/apt/archives").glob("*.deb"))
            self._link_as_base(layer)
            try:
                controls = [_unpack(archive, layer) for archive in archives]
            except (BadArchive, OSError) as error:
                raise ImageError(f"apt: a package for {', '.join(self._names)} cannot be unpacked: {error}") from error
        _join_certificates(layer)
        status = layer / STATUS.lstrip("/")
        status.parent.mkdir(parents=True, exist_ok=True)
        status.write_text(_joined_status(self._status.decode(errors="replace"), controls))

    def _prepare(self, root: Path) -> None:
        """A place for apt with the base's packages and sources, and nothing of the base that apt would run."""
        root.chmod(0o755)
        for folder in ("etc/apt/sources.list.d", "etc/apt/trusted.gpg.d", "keys", "var/lib/dpkg"):
            (root / folder).mkdir(parents=True)
        for folder in ("var/lib/apt/lists/partial", "var/cache/apt/archives/partial"):
            (root / folder).mkdir(parents=True)
        (root / STATUS.lstrip("/")).write_bytes(self._status)
        for name in self._base.names(TRUSTED):
            if (key := self._base.read(f"{TRUSTED}/{name}")) is not None and "/" not in name:
                (root / TRUSTED.lstrip("/") / name).write_bytes(key)
        stanzas = [
            source.stanza(self._place_key(source, root / f"keys/{number}"))
            for number, source in enumerate(self._sources)
        ]
        (root / "etc/apt/sources.list.d/base.sources").write_text("\n".join(stanzas))
        (root / "apt.conf").write_text(_configuration(root))

    def _place_key(self, source: Source, place: Path) -> str:
        """Where apt finds the key that signs a source: the base's own, taken out of it."""
        if not source.signed_by.startswith("/"):
            return source.signed_by
        key = self._base.read(source.signed_by)
        if key is None:
            raise ImageError(f"apt: the base has no {source.signed_by}, which signs {source.uris[0]}")
        placed = place.with_suffix(".asc" if key.startswith(b"-----") else ".gpg")
        placed.write_bytes(key)
        return str(placed)

    def _link_as_base(self, layer: Path) -> None:
        """Where the base has a link for a folder, as /bin often is, packages are unpacked through it."""
        with closing(os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
            for name in USUAL_LINKS:
                if (target := self._base.link(f"/{name}")) is None:
                    continue
                where = posixpath.normpath(posixpath.join("/", posixpath.dirname(name), target))
                with closing(make_folders(root, where)), closing(make_folders(root, posixpath.dirname(name))) as parent:
                    os.symlink(target, posixpath.basename(name), dir_fd=parent)


def _configuration(root: Path) -> str:
    arch = architecture()
    return f"""Dir "{root}/";
Dir::State::status "{root}{STATUS}";
APT::Architecture "{arch}";
APT::Architectures {{ "{arch}"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "{_downloader(root)}";
APT::Update::Post-Invoke-Success "";
Acquire::Languages "none";
Debug::NoLocking "true";
{_host_settings()}
"""


def _downloader(root: Path) -> str:
    """As whom apt fetches: not as root where there is somebody else for it."""
    if os.geteuid() != 0:
        return ""
    try:
        uid = pwd.getpwnam("_apt").pw_uid
    except KeyError:
        return "root"
    for folder in ("var/lib/apt/lists/partial", "var/cache/apt/archives/partial"):
        os.chown(root / folder, uid, -1)
    return "_apt"


def _host_settings() -> str:
    """How this machine reaches the network: proxies, retries."""
    if (program := shutil.which("apt-config")) is None:
        return ""
    done = subprocess.run([program, "dump"], capture_output=True, text=True, timeout=60, check=False)
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith(HOST_SETTINGS))


def _apt(root: Path, arguments: Sequence[str], names: Sequence[str]) -> None:
    if (program := shutil.which("apt-get")) is None:
        raise ImageError(
            f"apt: there is no apt-get here to fetch {', '.join(names)}; build the image on Debian or Ubuntu"
        )
    try:
        done = run(
            [program, "--quiet", "--yes", *arguments],
            APT_SECONDS,
            env={"APT_CONFIG": str(root / "apt.conf"), "LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
        )
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"apt-get takes more than {APT_SECONDS:g} s for {', '.join(names)}") from error
    complaint = _complaint(done.stdout, done.stderr)
    if done.returncode or (arguments[0] == "update" and complaint):
        raise ImageError(
            f"apt-get cannot {arguments[0]} for {', '.join(names)}: {complaint or done.stderr.strip()[-500:]}"
        )


def _complaint(output: str, errors: str) -> str:
    """In one line, what apt says is wrong, with the packages that cannot be had."""
    _, found, unmet = output.partition("The following packages have unmet dependencies:\n")
    said = [" ".join(line.split()) for line in unmet.splitlines() if line.startswith(" ")] if found else []
    said += [line.removeprefix("E: ") for line in errors.splitlines() if line.startswith("E: ")]
    said += [line.removeprefix("W: ") for line in errors.splitlines() if line.startswith("W: Failed to fetch")]
    return "; ".join(said)[:1000]


def _unpack(archive: Path, layer: Path) -> str:
    """Put a package's files into the layer; returns its control file."""
    control: str | None = None
    has_files = False
    for name, content in _members(archive):
        if name.startswith("control.tar"):
            with decompressed(content, archive) as plain:
                control = _control(plain, archive)
        elif name.startswith("data.tar"):
            has_files = True
            with (
                decompressed(content, archive) as plain,
                closing(os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root,
                contextlib.closing(Tree(root)) as tree,
            ):
                tree.unpack("/", plain, LIMITS)
    if control is None or not has_files:
        raise BadArchive(f"{archive.name} is no package of Debian")
    return control


def _members(archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Names and contents of an ar archive, each in a file of its own, as programs want to read from one."""
    with archive.open("rb") as file:
        if file.read(len(AR_MAGIC)) != AR_MAGIC:
            raise BadArchive(f"{archive.name} is no package of Debian")
        while len(header := file.read(AR_HEADER)) == AR_HEADER:
            name, size = header[:16].decode("latin-1").strip().rstrip("/"), header[48:58].strip()
            if not size.isdigit():
                raise BadArchive(f"{archive.name} is broken: a member of {size!r} bytes")
            with tempfile.TemporaryFile() as content:
                _copy(file, content, int(size))
                content.seek(0)
                yield name, content
            file.read(int(size) % 2)


def _copy(source: BinaryIO, target: IO[bytes], num_bytes: int) -> None:
    while num_bytes > 0:
        data = source.read(min(num_bytes, 1 << 20))
        if not data:
            raise BadArchive("a package ends too early")
        target.write(data)
        num_bytes -= len(data)


def _control(plain: BinaryIO, archive: Path) -> str:
    with tarfile.open(fileobj=plain, mode="r|") as members:
        for member in members:
            if member.name.removeprefix("./") == "control" and member.isreg() and member.size < MAX_CONTROL_BYTES:
                content = members.extractfile(member)
                assert content is not None, "a regular member has content"
                return content.read().decode(errors="replace")
    raise BadArchive(f"{archive.name} does not say what it is")


def _joined_status(base: str, controls: Sequence[str]) -> str:
    """The base's list of packages with the new ones, which are unpacked and not configured, as no script has run."""
    new = {_identity(control): control for control in controls}
    kept = [one for one in re.split(r"\n{2,}", base) if one.strip() and _identity(one) not in new]
    added = [
        re.sub(r"^(Package: .*)$", r"\1\nStatus: install ok unpacked", one.strip(), count=1, flags=re.M)
        for one in new.values()
    ]
    return "\n\n".join([*(one.strip("\n") for one in kept), *added]) + "\n\n" if kept or added else ""


def _identity(stanza: str) -> tuple[str, str]:
    found = dict(re.findall(r"^(Package|Architecture): *(\S+)", stanza, re.M))
    return found.get("Package", ""), found.get("Architecture", "")


def _join_certificates(layer: Path) -> None:
    """What the script of ca-certificates does that programs depend on: all certificates in one file."""
    certificates = sorted((layer / "usr/share/ca-certificates").rglob("*.crt"))
    if certificates:
        bundle = layer / "etc/ssl/certs/ca-certificates.crt"
        bundle.parent.mkdir(parents=True, exist_ok=True)
        bundle.write_bytes(
            b"".join(path.read_bytes().rstrip(b"\n") + b"\n" for path in certificates if not path.is_symlink())
        )
