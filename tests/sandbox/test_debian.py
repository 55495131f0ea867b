"""Packages of Debian in images: what apt is given, what it says, and a real repository on this machine."""

import functools
import gzip
import hashlib
import http.server
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.sandbox.client import Sandbox
from hone.sandbox.errors import ImageError
from hone.sandbox.files.beneath import BadArchive
from hone.sandbox.files.stacked import Stacked
from hone.sandbox.images.debian_packages import _complaint, _joined_status, _unpack
from hone.sandbox.images.debian_sources import Source, sources_of
from hone.sandbox.images.store import ImageStore
from hone.sandbox.node.node import Node

PROGRAMS = ("apt-get", "dpkg-deb", "gpg", "gpgv")
missing = [program for program in PROGRAMS if shutil.which(program) is None]
needs_apt = pytest.mark.skipif(bool(missing), reason=f"there is no {' and no '.join(missing)}")


def base_of(folder, sources="", status="", suffix="sources"):
    for name in ("etc/apt/sources.list.d", "var/lib/dpkg", "usr/bin", "usr/share/keyrings"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / "bin").exists():
        (folder / "bin").symlink_to("usr/bin")
    (folder / "var/lib/dpkg/status").write_text(status)
    (folder / f"etc/apt/sources.list.d/here.{suffix}").write_text(sources)
    return folder


# --- layers over one another


def test_what_a_layer_hides_is_not_found_below(tmp_path):
    top, bottom = tmp_path / "top", tmp_path / "bottom"
    for name, content in (("etc/a", "1"), ("etc/b", "2"), ("data/old", "3")):
        (bottom / name).parent.mkdir(parents=True, exist_ok=True)
        (bottom / name).write_text(content)
    (top / "etc").mkdir(parents=True)
    (top / "etc/b").write_text("new")
    (top / "data").mkdir()
    os.setxattr(top / "data", "user.overlay.opaque", b"y")
    os.mknod(top / "etc/a", 0o020000, 0)
    stacked = Stacked([str(top), str(bottom)])
    assert stacked.read("/etc/a") is None
    assert stacked.read("/etc/b") == b"new"
    assert stacked.read("/data/old") is None
    assert stacked.names("/etc") == ["b"]
    assert stacked.names("/nowhere") == []


def test_links_of_a_layer_lead_nowhere_outside(tmp_path):
    (tmp_path / "secret").write_text("host")
    layer = tmp_path / "layer"
    (layer / "etc").mkdir(parents=True)
    (layer / "etc/real").write_text("inside")
    (layer / "etc/link").symlink_to("/etc/real")
    (layer / "etc/up").symlink_to("../../secret")
    (layer / "etc/absolute").symlink_to(tmp_path / "secret")
    (layer / "etc/round").symlink_to("round")
    (layer / "out").symlink_to(tmp_path)
    os.mkfifo(layer / "etc/fifo")
    stacked = Stacked([str(layer)])
    assert stacked.read("/etc/link") == b"inside"
    for name in ("up", "absolute", "round", "fifo"):
        assert stacked.read(f"/etc/{name}") is None
    assert stacked.read("/out/secret") is None
    assert stacked.link("/etc/up") == "../../secret"


# --- sources


def test_sources_are_read_in_both_forms(tmp_path):
    stanzas = (
        "# Debian\nTypes: deb deb-src\nURIs: http://a/debian https://b/debian\nSuites: one one-updates\n"
        "Components: main\nSigned-By:\n -----BEGIN\n .\n key\n\nEnabled: no\nTypes: deb\nURIs: file:/x\nSuites: x\n"
    )
    base_of(tmp_path, stanzas)
    lines = (
        "# no\ndeb [arch=amd64 signed-by=/k.gpg] https://c/d two main contrib # yes\ndeb-src http://x y z\ndeb broken\n"
    )
    base_of(tmp_path, lines, suffix="list")
    lines, stanzas = sources_of(Stacked([str(tmp_path)]))
    assert lines == Source(("https://c/d",), ("two",), ("main", "contrib"), "/k.gpg")
    assert stanzas.uris == ("http://a/debian", "https://b/debian")
    assert stanzas.suites == ("one", "one-updates")
    assert stanzas.signed_by == "\n -----BEGIN\n .\n key"
    assert "Signed-By: \n -----BEGIN\n .\n key" in stanzas.stanza(stanzas.signed_by)


@pytest.mark.parametrize(
    "text",
    [
        "Types: deb\nURIs: file:/etc\nSuites: x\n",
        "Types: deb\nURIs: http://a ssh://root@host/x\nSuites: x\n",
        "Types: deb\nURIs: http://a\nSuites: x\nTrusted: yes\n",
    ],
)
def test_a_source_that_nobody_can_check_is_refused(tmp_path, text):
    with pytest.raises(ImageError, match="only s"):
        sources_of(Stacked([str(base_of(tmp_path, text))]))


@settings(database=None, deadline=None)
@given(st.text(max_size=200), st.sampled_from(["list", "sources"]))
def test_sources_of_any_text_are_read_or_refused(tmp_path_factory, text, suffix):
    folder = base_of(tmp_path_factory.getbasetemp() / f"any-{suffix}")
    (folder / f"etc/apt/sources.list.d/here.{suffix}").write_text(text, errors="surrogatepass")
    try:
        for source in sources_of(Stacked([str(folder)])):
            assert all(uri.startswith(("http://", "https://")) for uri in source.uris)
    except (ImageError, UnicodeError):
        pass


# --- what apt says, and packages


def test_a_complaint_names_the_packages():
    unmet = "Reading...\nThe following packages have unmet dependencies:\n a : Depends: b (>= 2) but 1 is to be\n"
    errors = "W: noise\nE: Unable to correct problems, you have held broken packages.\n"
    assert _complaint(unmet, errors) == (
        "a : Depends: b (>= 2) but 1 is to be; Unable to correct problems, you have held broken packages."
    )


def test_the_list_of_packages_has_the_new_ones_in_place_of_the_old():
    base = (
        "Package: a\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1\n\nPackage: b\nArchitecture: all\n\n"
    )
    joined = _joined_status(base, ["Package: a\nArchitecture: amd64\nVersion: 2\n"])
    assert joined == (
        "Package: b\nArchitecture: all\n\nPackage: a\nStatus: install ok unpacked\nArchitecture: amd64\nVersion: 2\n\n"
    )
    assert _joined_status("", []) == ""


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"!<arch>\n" + b"x" * 60, b"!<arch>\ndata.tar         0 0 0 0 9999999   `\nx"]
)
def test_what_is_no_package_is_refused(tmp_path, content):
    (tmp_path / "a.deb").write_bytes(content)
    (tmp_path / "layer").mkdir()
    with pytest.raises(BadArchive):
        _unpack(tmp_path / "a.deb", tmp_path / "layer")


@pytest.mark.parametrize(
    ("apt", "words"),
    [("../x", "no name of a package"), ("a b", "no name of a package"), ("-o", "no name of a package")],
)
def test_a_name_that_apt_could_take_for_something_else_is_refused(tmp_path, apt, words):
    (tmp_path / "image.toml").write_text(f'base = "dir:{base_of(tmp_path / "base")}"\napt = ["{apt}"]\n')
    with pytest.raises(ImageError, match=words):
        ImageStore(tmp_path / "store").find(f"build:{tmp_path}/image.toml")


def test_a_base_without_packages_is_told(tmp_path):
    for base, words in (("host", "image of Debian"), (f"dir:{tmp_path}", "it has no /var/lib/dpkg/status")):
        (tmp_path / "image.toml").write_text(f'base = "{base}"\napt = ["jq"]\n')
        with pytest.raises(ImageError, match=words):
            ImageStore(tmp_path / "store").find(f"build:{tmp_path}/image.toml")


# --- a repository


class Repository:
    """Packages of our own behind HTTP, signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = folder / "key.gpg"
        self._home = folder / "gpg"
        self._home.mkdir(parents=True, mode=0o700)
        (folder / "www" / "main").mkdir(parents=True)
        self._gpg("--quick-generate-key", "--passphrase", "", "tests@example.org", "rsa2048", "sign", "never")
        self.key.write_bytes(self._gpg("--export"))

    def add(self, name: str, files: dict[str, str], depends: str = "", version: str = "1") -> None:
        tree = self.folder / f"tree-{name}"
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(content)
            (tree / path).chmod(0o755)
        (tree / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@b>\nDescription: a test\n"
        (tree / "DEBIAN/control").write_text(control + (f"Depends: {depends}\n" if depends else ""))
        (tree / "DEBIAN/postinst").write_text("#!/bin/sh\ntouch /script-has-run\n")
        (tree / "DEBIAN/postinst").chmod(0o755)
        archive = self.folder / "www" / f"{name}_{version}_all.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(archive)], check=True, capture_output=True
        )

    def publish(self) -> None:
        www = self.folder / "www"
        stanzas = []
        for archive in sorted(www.glob("*.deb")):
            control = subprocess.run(
                ["dpkg-deb", "-f", str(archive)], check=True, capture_output=True, text=True
            ).stdout
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            stanzas.append(
                f"{control.strip()}\nFilename: {archive.name}\nSize: {archive.stat().st_size}\nSHA256: {digest}\n"
            )
        packages = "\n".join(stanzas).encode()
        lines = []
        for name, content in (("Packages", packages), ("Packages.gz", gzip.compress(packages))):
            (www / name).write_bytes(content)
            lines.append(f" {hashlib.sha256(content).hexdigest()} {len(content)} {name}")
        (www / "Release").write_text("Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n" + "\n".join(lines) + "\n")
        (www / "InRelease").write_bytes(self._gpg("--clearsign", "--output", "-", str(www / "Release")))

    def _gpg(self, *arguments: str) -> bytes:
        command = ["gpg", "--batch", "--homedir", str(self._home), "--pinentry-mode", "loopback", *arguments]
        return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self._home), "--kill", "all"], check=False, capture_output=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def repository(tmp_path):
    made = Repository(tmp_path / "repository")
    made.add("tool", {"bin/tool": "#!/bin/sh\ncat /usr/share/lib-of-tool\n"}, depends="lib-of-tool, there-already")
    made.add("lib-of-tool", {"usr/share/lib-of-tool": "from the library\n"})
    made.add("needy", {"usr/share/needy": ""}, depends="lacking (>= 2)")
    made.publish()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=made.folder / "www"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    made.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield made
    server.shutdown()
    server.server_close()
    thread.join()
    made.close()


@pytest.fixture
def definition(repository, tmp_path):
    status = "Package: there-already\nStatus: install ok installed\nArchitecture: all\nVersion: 3\nMaintainer: A <a@b>\nDescription: x\n\n"
    sources = f"Types: deb\nURIs: {repository.address}\nSuites: ./\nSigned-By: /usr/share/keyrings/ours.gpg\n"
    base = base_of(tmp_path / "base", sources, status)
    shutil.copy(repository.key, base / "usr/share/keyrings/ours.gpg")

    def write(*packages):
        (tmp_path / "image.toml").write_text(f'base = "dir:{base}"\napt = {list(packages)}\n'.replace("'", '"'))
        return f"build:{tmp_path}/image.toml"

    return write


@needs_apt
def test_packages_and_what_they_need_become_a_layer_that_is_kept(definition, repository, tmp_path):
    store = ImageStore(tmp_path / "store")
    image = store.find(definition("tool"))
    layer, base = map(Path, image.layers)
    assert (layer / "bin").is_symlink()  # as in the base, or it would hide what is there
    assert (layer / "usr/bin/tool").stat().st_mode & 0o777 == 0o755
    assert (layer / "usr/share/lib-of-tool").read_text() == "from the library\n"
    status = (layer / "var/lib/dpkg/status").read_text()
    assert "Package: there-already\nStatus: install ok installed" in status
    assert "Package: tool\nStatus: install ok unpacked" in status
    assert not list(tmp_path.rglob("script-has-run"))
    shutil.rmtree(repository.folder / "www")
    assert store.find(definition("tool")).layers == (str(layer), str(base))
    with pytest.raises(ImageError, match="update for lib-of-tool"):
        store.find(definition("lib-of-tool"))
    assert not list((tmp_path / "store" / "layers").glob(".*"))


@needs_apt
def test_what_cannot_be_had_is_named(definition, tmp_path):
    store = ImageStore(tmp_path / "store")
    for package, words in (
        ("no-such-thing", "Unable to locate package no-such-thing"),
        ("tool=9", "Version '9' for 'tool' was not found"),
        ("needy", r"needy : Depends: lacking \(>= 2\)"),
    ):
        with pytest.raises(ImageError, match=words) as told:
            store.find(definition(package))
        assert "\n" not in str(told.value)


@needs_apt
def test_a_repository_that_was_tampered_with_is_refused(definition, repository, tmp_path):
    packages = repository.folder / "www" / "lib-of-tool_1_all.deb"
    packages.write_bytes(packages.read_bytes()[:-1] + b"x")
    with pytest.raises(ImageError, match="lib-of-tool"):
        ImageStore(tmp_path / "store").find(definition("tool"))
    (repository.folder / "www" / "InRelease").write_text((repository.folder / "www" / "Release").read_text())
    with pytest.raises(ImageError, match="update"):
        ImageStore(tmp_path / "store").find(definition("tool"))


@needs_apt
@pytest.mark.network
async def test_git_and_jq_of_debian_work_in_a_cell(cells, tmp_path):
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not keyring.exists():
        pytest.skip(f"there is no {keyring}")
    sources = (
        f"Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm\nComponents: main\nSigned-By: {keyring}\n"
    )
    base = base_of(tmp_path / "base", sources)
    shutil.copy(keyring, base / "usr/share/keyrings")
    for name in ("sbin", "lib", "lib64"):
        (base / "usr" / name).mkdir()
        (base / name).symlink_to(f"usr/{name}")
    (tmp_path / "image.toml").write_text(f'base = "dir:{base}"\napt = ["git", "jq", "dash", "ca-certificates"]\n')
    async with (
        Node("n", images=ImageStore(tmp_path / "store")) as node,
        Sandbox(f"build:{tmp_path}/image.toml", memory_mb=256, node=node) as box,
    ):
        result = await box.exec(
            ["sh", "-c", "git init -q r && cd r && echo '{\"a\": 42}' | jq .a && git status --short"]
        )
    assert (result.stdout, result.exit_code) == ("42\n", 0), result.stderr
