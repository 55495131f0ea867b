"""Images out of a real registry on this machine: fetched by skopeo, run in cells, and what goes wrong in a line."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from hone.sandbox.client import Sandbox
from hone.sandbox.errors import ImageError, SandboxError
from hone.sandbox.images.registries import architecture, explain
from hone.sandbox.images.store import ImageStore
from hone.sandbox.node.node import Node
from oci_layouts import Files, Layout, Link

PROGRAMS = ("skopeo", "docker-registry")
missing = [program for program in PROGRAMS if shutil.which(program) is None]
needs_registry = pytest.mark.skipif(bool(missing), reason=f"there is no {' and no '.join(missing)}")
LOGIN = "somebody:$2b$05$WGv1IFCMnRLVQDbGKRjWaefohKDqG9sHddSHHp12v/OqMEUlkk3R6"  # of the password "secret"


def programs() -> Files:
    """A shell and cat of this machine, with their libraries."""
    files: Files = {}
    for program in ("sh", "cat"):
        path = shutil.which(program)
        if path is None:
            pytest.skip(f"there is no {program}")
        files[f"bin/{program}"] = Path(path).read_bytes()
        linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(/\S+)", linked):
            files[library.lstrip("/")] = Path(library).read_bytes()
    return files


@contextlib.contextmanager
def registry(folder: Path, login: str = ""):
    """Its host and port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    auth = f"auth:\n  htpasswd:\n    realm: here\n    path: {folder}/htpasswd\n" if login else ""
    folder.mkdir()
    (folder / "htpasswd").write_text(login + "\n")
    (folder / "config.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\n"
        f"http:\n  addr: 127.0.0.1:{port}\nlog:\n  level: error\n{auth}"
    )
    process = subprocess.Popen(
        ["docker-registry", "serve", str(folder / "config.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"]},  # variables that begin with REGISTRY_ would be settings of it
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"localhost:{port}"
    finally:
        process.kill()
        process.wait()


def push(layout: Layout, tag: str, reference: str, *options: str) -> None:
    command = [
        "skopeo",
        "copy",
        "--dest-tls-verify=false",
        *options,
        f"oci:{layout.folder}:{tag}",
        f"docker://{reference}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "layout")


@pytest.fixture
async def node(cells, tmp_path):
    async with Node("n", images=ImageStore(tmp_path / "store")) as node:
        yield node


@needs_registry
@pytest.mark.parametrize("compress", ["gzip", "zstd"])
async def test_an_image_is_pulled_and_its_layers_lie_as_they_should(node, layout, tmp_path, compress):
    if compress == "zstd" and shutil.which("zstd") is None:
        pytest.skip("there is no zstd")
    layout.add(
        programs(),
        {
            "etc": None,
            "etc/gone": b"1",
            "etc/stays": b"2",
            "data": None,
            "data/old": b"3",
            "turned": None,
            "turned/old": b"4",
            "pair-a": b"same\n",
            "pair-b": Link("pair-a", is_hard=True),
            "to-pair": Link("/pair-a"),
        },
        {
            "etc/.wh.gone": b"",
            "data": None,
            "data/.wh..wh..opq": b"",
            "data/new": b"5",
            ".wh.turned": b"",
            "turned": None,
            "turned/new": b"6",
        },
        compress=compress,
        runtime={"Env": ["WITH=a=b", "PATH=/bin"], "WorkingDir": "/srv/app", "User": "1000:1000"},
    )
    with registry(tmp_path / "registry") as host:
        push(layout, "latest", f"{host}/team/tool:1")
        async with Sandbox(f"{host}/team/tool:1", memory_mb=64, disk_mb=16, node=node) as box:
            result = await box.exec(
                [
                    "sh",
                    "-c",
                    "pwd; echo $WITH; echo /etc/* /data/* /turned/*; cat /to-pair; echo x >> /pair-b; cat /pair-a",
                ]
            )
    assert result.stderr == ""
    where, variable, files, *pair = result.stdout.splitlines()
    assert (where, variable) == ("/srv/app", "a=b")
    assert {"/etc/stays", "/data/new", "/turned/new"} <= set(files.split())
    assert not {"/etc/gone", "/data/old", "/turned/old"} & set(files.split())
    assert pair[0] == "same"


@needs_registry
async def test_an_image_for_several_machines_is_pulled_for_this_one_by_digest(node, layout, tmp_path):
    layout.add({"other": b"1"}, tag="other", architecture="s390x")
    layout.add(programs(), {"ours": b"2"}, tag="ours", architecture=architecture())
    with registry(tmp_path / "registry") as host:
        for tag in ("other", "ours"):
            push(layout, tag, f"{host}/tool:{tag}")
        index = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                {key: one[key] for key in ("mediaType", "digest", "size", "platform")} for one in layout.manifests
            ],
        }
        request = urllib.request.Request(
            f"http://{host}/v2/tool/manifests/all",
            json.dumps(index).encode(),
            {"Content-Type": "application/vnd.oci.image.index.v1+json"},
            method="PUT",
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            digest = answer.headers["Docker-Content-Digest"]
        for name in (f"{host}/tool:all", f"{host}/tool@{digest}", f"{host}/tool:ignored@{digest}"):
            async with Sandbox(name, memory_mb=64, disk_mb=16, node=node) as box:
                assert (await box.exec(["sh", "-c", "echo /o*"])).stdout == "/ours\n"
        wrong = "0" * 64
        with pytest.raises(SandboxError, match="no such image or tag"):
            await node.create(Sandbox(f"{host}/tool@sha256:{wrong}").spec).ready()


@needs_registry
def test_what_goes_wrong_with_a_registry_is_told_in_a_line(layout, tmp_path, monkeypatch):
    store = ImageStore(tmp_path / "store")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    layout.add({"a": b"1"})

    def complaint(reference):
        with pytest.raises(ImageError) as told:
            store.find(reference)
        assert "\n" not in str(told.value)
        assert str(told.value).startswith(f"image {reference!r}: ")
        return str(told.value)

    with registry(tmp_path / "open") as host:
        push(layout, "latest", f"{host}/tool:1")
        assert "no such image or tag" in complaint(f"{host}/tool:2")
        assert "no such image or tag" in complaint(f"{host}/nothing:1")
        there = store.find(f"{host}/tool:1")
    assert "cannot be reached" in complaint(f"{host}/tool:3")
    assert store.find(f"{host}/tool:1") == there  # what was pulled is not asked for again
    with registry(tmp_path / "closed", LOGIN) as host:
        push(layout, "latest", f"{host}/tool:1", "--dest-creds", "somebody:secret")
        assert "wants a login" in complaint(f"{host}/tool:1")
        login = ["skopeo", "login", "--tls-verify=false", "-u", "somebody", "-p", "secret", host]
        subprocess.run(login, check=True, capture_output=True, env={**os.environ}, timeout=60)
        assert store.find(f"{host}/tool:1") == there
    assert list((store.folder / "pulled").glob("tmp*")) == []


def test_complaints_of_programs_become_a_line():
    said = 'time="x" level=info msg="Copying"\ntime="x" level=fatal msg="reading \\"a\\": manifest unknown:\\n gone"\n'
    assert explain("skopeo", said) == (
        'the registry has no such image or tag; skopeo says: reading "a": manifest unknown: gone'
    )
    assert explain("crane", "") == "crane says: nothing"
    assert explain("crane", "Error: GET https://a: UNAUTHORIZED: no").startswith("the registry wants a login; ")


def test_a_registry_elsewhere_is_asked_by_tls_only(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    (tmp_path / "skopeo").write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 1\n')
    (tmp_path / "skopeo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    names = (
        "localhost:5000/a:1",
        "127.0.0.1/a",
        "[::1]:5000/a",
        "localhost.evil.org/a",
        "evil.org/localhost:5000/a",
        "debian:12",
    )
    for name in names:
        with pytest.raises(ImageError):
            ImageStore(tmp_path / "store").find(name)
    assert ["tls-verify=false" in line for line in calls.read_text().splitlines()] == [True] * 3 + [False] * 3
