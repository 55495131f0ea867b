"""The promises that every runtime keeps, each tried on every runtime whose program this machine has."""

import asyncio
import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.host import Host, can_share_layers, look
from hone.sandbox.cells.plan import Bind, Image
from hone.sandbox.cells.runtimes.known import features, missing
from hone.sandbox.cells.runtimes.runtime import Feature
from hone.sandbox.cells.scratch import sweep
from hone.sandbox.client import Sandbox
from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.files.beneath import Owner
from hone.sandbox.files.files import Tree
from hone.sandbox.node.node import Node
from hone.schema.sandboxes import RUNTIMES, ExecResult, Outcome, RuntimeName, SandboxSpec

VARIANTS: dict[str, RuntimeName] = {
    "process": "process",
    "bwrap": "bwrap",
    "crun": "oci",
    "runc": "oci",
    "cell": "cell",
    "runsc": "gvisor",
}
"""Runtimes by what makes them: some have several programs to choose from."""
IN_PYTHON = [pytest.param(f"{name} in Python", marks=pytest.mark.slow) for name in VARIANTS]


@dataclass(frozen=True, slots=True)
class Place:
    """Where sandboxes of one runtime are made."""

    runtime: RuntimeName
    cells: Cells

    @property
    def spec(self) -> SandboxSpec:
        network = "none" if Feature.LOOPBACK in features(self.runtime) else "off"
        return SandboxSpec(memory_mb=128, disk_mb=16, max_processes=64, network=network, runtime=self.runtime)

    async def create(self) -> Cell:
        return await self.cells.create(self.spec)

    def files(self, cell: Cell) -> Tree:
        owner = Owner(cell.uid_base, cell.uid_base) if self.cells.host.has_id_ranges else None
        return Tree(cell.root_descriptor, owner, cell.files_folder)


@pytest.fixture(params=[*VARIANTS, *IN_PYTHON])
async def place(request: pytest.FixtureRequest, leaving_nothing_behind) -> AsyncIterator[Place]:
    name, _, language = request.param.partition(" in ")
    host = replace(with_programs(look(), (name,)), can_build=not language)
    async with leaving_nothing_behind(Cells(host=host, runtimes=(VARIANTS[name],))) as cells:
        yield Place(VARIANTS[name], cells)


@pytest.fixture
async def cell(place: Place) -> Cell:
    return await place.create()


def with_programs(host: Host, names: tuple[str, ...]) -> Host:
    return replace(host, programs={name: path for name, path in host.programs.items() if name in names})


async def python(cell: Cell, code: str, **options: float) -> ExecResult:
    return await cell.exec(["python3", "-c", textwrap.dedent(code)], **options)


async def assert_well(cell: Cell) -> None:
    assert (await cell.exec(["echo", "well"])).stdout == "well\n"


# Programs.


async def test_a_program_runs_and_says_what_it_has_to_say(cell: Cell) -> None:
    result = await cell.exec(["sh", "-c", "echo out; echo problem >&2; exit 3"])
    assert (result.outcome, result.exit_code) == (Outcome.EXITED, 3)
    assert (result.stdout, result.stderr) == ("out\n", "problem\n")


async def test_input_environment_and_folder_reach_the_program(cell: Cell) -> None:
    await cell.exec(["mkdir", "-p", "deep/er"])
    result = await cell.exec(
        ["sh", "-c", "cat; echo $COLOUR; pwd; env | wc -l"], stdin=b"given\n", env={"COLOUR": "blue"}, cwd="deep/er"
    )
    given, colour, folder, num_variables = result.stdout.splitlines()
    assert (given, colour) == ("given", "blue")
    assert folder.endswith("/work/deep/er")
    assert int(num_variables) <= 8


async def test_an_environment_of_the_node_stays_there(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_TEST_SECRET", "of the host")
    assert "HONE_TEST_SECRET" not in (await cell.exec(["env"])).stdout


async def test_a_missing_program_is_127(cell: Cell) -> None:
    assert (await cell.exec(["no-such-program"])).exit_code == 127


async def test_a_conversation_with_a_program_and_a_terminal(place: Place, cell: Cell) -> None:
    program = await cell.spawn(["cat"])
    await program.write(b"hello\n")
    assert await program.read() == b"hello\n"
    program.end_input()
    assert await program.wait() == 0
    await program.close()
    if Feature.TERMINAL not in features(place.runtime):
        with pytest.raises(Unsupported, match="no terminals"):
            await cell.spawn(["true"], terminal=(33, 99))
        return
    terminal = await cell.spawn(["sh", "-c", "stty size; test -t 0 && echo terminal"], terminal=(33, 99))
    shown = b""
    while piece := await terminal.read():
        shown += piece
    assert shown.replace(b"\r", b"") == b"33 99\nterminal\n"
    await terminal.close()


async def test_a_late_program_is_killed_with_its_children(cell: Cell) -> None:
    marked = ["sh", "-c", "(while :; do echo x >> beats; sleep 0.02; done) & sleep 60"]
    result = await cell.exec(marked, timeout_seconds=0.4)
    assert (result.outcome, result.exit_code) == (Outcome.TIMEOUT, -signal.SIGKILL)
    await until_still(cell, "beats")


async def test_many_programs_run_at_once(cell: Cell) -> None:
    results = await asyncio.gather(*(cell.exec(["echo", str(number)]) for number in range(20)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(20)]


# Limits.


async def test_a_flood_of_output_is_cut_short(cell: Cell) -> None:
    result = await cell.exec(["yes"], kept_bytes=1000, max_output_bytes=1 << 20)
    assert result.outcome is Outcome.OUTPUT_LIMIT
    assert "bytes left out" in result.stdout
    await assert_well(cell)


async def test_a_memory_hog_is_told_apart(cell: Cell) -> None:
    result = await python(cell, "hog = []\nwhile True: hog.append(bytearray(1 << 20))", timeout_seconds=30)
    assert result.outcome is Outcome.OUT_OF_MEMORY, result
    await assert_well(cell)


async def test_a_fork_bomb_stops_at_its_limit(place: Place, cell: Cell) -> None:
    bomb = """
    import os, sys, time
    for number in range(1000):
        try:
            if os.fork() == 0:
                time.sleep(60)
        except BlockingIOError:
            sys.exit(f"{number} children")
    """
    if Feature.PROCESSES not in features(place.runtime):
        pytest.skip("this runtime counts the threads of its own kernel")
    result = await python(cell, bomb)
    folders = place.cells.host.cgroups
    is_counted = "pids" in folders.v1 or "pids" in folders.unified_controllers
    num_children = int(result.stderr.split()[0])
    if place.runtime == "process" and not is_counted:  # this user's other processes come and go
        assert num_children < 1000
    else:
        assert 40 <= num_children <= 64, result
    if is_counted:
        assert result.outcome is Outcome.PIDS_LIMIT
    other = await place.create()
    await assert_well(other)


async def test_one_file_is_never_longer_than_the_disk(cell: Cell) -> None:
    result = await cell.exec(["dd", "if=/dev/zero", "of=file", "bs=1M", "count=64"])
    assert not result.is_success
    size = await python(cell, "import os; print(os.path.getsize('file'))")
    assert int(size.stdout) <= 16 << 20


# Files from outside.


async def test_files_are_written_and_read_from_outside(place: Place, cell: Cell) -> None:
    files = place.files(cell)
    files.write("folder/given.txt", b"from outside\n")
    assert (await cell.exec(["cat", "folder/given.txt"])).stdout == "from outside\n"
    await cell.exec(["sh", "-c", "echo changed >> folder/given.txt; mkdir made; echo inside > made/there"])
    assert files.read("/work/folder/given.txt") == b"from outside\nchanged\n"
    assert [entry.name for entry in files.list("made")] == ["there"]
    files.close()


async def test_links_do_not_lead_readers_outside(place: Place, cell: Cell, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    files = place.files(cell)
    await cell.exec(["ln", "-s", str(tmp_path / "secret"), "link"])
    await cell.exec(["ln", "-s", "../../../../../../../../etc/shadow", "other"])
    for name in ("link", "other"):
        with pytest.raises(OSError, match="No such file"):
            files.read(name)
    files.close()


# What is not to be seen or reached.


async def test_files_of_the_host_are_not_visible(cell: Cell, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    for path in (tmp_path / "secret", Path("/etc/shadow"), Path("/root/.bashrc")):
        result = await cell.exec(["cat", str(path)])
        assert (result.stdout, result.exit_code) == ("", 1)
    environment = (await cell.exec(["cat", "/proc/1/environ"])).stdout  # to be seen in gVisor, as that sets it
    assert {one.partition("=")[0] for one in environment.split("\0")} <= {"", "HOME", "PWD", "OLDPWD", "LC_CTYPE", "_"}
    attack = f"""
    import os
    for path in ("/usr/planted", "/etc/planted", "{tmp_path}/planted", "/planted"):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
            print(path)
        except OSError:
            pass
    """
    assert set((await python(cell, attack)).stdout.split()) <= {"/planted"}  # in a root of its own
    assert not Path("/planted").exists()


async def test_nothing_outside_can_be_reached(cell: Cell) -> None:
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as abstract:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        name = f"\0hone-test-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        attack = f"""
        import socket
        for family, address in ((socket.AF_INET, ("127.0.0.1", {listener.getsockname()[1]})),
                                (socket.AF_INET, ("10.0.0.1", 80)), (socket.AF_UNIX, {name!r})):
            try:
                with socket.socket(family) as connection:
                    connection.settimeout(1)
                    connection.connect(address)
                    print("reached", address)
            except OSError:
                pass
        print("tried")
        """
        assert (await python(cell, attack)).stdout == "tried\n"


async def test_processes_outside_cannot_be_signalled(cell: Cell) -> None:
    attack = f"""
    import os
    for pid in ({os.getpid()}, {os.getppid()}):
        try:
            os.kill(pid, 0)
            print(pid)
        except OSError:
            pass
    """
    assert (await python(cell, attack)).stdout == ""


async def test_no_powers_are_left(place: Place, cell: Cell) -> None:
    code = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    print(libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0))  # no new privileges, seccomp
    for call, arguments in (("unshare", (0x10000000,)), ("ptrace", (16, 1, 0, 0)), ("chroot", (b"/tmp",)),
                            ("mount", (b"x", b"/tmp", b"tmpfs", 0, None)), ("sethostname", (b"x", 1))):
        print(getattr(libc, call)(*arguments), ctypes.get_errno())
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    print(*data)
    """
    if place.runtime == "gvisor":  # its own kernel answers
        status = (await cell.exec(["cat", "/proc/self/status"])).stdout
        assert {int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")} == {0}
        return
    lines = (await python(cell, code)).stdout.splitlines()
    assert lines == ["1 2", *[f"-1 {errno.EPERM}"] * 5, "0 0 0 0 0 0"]


async def test_the_agent_cannot_be_harmed_from_inside(place: Place, cell: Cell) -> None:
    if Feature.PROCESSES not in features(place.runtime):
        pytest.skip("programs of this runtime can end their sandbox, which is then lost")
    attack = """
    import os
    for number in (*range(1, 9), 15, 19):
        for pid in (1, os.getppid(), -1):
            try:
                os.kill(pid, number)
            except OSError:
                pass
    """
    await python(cell, attack)
    await assert_well(cell)


async def test_sandboxes_are_apart(place: Place) -> None:
    one, other = await asyncio.gather(place.create(), place.create())
    path = (await one.exec(["sh", "-c", "echo secret > file; echo $PWD/file"])).stdout.strip()
    seen = await other.exec(["sh", "-c", f"cat file; cat {path}"])
    assert "secret" not in seen.stdout
    program = await one.spawn(["sh", "-c", "echo $$; exec sleep 60"])
    pid = int(await program.read())
    await other.exec(["sh", "-c", f"kill -9 {pid}; kill -9 -1"])
    await assert_well(one)
    program.kill()
    assert await program.wait() == -signal.SIGKILL
    await program.close()


# The end.


async def test_a_lost_agent_is_typed_and_nothing_stays(cell: Cell) -> None:
    await cell.exec(["sh", "-c", "setsid sh -c 'while :; do sleep 0.01; done' >/dev/null 2>&1 &"])
    running = asyncio.create_task(cell.exec(["sleep", "60"]))
    await asyncio.sleep(0.05)
    os.kill(cell.pid, signal.SIGKILL)
    with pytest.raises(SandboxError, match="agent is gone") as caught:
        await running
    assert caught.value.outcome is Outcome.AGENT_LOST
    await cell.destroy()


async def test_daemons_die_with_the_sandbox(place: Place, tmp_path: Path) -> None:
    cell = await place.create()
    await cell.exec(
        ["sh", "-c", "for i in 1 2 3; do (setsid sh -c 'while :; do sleep 0.01; done' &) ; done >/dev/null 2>&1"]
    )
    await cell.destroy()
    await cell.destroy()
    with pytest.raises(SandboxError, match="destroyed"):
        await cell.exec(["true"])


async def test_a_cancelled_creation_leaves_nothing(place: Place) -> None:
    for seconds in (0, 0, 0.001, 0.005, 0.02):
        creating = asyncio.create_task(place.create())
        await asyncio.sleep(seconds)
        creating.cancel()
        await asyncio.wait([creating])
    await assert_well(await place.create())


async def test_a_paused_sandbox_does_nothing_until_it_is_resumed(cell: Cell) -> None:
    if cell.cgroup is None or not cell.cgroup.can_freeze:
        with pytest.raises(Unsupported, match="cgroup v2"):
            await cell.pause()
        return
    await cell.pause()
    running = asyncio.create_task(cell.exec(["echo", "alive"]))
    done, _ = await asyncio.wait([running], timeout=0.2)
    assert not done
    await cell.resume()
    assert (await running).stdout == "alive\n"
    await cell.pause()
    await cell.destroy()


async def test_a_sandbox_of_a_node_has_files_snippets_and_a_session(place: Place) -> None:
    node = Node(runtimes=(place.runtime,))
    try:
        async with node, Sandbox(spec=place.spec, node=node) as box:
            await box.write("folder/file", b"content")
            assert (await box.exec(["cat", "folder/file"])).stdout == "content"
            assert (await box.snippet("print(open('folder/file').read())")).stdout == "content\n"
            await box.python("x = 20")
            assert (await box.python("x + 1")).text == "21\n"
            late = await box.python("while True: pass", timeout_seconds=0.3)
            assert late.is_late
            assert (await box.python("x")).text == "20\n"
    except Unsupported as error:
        pytest.skip(str(error))


# What a runtime cannot do is refused by name.


async def test_what_is_not_offered_is_refused_and_named(place: Place) -> None:
    offered = features(place.runtime)
    asked = {
        Feature.LOOPBACK: replace_spec(place.spec, network="none"),
        Feature.HOST_NETWORK: replace_spec(place.spec, network="host"),
    }
    for feature, spec in asked.items():
        if feature in offered:
            await assert_well(await place.cells.create(spec))
        else:
            with pytest.raises(Unsupported, match=f"runtime '{place.runtime}'.*say"):
                await place.cells.create(spec)


async def test_a_bind_is_seen_where_the_runtime_can_put_it(place: Place, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    make_reachable(shared)
    (shared / "file").write_text("from outside")
    (shared / "file").chmod(0o644)
    target = "/shared" if Feature.MOVED_BINDS in features(place.runtime) else str(shared)
    cell = await place.cells.create(place.spec, binds=[Bind(str(shared), target)])
    result = await cell.exec(["sh", "-c", f"cat {target}/file; echo x > {target}/other"])
    assert (result.stdout, result.exit_code != 0) == ("from outside", True)
    assert not (shared / "other").exists()


async def test_an_image_of_layers_is_refused_where_it_cannot_be(place: Place, tmp_path: Path) -> None:
    if Feature.IMAGES in features(place.runtime):
        pytest.skip("this runtime has such images")
    with pytest.raises(Unsupported, match="own image only"):
        await place.cells.create(place.spec, Image(layers=(str(tmp_path),)))


async def test_another_runtime_than_offered_is_refused(place: Place) -> None:
    other = "process" if place.runtime != "process" else "cell"
    with pytest.raises(Unsupported, match=f"'{other}' is not offered here; ask for one of {place.runtime}") as caught:
        await place.cells.create(replace_spec(place.spec, runtime=other))
    assert caught.value.outcome is Outcome.POLICY_DENIED


def test_what_a_machine_lacks_is_said() -> None:
    host = with_programs(look(), ())
    assert "bubblewrap" in missing("bwrap", host)
    assert "Landlock" in missing("process", replace(host, landlock=0))
    assert "ABI 6" in missing("process", replace(host, landlock=5, has_id_ranges=False))
    assert "user namespaces" in missing("cell", replace(host, has_user_namespaces=False))
    assert "is_weak_allowed" in missing("cell", replace(host, has_seccomp=False))


def make_reachable(folder: Path) -> None:
    """Let a sandbox's ids see it: pytest keeps it to this user."""
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.getuid() and path.name.startswith(("pytest-", "test_", "shared")):
            path.chmod(0o755)


def replace_spec(spec: SandboxSpec, **changes: object) -> SandboxSpec:
    return SandboxSpec(**{**{name: getattr(spec, name) for name in spec.__struct_fields__}, **changes})


async def until_still(cell: Cell, name: str) -> None:
    """Wait until nobody writes to a file any more."""
    async with asyncio.timeout(10):
        size = -1
        while True:
            found = int((await cell.exec(["sh", "-c", f"wc -c < {name}"])).stdout)
            if found == size:
                return
            size = found
            await asyncio.sleep(0.1)


def test_the_documentation_says_what_each_runtime_can_do() -> None:
    page = (Path(__file__).parents[2] / "docs/concepts/sandboxes.md").read_text()
    assert f"| | {' | '.join(RUNTIMES)} |\n" in page
    for feature in Feature:
        cells = " | ".join("yes" if feature in features(runtime) else "-" for runtime in RUNTIMES)
        assert f"| {feature} | {cells} |\n" in page


async def test_an_image_of_layers_is_written_to_in_the_sandbox_only(place: Place, tmp_path: Path) -> None:
    if Feature.IMAGES not in features(place.runtime) or not place.cells.host.has_overlay:
        pytest.skip("no such images")
    make_reachable(tmp_path)
    for name in ("top", "bottom"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
        (tmp_path / name / f"only-{name}").write_text("here")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside").chmod(0o777)
    (tmp_path / "top" / "planted").symlink_to(tmp_path / "outside")
    links = tuple((name, f"usr{name}") for name in ("/bin", "/lib", "/lib64") if Path(name).is_symlink())
    image = Image(
        layers=(str(tmp_path / "top"), str(tmp_path / "bottom")),
        binds=(Bind("/usr", "/usr"),),
        links=links,
        files=(("/planted/file", b"of the image"),),
    )
    try:
        cell = await place.cells.create(place.spec, image)
    except SandboxError:  # links that stand where folders should be are refused by some
        image = replace(image, files=())
        cell = await place.cells.create(place.spec, image)
    result = await cell.exec(
        ["sh", "-c", "cat /who; ls / | tr '\\n' ' '; echo new > /who; cat /who; test -c /dev/null"]
    )
    assert result.is_success, result
    assert result.stdout.startswith("top")
    assert "only-bottom only-top" in result.stdout
    assert (tmp_path / "top" / "who").read_text() == "top"
    assert list((tmp_path / "outside").iterdir()) == []


def test_snapshots_without_programs_in_c_are_copies() -> None:
    host = replace(look(), can_build=False)
    assert not can_share_layers(host)


OWNER = """
import asyncio, sys
from dataclasses import replace
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.host import look
from hone.schema.sandboxes import SandboxSpec

async def main():
    runtime, network, seconds, *programs = sys.argv[1:]
    host = look()
    host = replace(host, programs={name: path for name, path in host.programs.items() if name in programs})
    async with Cells(host=host, runtimes=(runtime,)) as cells:
        cell = await cells.create(SandboxSpec(memory_mb=64, runtime=runtime, network=network))
        await cell.exec(["sh", "-c", f"(setsid sleep {seconds} &) >/dev/null 2>&1"])
        print(cell.pid, flush=True)
        await cell.exec(["sleep", seconds])

asyncio.run(main())
"""


async def test_sandboxes_die_with_the_process_that_made_them(place: Place) -> None:
    seconds = f"{100_000 + os.getpid()}.5"  # what nothing else on this machine sleeps for
    words = [place.runtime, place.spec.network, seconds, *place.cells.host.programs]
    owner = subprocess.Popen([sys.executable, "-c", OWNER, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        agent = os.pidfd_open(int(owner.stdout.readline()))
    finally:
        owner.kill()
        owner.wait(10)
        owner.stdout.close()
    try:
        assert await asyncio.to_thread(select.select, [agent], [], [], 10) == ([agent], [], [])
    finally:
        os.close(agent)
    async with asyncio.timeout(10):
        while sleepers(seconds):
            await asyncio.sleep(0.01)
    sweep()
    assert list(Path(tempfile.gettempdir()).glob(f"hone-cells-{owner.pid}-*")) == []


def sleepers(seconds: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.joinpath("cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(folder.name)
    return found


async def test_two_nodes_of_one_machine_do_not_meet(place: Place) -> None:
    async with Cells(host=place.cells.host, runtimes=(place.runtime,)) as others:
        one, other = await asyncio.gather(place.create(), others.create(place.spec))
        assert one.name == other.name
        await asyncio.gather(assert_well(one), assert_well(other))
