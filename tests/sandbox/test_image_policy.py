"""Which images clients of a node may name: what is on its disk or in its network only where its operator says so."""

import os
from pathlib import Path

import pytest

from hone.sandbox.client import Sandbox
from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.gateway.discovery import Fixed
from hone.sandbox.gateway.gateway import Gateway
from hone.sandbox.images.policy import PUBLIC, ImagePolicy
from hone.sandbox.images.store import ImageStore
from hone.sandbox.node.lifecycle import Limits
from hone.sandbox.node.node import Node
from hone.sandbox.wire.addresses import parse_address
from hone.sandbox.wire.serve import NodeServer
from hone.schema.sandboxes import Outcome, SandboxSpec
from oci_layouts import archive_of

SERVED = ImagePolicy((PUBLIC,))
NAMES = ["dir:/", "dir:/root", "tar:/dev/zero", "oci:/root", "oci:/root:1", "build:/etc/shadow", "127.0.0.1:5000/x"]


def is_admitted(policy: ImagePolicy, name: str) -> bool:
    try:
        policy.admitted(name)
    except Unsupported:
        return False
    return True


@pytest.mark.parametrize(
    "name", ["python", "host", "debian:12", "name/image", "ghcr.io/a/b@sha256:0", "docker.io/library/debian", "dirs:1"]
)
def test_public_images_are_given(name: str) -> None:
    assert SERVED.admitted(name) == name
    assert ImagePolicy().admitted(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *NAMES,
        *("", "dir", "tar", "oci", "build", "dir:", "dir:etc", "tar:\0", "a b", "-x", "../etc", "dir://etc"),
        *("localhost/x", "LOCALHOST/x", "localhost:5000/x", "10.0.0.1/x", "[::1]:5000/x", "2130706433:80/x"),
        *("registry:1@y/z", "registry.internal/x", "ghcr.io:80/x", "GHCR.IO/x", "user@ghcr.io/x"),
    ],
)
def test_what_is_on_the_disk_or_in_the_network_is_not(name: str) -> None:
    with pytest.raises(Unsupported, match="image"):
        SERVED.admitted(name)


def test_without_a_pattern_for_it_the_disk_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "realpath", None)
    for policy in (SERVED, ImagePolicy(("*", "?*:*", "tar:/srv/*"))):
        with pytest.raises(Unsupported, match=r"--image dir:/root"):
            policy.admitted("dir:/root")


def test_a_pattern_gives_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "one").mkdir(parents=True)
    (images / "in").symlink_to("one")
    (images / "out").symlink_to("/")
    (tmp_path / "link").symlink_to("images")
    policy = ImagePolicy((f"dir:{images}/*", f"oci:{images}/*"))
    assert policy.admitted(f"dir:{images}/one") == f"dir:{images}/one"
    assert policy.admitted(f"dir:{images}//./one/") == f"dir:{images}/one"
    assert policy.admitted(f"dir:{images}/in") == f"dir:{images}/one"
    assert policy.admitted(f"oci:{images}/in:tag") == f"oci:{images}/one:tag"
    for end in ("/out", "/out/etc", "/..", "/../images/one", "/one/../..", "", "/"):
        assert not is_admitted(policy, f"dir:{images}{end}"), end
        assert not is_admitted(policy, f"oci:{images}{end}"), end
    assert not is_admitted(policy, f"oci:{images}/out:tag")
    assert not is_admitted(policy, f"tar:{images}/one")
    assert not is_admitted(policy, "debian:12")
    through_link = ImagePolicy((f"dir:{tmp_path}/link/o*", f"dir:{images}/in"))
    assert through_link.admitted(f"dir:{tmp_path}/link/one") == f"dir:{images}/one"
    assert through_link.admitted(f"dir:{images}/in") == f"dir:{images}/one"
    assert not is_admitted(through_link, f"dir:{tmp_path}/link/out")


def test_a_registry_is_given_where_it_is_spelled_out() -> None:
    policy = ImagePolicy(("10.0.0.1:5000/team/*", "[::1]:5000/*", "ghcr.io/team/*", "*/open:*"))
    for name in ("10.0.0.1:5000/team/x:1", "[::1]:5000/x", "ghcr.io/team/x", "quay.io/open:1"):
        assert is_admitted(policy, name), name
    for name in ("10.0.0.1:5000/other", "ghcr.io/other", "10.0.0.2/open:1", "debian:12"):
        assert not is_admitted(policy, name), name
    assert is_admitted(ImagePolicy((PUBLIC,), is_private_allowed=True), "10.0.0.1:5000/x")
    assert not is_admitted(ImagePolicy((PUBLIC,), is_private_allowed=True), "dir:/")


@pytest.mark.parametrize("pattern", ["", "dir:", "dir:*", "tar:srv/*", "oci:/srv/../*"])
def test_a_pattern_that_means_nothing_is_told(pattern: str) -> None:
    with pytest.raises(ValueError, match="absolute path"):
        ImagePolicy((pattern,))


async def test_clients_cannot_name_what_is_on_the_nodes_disk(cells, tmp_path):
    small = SandboxSpec(memory_mb=64, disk_mb=16)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "given.tar").write_bytes(archive_of({"etc": None, "etc/name": b"given"}))
    policy = ImagePolicy((PUBLIC, f"tar:{tmp_path}/images/*"))
    async with (
        Node("n", limits=Limits(max_warm=0), images=ImageStore(tmp_path / "store"), images_allowed=policy) as node,
        NodeServer(node, f"unix:{tmp_path}/node") as server,
        Gateway([Fixed(parse_address(server.address))], f"unix:{tmp_path}/gateway") as gateway,
    ):
        for address in (server.address, gateway.address):
            for name in (*NAMES, f"tar:{tmp_path}/images/../secret.tar"):
                with pytest.raises(SandboxError, match="image") as refused:
                    async with Sandbox(spec=SandboxSpec(image=name), node=address) as box:
                        await box.ready()
                assert refused.value.outcome is Outcome.POLICY_DENIED
            async with Sandbox(f"tar:{tmp_path}/images/given.tar", node=address, memory_mb=64) as box:
                assert await box.read("/etc/name") == b"given"
            async with Sandbox(spec=small, node=address) as box:
                assert (await box.exec(["echo", "works"])).stdout == "works\n"
        assert node.statistics()["sandbox/failed"] == 0


async def test_preloaded_modules_are_there_before_a_snippet(cells):
    async with Node("n", limits=Limits(max_warm=0), preloads=["colorsys"]) as node:
        box = node.create(SandboxSpec(memory_mb=128, disk_mb=16))
        assert (await box.snippet("import sys; print('colorsys' in sys.modules)")).stdout == "True\n"
    with pytest.raises(SandboxError, match="no_such_module"):
        async with Node("n", preloads=["no_such_module"]):
            pass
