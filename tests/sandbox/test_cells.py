import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.host import host_image
from hone.sandbox.cells.plan import Bind, Image
from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.files.beneath import closing, open_beneath
from hone.schema.sandboxes import Outcome, SandboxSpec

SMALL = SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64)


async def test_a_program_runs_and_says_what_it_has_to_say(cell: Cell) -> None:
    result = await cell.exec(["sh", "-c", "echo out; echo problem >&2; exit 3"])
    assert (result.outcome, result.exit_code) == (Outcome.EXITED, 3)
    assert (result.stdout, result.stderr) == ("out\n", "problem\n")
    assert 0 < result.usage.wall_seconds < 30
    assert result.usage.peak_memory_bytes > 100_000


async def test_this_python_runs_in_the_default_image(cell: Cell) -> None:
    result = await cell.exec(["python3", "-c", "import sys; print(6 * 7, sys.version_info[:2])"])
    assert result.stdout == f"42 {sys.version_info[:2]}\n", result.stderr


async def test_input_environment_and_folder_reach_the_program(cell: Cell) -> None:
    await cell.exec(["mkdir", "-p", "deep/er"])
    result = await cell.exec(
        ["sh", "-c", "cat; echo $COLOUR; pwd"], stdin=b"given\n", env={"COLOUR": "blue"}, cwd="deep/er"
    )
    assert result.stdout == "given\nblue\n/work/deep/er\n"


async def test_more_input_than_a_pipe_holds_arrives_whole(cell: Cell) -> None:
    result = await cell.exec(["wc", "-c"], stdin=b"x" * 1_000_000)
    assert result.stdout.strip() == "1000000"


async def test_a_program_that_does_not_exist_is_127_and_a_file_that_is_none_126(cell: Cell) -> None:
    missing = await cell.exec(["no-such-program"])
    assert (missing.exit_code, missing.stderr) == (127, "no-such-program: no such program\n")
    unfit = await cell.exec(["/etc/passwd"])
    assert unfit.exit_code == 126
    nowhere = await cell.exec(["true"], cwd="/nowhere")
    assert nowhere.exit_code == 127


async def test_requests_that_cannot_be_kept_are_refused(cell: Cell) -> None:
    with pytest.raises(ValueError, match="argv is empty"):
        await cell.exec([])
    with pytest.raises(ValueError, match="write them to a file"):
        await cell.exec(["echo", "x" * 200_000])
    with pytest.raises(ValueError, match="zero byte"):
        await cell.exec(["echo", "a\0b"])


async def test_a_late_program_is_killed_with_its_children(cell: Cell) -> None:
    result = await cell.exec(["sh", "-c", "sleep 60 & sleep 60"], timeout_seconds=0.2)
    assert (result.outcome, result.exit_code) == (Outcome.TIMEOUT, -signal.SIGKILL)
    await until_sleepers(cell, 0)


async def test_a_daemon_survives_its_program_and_dies_at_a_timeout_or_with_the_cell(cells: Cells, cell: Cell) -> None:
    await cell.exec(["sh", "-c", "setsid sleep 61 >/dev/null 2>&1 &"])
    await until_sleepers(cell, 1)
    result = await cell.exec(["sh", "-c", "(setsid sleep 62 &) ; sleep 60"], timeout_seconds=0.3)
    assert result.outcome is Outcome.TIMEOUT
    if cell.cgroup is not None and cell.cgroup.can_freeze:
        await until_sleepers(cell, 1)  # the first one; without cgroups a daemon lives as long as the cell
    await cell.destroy()


async def test_a_program_that_dies_of_a_signal_says_so(cell: Cell) -> None:
    result = await cell.exec(["sh", "-c", "kill -SEGV $$"])
    assert (result.outcome, result.exit_code) == (Outcome.SIGNALLED, -signal.SIGSEGV)


async def test_many_programs_run_at_once(cell: Cell) -> None:
    results = await asyncio.gather(*(cell.exec(["echo", str(number)]) for number in range(40)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(40)]


async def test_a_cancelled_exec_takes_its_program_along(cell: Cell) -> None:
    running = asyncio.create_task(cell.exec(["sleep", "60"]))
    await until_sleepers(cell, 1)
    running.cancel()
    await asyncio.wait([running])
    await until_sleepers(cell, 0)


async def test_a_conversation_with_a_program(cell: Cell) -> None:
    program = await cell.spawn(["cat"])
    await program.write(b"hello\n")
    assert await program.read() == b"hello\n"
    program.end_input()
    assert await program.read() == b""
    assert await program.wait() == 0
    await program.close()


async def test_a_program_can_be_interrupted_and_killed(cell: Cell) -> None:
    program = await cell.spawn(["sh", "-c", "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.01; done"])
    assert await program.read() == b"ready\n"
    program.interrupt()
    assert await program.wait() == 5
    assert await program.read() == b"caught\n"
    await program.close()
    other = await cell.spawn(["sleep", "60"])
    other.kill()
    assert await other.wait() == -signal.SIGKILL
    await other.close()


async def test_a_program_can_have_a_terminal(cell: Cell) -> None:
    program = await cell.spawn(["sh", "-c", "stty size; test -t 0 && test -t 1 && echo terminal"], terminal=(33, 99))
    shown = b""
    while piece := await program.read():
        shown += piece
    assert shown.replace(b"\r", b"") == b"33 99\nterminal\n"
    assert await program.wait() == 0
    await program.close()


async def test_cells_are_apart(cells: Cells) -> None:
    one, other = await asyncio.gather(cells.create(SMALL), cells.create(SMALL))
    await one.exec(["sh", "-c", "echo secret > /work/file; sleep 60 >/dev/null 2>&1 &"])
    seen = await other.exec(["sh", "-c", "cat /work/file; set -- /proc/[0-9]*; echo $#"])
    assert seen.stdout.split() == ["2"]  # the agent and the shell
    if cells.host.has_id_ranges:
        assert one.uid_base != other.uid_base


async def test_many_cells_at_once(cells: Cells) -> None:
    made = await asyncio.gather(*(cells.create(SMALL) for _ in range(24)))
    results = await asyncio.gather(*(cell.exec(["echo", cell.name]) for cell in made))
    assert [result.stdout.strip() for result in results] == [cell.name for cell in made]


async def test_a_paused_cell_does_nothing_until_it_is_resumed(cell: Cell) -> None:
    if cell.cgroup is None or not cell.cgroup.can_freeze:
        pytest.skip("no cgroup v2 for this user")
    await cell.pause()
    running = asyncio.create_task(cell.exec(["echo", "alive"]))
    done, _ = await asyncio.wait([running], timeout=0.2)
    assert not done
    await cell.resume()
    assert (await running).stdout == "alive\n"
    await cell.pause()
    await cell.destroy()


async def test_a_destroyed_cell_refuses_and_lets_go(cells: Cells, cell: Cell) -> None:
    running = asyncio.create_task(cell.exec(["sleep", "60"]))
    await asyncio.sleep(0)
    await cell.destroy()
    await cell.destroy()
    with pytest.raises(SandboxError, match="destroyed") as caught:
        await running
    assert caught.value.outcome is Outcome.AGENT_LOST
    with pytest.raises(SandboxError, match="destroyed"):
        await cell.exec(["true"])


async def test_a_cell_whose_first_process_dies_is_lost_and_typed(cells: Cells, cell: Cell) -> None:
    running = asyncio.create_task(cell.exec(["sleep", "60"]))
    await asyncio.sleep(0)
    os.kill(cell.pid, signal.SIGKILL)
    with pytest.raises(SandboxError, match="agent is gone") as caught:
        await running
    assert caught.value.outcome.is_infra


async def test_the_death_of_the_spawner_takes_its_cells_along_and_the_next_cell_gets_another(cells: Cells) -> None:
    one = await cells.create(SMALL)
    spawner = int(Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(spawner, signal.SIGKILL)
    with pytest.raises(SandboxError, match="agent"):
        await one.exec(["sleep", "60"])
    other = await cells.create(SMALL)
    assert (await other.exec(["echo", "well"])).stdout == "well\n"
    await reap_orphans()


async def test_an_agent_that_talks_nonsense_costs_its_own_cell_only(cells: Cells, cell: Cell) -> None:
    liar = Cell("liar", SMALL, Image(), 0, 0, lambda _: asyncio.sleep(0))
    with liar.open() as theirs:
        theirs.send(b"x" * 39)
        with pytest.raises(SandboxError, match="nonsense"):
            await liar.until_ready([])
    assert (await cell.exec(["echo", "well"])).stdout == "well\n"
    await liar.destroy()


async def test_a_cancelled_creation_leaves_nothing(cells: Cells) -> None:
    for turns in range(6):
        creating = asyncio.create_task(cells.create(SMALL))
        for _ in range(turns):
            await asyncio.sleep(0)
        creating.cancel()
        await asyncio.wait([creating])
    assert (await (await cells.create(SMALL)).exec(["true"])).is_success


async def test_a_step_that_fails_is_named(cells: Cells) -> None:
    with pytest.raises(SandboxError, match="take tree /no/such/folder: No such file or directory"):
        await cells.create(SMALL, Image(binds=(Bind("/no/such/folder", "/x"),)))


async def test_an_image_of_layers_is_written_to_in_its_own_layer_only(cells: Cells, tmp_path: Path) -> None:
    if not cells.host.has_overlay:
        pytest.skip("no overlay file system")
    make_reachable(tmp_path)
    for name in ("top", "bottom"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
        (tmp_path / name / f"only-{name}").write_text("here")
    links = tuple((name, f"usr{name}") for name in ("/bin", "/lib", "/lib64") if Path(name).is_symlink())
    image = Image(layers=(str(tmp_path / "top"), str(tmp_path / "bottom")), binds=(Bind("/usr", "/usr"),), links=links)
    cell = await cells.create(SMALL, image)
    result = await cell.exec(
        ["sh", "-c", "cat /who; ls / | tr '\\n' ' '; echo new > /who; cat /who; test -c /dev/null"]
    )
    assert result.is_success, result
    assert result.stdout.startswith("top")
    assert "only-bottom only-top" in result.stdout
    assert (tmp_path / "top" / "who").read_text() == "top"
    layer = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=cell.layer_descriptor)
    names = os.listdir(layer)  # noqa: PTH208 - by descriptor
    os.close(layer)
    assert "who" in names
    assert "only-top" not in names


async def test_links_in_an_image_do_not_lead_its_making_outside(cells: Cells, tmp_path: Path) -> None:
    if not cells.host.has_overlay:
        pytest.skip("no overlay file system")
    make_reachable(tmp_path)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside").chmod(0o777)
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "etc").symlink_to(tmp_path / "outside")
    host = host_image()
    layers, files = (str(tmp_path / "image"),), (("/etc/probe", b"x"),)
    image = Image(layers=layers, files=files, binds=host.binds[:1], links=host.links)  # with /usr, for agents in Python
    cell = await cells.create(SMALL, image)  # in which the link leads nowhere, and has made way for a folder
    with closing(open_beneath(cell.root_descriptor, "/etc/probe", os.O_RDONLY, follows_links=False)) as probe:
        assert os.read(probe, 10) == b"x"
    assert list((tmp_path / "outside").iterdir()) == []


async def test_a_bind_is_read_only_unless_it_says_otherwise(cells: Cells, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    (shared / "file").write_text("from outside")
    binds = (Bind(str(shared), "/read"), Bind(str(shared), "/write", is_writable=True))
    cell = await cells.create(SMALL, binds=binds)
    result = await cell.exec(["sh", "-c", "cat /read/file; echo x > /read/other; echo back > /write/other"])
    assert result.stdout == "from outside"
    assert "Read-only file system" in result.stderr
    assert (shared / "other").read_text() == "back\n"


async def test_files_are_seen_beneath_the_root_descriptor(cell: Cell) -> None:
    await cell.exec(["sh", "-c", "echo inside > /work/file"])
    descriptor = os.open("work/file", os.O_RDONLY, dir_fd=cell.root_descriptor)
    with os.fdopen(descriptor) as file:
        assert file.read() == "inside\n"


async def test_an_unknown_image_is_refused(cells: Cells) -> None:
    with pytest.raises(Unsupported, match="ubuntu"):
        await cells.create(SandboxSpec(image="ubuntu"))


async def test_cells_die_with_the_process_that_made_them(adopts_orphans: None) -> None:
    code = (
        "import asyncio, sys\n"
        "from hone.sandbox.cells.cells import Cells\n"
        "from hone.schema.sandboxes import SandboxSpec\n"
        "async def main():\n"
        "    async with Cells() as cells:\n"
        "        made = [await cells.create(SandboxSpec(memory_mb=64)) for _ in range(3)]\n"
        "        runs = [asyncio.create_task(cell.exec(['sleep', '60'])) for cell in made]\n"
        "        await asyncio.sleep(0.1)\n"
        "        print(*[cell.pid for cell in made], flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    if not pids:
        owner.wait(10)
        pytest.skip("no cells here")
    ends = [os.pidfd_open(pid) for pid in pids]
    owner.kill()
    owner.wait(10)
    owner.stdout.close()
    for end in ends:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(end, ready.set_result, None)
        async with asyncio.timeout(10):
            await ready
        asyncio.get_running_loop().remove_reader(end)
        os.close(end)
    async with Cells():  # sweeps what the dead one left
        pass
    left = [path for path, _, _ in os.walk("/sys/fs/cgroup") if f"-{owner.pid}-" in Path(path).name]
    assert left == []
    await reap_orphans()


def make_reachable(folder: Path) -> None:
    """Let a cell's ids see it: pytest keeps it to this user."""
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.getuid() and path.name.startswith(("pytest-", "test_")):
            path.chmod(0o755)


async def until_sleepers(cell: Cell, number: int) -> None:
    """Starting and dying take a moment."""
    async with asyncio.timeout(10):
        while await sleepers(cell) != number:
            await asyncio.sleep(0)


async def sleepers(cell: Cell) -> int:
    result = await cell.exec(["sh", "-c", "grep -l '^Name:.sleep' /proc/[0-9]*/status 2>/dev/null | wc -l"])
    return int(result.stdout)


async def reap_orphans() -> None:
    """What this process adopted from parents that tests killed; the last of it takes a moment to die."""
    await asyncio.sleep(0.05)
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if "(zombie)" in Path(f"/proc/{pid}/status").read_text():
            os.waitid(os.P_PID, int(pid), os.WEXITED)


async def test_a_late_end_of_a_program_of_the_cell_before_does_not_touch_the_next(cells):
    if cells.host.cgroups.unified is None:
        pytest.skip("no cgroup v2")
    first = await cells.create(SMALL)
    program = await first.spawn(["sleep", "60"])
    late = program._cgroup
    await first.exec(["sleep", "60"], timeout_seconds=0.05)  # its folder is killed, and not used again
    await first.destroy()
    second = await cells.create(SMALL)
    sleeping = await second.spawn(["sleep", "60"])
    late.kill()
    late.leave()
    assert (await second.exec(["echo", "fine"])).stdout == "fine\n"
    assert (await second.exec(["echo", "fine"])).stdout == "fine\n"
    sleeping.signal(signal.SIGTERM)
    assert await sleeping.wait() == -signal.SIGTERM
    await sleeping.close()
    await program.close()
