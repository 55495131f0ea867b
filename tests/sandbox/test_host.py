import os
import subprocess
import sys
from pathlib import Path

import pytest

from hone.sandbox.cells.cgroups import Cgroups, sweep
from hone.sandbox.cells.host import (
    CgroupFolders,
    _has_all_ids,
    _has_whole_proc,
    examine,
    find_cgroups,
    host_image,
    look,
)
from hone.schema.sandboxes import SandboxSpec


def cgroup_files(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "cgroup.procs").touch()
    return folder


def test_cgroups_of_a_hybrid_machine_are_found_where_this_process_is(tmp_path: Path) -> None:
    unified = cgroup_files(tmp_path / "unified" / "job")
    memory = cgroup_files(tmp_path / "memory" / "job")
    (unified / "cgroup.controllers").write_text("hugetlb\n")
    (tmp_path / "mountinfo").write_text(
        f"30 1 0:26 / {tmp_path}/unified rw - cgroup2 cgroup2 rw\n31 1 0:27 / {tmp_path}/memory rw - cgroup cgroup rw,memory\n"
        f"32 1 0:28 / {tmp_path}/pids rw - cgroup cgroup rw,pids\n"
    )
    (tmp_path / "cgroup").write_text("4:memory:/job\n3:pids:/not/ours\n0::/job\n")
    found = find_cgroups(tmp_path / "mountinfo", tmp_path / "cgroup")
    assert found == CgroupFolders(unified, frozenset(), {"memory": memory})


def test_cgroups_of_a_container_are_found_below_its_root(tmp_path: Path) -> None:
    folder = cgroup_files(tmp_path / "own")
    (folder / "cgroup.controllers").write_text("cpu memory pids io\n")
    (tmp_path / "mountinfo").write_text(f"30 1 0:26 /docker/abc {tmp_path} rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "cgroup").write_text("0::/docker/abc/own\n")
    found = find_cgroups(tmp_path / "mountinfo", tmp_path / "cgroup")
    assert found == CgroupFolders(folder, frozenset({"cpu", "memory", "pids"}), {})


def test_no_cgroups_are_no_trouble(tmp_path: Path) -> None:
    assert find_cgroups(tmp_path / "none", tmp_path / "none") == CgroupFolders()
    cgroups = Cgroups(CgroupFolders())
    cgroup = cgroups.create("cell", SandboxSpec(), 0)
    assert not cgroup.can_freeze
    assert cgroup.enter() is None
    with cgroup.entrances() as entrances:
        assert entrances == (None, [])
    assert cgroup.remove()
    cgroups.close()


def test_the_sweep_leaves_what_belongs_to_living_processes(tmp_path: Path) -> None:
    living = Cgroups(CgroupFolders(unified=tmp_path))
    (tmp_path / "hone-cells-4194303-12345-0").mkdir()
    (tmp_path / "hone-cells-4194303-12345-0" / "cell-1").mkdir()
    (tmp_path / "somebody-else").mkdir()
    assert sweep(CgroupFolders(unified=tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "somebody-else"])
    living.close()


def test_what_is_missing_is_said_with_what_is_lost_by_it() -> None:
    findings = examine(look())
    assert len({finding.name for finding in findings}) == len(findings)
    assert all(finding.lost for finding in findings)


def test_the_hosts_image_shows_programs_and_no_secrets() -> None:
    image = host_image()
    (etc,) = (Path(bind.source) for bind in image.binds if bind.target == "/etc")
    assert (etc / "passwd").read_text().startswith("root:x:0:0")
    assert not (etc / "shadow").exists()
    assert not (etc / "ssl" / "private").exists()
    assert {bind.target for bind in image.binds} >= {"/usr", "/etc"}
    assert not any(bind.is_writable for bind in image.binds)


def test_ids_are_given_where_there_are_enough_of_them(tmp_path: Path) -> None:
    for text, is_enough in (("0 0 4294967295\n", True), ("0 1000000 65536\n", False), ("0 0 1\n", False), ("", False)):
        (tmp_path / "uid_map").write_text(text)
        assert _has_all_ids(tmp_path / "uid_map") is is_enough


def test_a_proc_of_which_parts_are_hidden_is_seen(tmp_path: Path) -> None:
    whole = (
        "24 1 0:22 / /proc rw - proc proc rw\n30 24 0:30 / /proc/sys/fs/binfmt_misc rw - binfmt_misc binfmt_misc rw\n"
    )
    (tmp_path / "mountinfo").write_text(whole)
    assert _has_whole_proc(tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_text(f"{whole}31 24 0:31 / /proc/acpi ro - tmpfs tmpfs ro\n")
    assert not _has_whole_proc(tmp_path / "mountinfo")


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_cells_are_made_in_the_user_namespace_of_a_container() -> None:
    """Root there has one id here, and cells do without ranges of their own."""
    if subprocess.run(["unshare", "-Ur", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces")
    done = subprocess.run(
        ["unshare", "-Ur", sys.executable, "-m", "hone.cli.main", "sandbox", "run", "python", "--", "id", "-u"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")
