"""Local processes as sandboxes: what a program may do, what becomes of it, and that nothing of it is left."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hone.envs.failures import RolloutFailure
from hone.envs.local_processes import LocalProcesses
from hone.schema.sandboxes import Outcome, SandboxSpec
from hone.schema.traces import FailureClass


class Weak(LocalProcesses):
    """As where the kernel grants neither namespaces nor Landlock."""

    def __init__(self):
        super().__init__()
        self._use_namespaces = self._use_landlock = False


@pytest.fixture(params=[LocalProcesses, Weak], ids=["what-is-granted", "weak"])
async def sandbox(request):
    sandbox = await request.param().create(SandboxSpec(memory_mb=256, disk_mb=1))
    yield sandbox
    await sandbox.close()


@pytest.fixture
async def strong():
    sandbox = await LocalProcesses().create(SandboxSpec())
    yield sandbox
    await sandbox.close()


def needs(sandbox, protection):
    if protection not in sandbox.protections:
        pytest.skip(f"this kernel does not grant {protection}")


def alive(mark):
    """Processes of this machine with the mark in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "cmdline").read_bytes():
                    found.append(entry.name)
            except OSError:
                continue
    return found


async def test_a_program_runs_and_leaves_a_result(sandbox):
    result = await sandbox.exec(
        ["sh", "-c", "cat; echo to stderr >&2; echo $COLOUR; exit 3"], stdin=b"to stdin\n", env={"COLOUR": "green"}
    )
    assert (result.outcome, result.exit_code) == (Outcome.EXITED, 3)
    assert (result.stdout, result.stderr) == ("to stdin\ngreen\n", "to stderr\n")
    assert not result.is_success


async def test_python_is_this_interpreter(sandbox):
    result = await sandbox.exec(["python", "-c", "import sys; print(sys.prefix)"])
    assert result.stdout.strip() == sys.prefix


async def test_usage_is_measured(sandbox):
    code = "x = bytearray(50 << 20)\nimport time\nwhile time.process_time() < 0.1: pass"
    result = await sandbox.exec(["python", "-c", code])
    assert result.is_success
    assert result.usage.wall_seconds >= result.usage.cpu_seconds * 0.5 > 0.04
    assert 50 << 20 < result.usage.peak_memory_bytes < 150 << 20


async def test_a_program_that_does_not_exist_is_a_result(sandbox):
    result = await sandbox.exec(["no-such-program"])
    assert result.exit_code == 127
    assert "no-such-program" in result.stderr


async def test_a_working_folder_that_does_not_exist_is_a_result(sandbox):
    assert (await sandbox.exec(["true"], cwd="nowhere")).exit_code == 127


async def test_a_signal_is_an_outcome(sandbox):
    result = await sandbox.exec(["sh", "-c", "kill -SEGV $$"])
    assert (result.outcome, result.exit_code) == (Outcome.SIGNALLED, -signal.SIGSEGV)


async def test_megabytes_of_output_do_not_block_and_keep_head_and_tail(sandbox):
    code = "import sys\nfor i in range(400_000): print(i); print(i, file=sys.stderr)"
    result = await sandbox.exec(["python", "-c", code], kept_bytes=1000)
    assert result.is_success
    for text in (result.stdout, result.stderr):
        assert text.startswith("0\n1\n")
        assert text.endswith("\n399999\n")
        assert "bytes left out" in text
        assert len(text) < 1100


async def test_output_without_an_end_is_cut_off(sandbox):
    result = await sandbox.exec(["yes"])
    assert result.outcome is Outcome.OUTPUT_LIMIT
    assert result.stdout.startswith("y\ny\n")


async def test_output_that_is_no_text_is_replaced(sandbox):
    result = await sandbox.exec(["printf", r"a\377b"])
    assert result.stdout == "a\N{REPLACEMENT CHARACTER}b"


async def test_input_that_nobody_reads_does_not_block(sandbox):
    assert (await sandbox.exec(["true"], stdin=b"x" * 1_000_000)).is_success


async def test_input_of_megabytes_goes_through(sandbox):
    assert (await sandbox.exec(["wc", "-c"], stdin=b"x" * 3_000_000)).stdout.strip() == "3000000"


async def test_a_late_program_is_killed_with_all_that_it_started(sandbox):
    mark = f"7{time.time_ns()}"
    tree = f"(setsid sh -c '(setsid sleep {mark} &) ; sleep {mark}' &); trap '' TERM; echo started; sleep {mark}"
    result = await sandbox.exec(["sh", "-c", tree], timeout_seconds=0.5)
    assert result.outcome is Outcome.TIMEOUT
    assert result.stdout == "started\n"
    assert alive(mark.encode()) == []


async def test_a_cancelled_call_kills_its_program(sandbox):
    mark = f"8{time.time_ns()}"
    call = asyncio.create_task(sandbox.exec(["sh", "-c", f"echo > started; sleep {mark}"]))
    while "started" not in await sandbox.list():
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert alive(mark.encode()) == []


async def test_a_background_process_lives_until_the_sandbox_is_closed(sandbox):
    mark = f"9{time.time_ns()}"
    result = await sandbox.exec(["sh", "-c", f"(setsid sleep {mark} &) ; echo done"])
    assert result.stdout == "done\n"
    assert len(alive(mark.encode())) == 1
    await sandbox.close()
    assert alive(mark.encode()) == []


async def test_programs_run_at_the_same_time(sandbox):
    first = asyncio.create_task(sandbox.exec(["sh", "-c", "while ! test -e flag; do sleep 0.01; done; echo seen"]))
    await sandbox.exec(["touch", "flag"])
    assert (await first).stdout == "seen\n"


async def test_files_go_in_and_come_out(sandbox):
    await sandbox.write("folder/inner/data", b"\0\xff")
    await sandbox.exec(["cp", "folder/inner/data", "copy"])
    assert await sandbox.read("copy") == b"\0\xff"
    assert await sandbox.list() == ("copy", "folder/")
    assert await sandbox.list("folder/inner") == ("data",)
    await sandbox.write("copy", b"new")
    assert await sandbox.read("copy") == b"new"


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\0b"])
async def test_a_path_out_of_the_sandbox_is_refused(sandbox, path):
    with pytest.raises(ValueError, match="relative to its working folder"):
        await sandbox.read(path)


async def test_links_fifos_and_long_files_are_not_followed_waited_for_or_loaded(sandbox):
    script = "ln -s /etc/passwd link; ln -s /etc folder; mkfifo fifo; head -c 2000 /dev/zero > long"
    assert (await sandbox.exec(["sh", "-c", script])).is_success
    for path in ("link", "folder/passwd", "fifo", "missing"):
        with pytest.raises(OSError, match=r".+"):
            await sandbox.read(path)
    for path in ("link", "folder/new", "fifo"):
        with pytest.raises(OSError, match=r".+"):
            await sandbox.write(path, b"x")
    with pytest.raises(ValueError, match="longer than 1000 bytes"):
        await sandbox.read("long", max_bytes=1000)


async def test_memory_is_limited(sandbox):
    hog = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    result = await sandbox.exec(["python", "-c", hog])
    assert result.outcome is Outcome.OUT_OF_MEMORY
    assert (await sandbox.exec(["true"])).is_success


async def test_the_size_of_files_is_limited(sandbox):
    result = await sandbox.exec(["sh", "-c", "head -c 3000000 /dev/zero > file"])
    assert not result.is_success
    assert len(await sandbox.read("file")) == 1 << 20


async def test_no_variable_of_this_process_is_seen(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert "hunter2" not in (await sandbox.exec(["env"])).stdout
    inherited = await sandbox.exec(["sh", "-c", "ls /proc/$$/fd"])
    assert set(inherited.stdout.split()) <= {"0", "1", "2", "10"}


async def test_a_program_has_no_capabilities(sandbox):
    status = (await sandbox.exec(["cat", "/proc/self/status"])).stdout
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1"


async def test_programs_do_not_see_the_files_of_this_machine(strong, tmp_path):
    needs(strong, "files")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for command in (
        ["cat", str(secret)],
        ["ls", str(tmp_path)],
        ["sh", "-c", f"echo x > {secret}"],
        ["rm", str(secret)],
    ):
        assert not (await strong.exec(command)).is_success
    assert secret.read_text() == "hunter2"


async def test_programs_do_not_look_into_their_guardian_nor_signal_it(strong):
    needs(strong, "files")
    needs(strong, "namespaces")
    this = os.getpid()
    for command in (f"cat /proc/{this}/environ", f"cat /proc/{this}/maps", f"kill -STOP {this}", "kill -9 $PPID"):
        assert not (await strong.exec(["sh", "-c", command])).is_success
    assert (await strong.exec(["true"])).is_success


async def test_there_is_no_network_but_a_loopback(strong):
    needs(strong, "namespaces")
    code = """
import errno, socket
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
try:
    socket.create_connection(("10.0.0.1", 80), timeout=5)
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    assert (await strong.exec(["python", "-c", code])).stdout == "ENETUNREACH\n"


async def test_the_network_of_the_host_is_there_on_request():
    script = "print(open('/proc/self/net/dev').read())"
    sandbox = await LocalProcesses().create(SandboxSpec(network="host"))
    result = await sandbox.exec(["python", "-c", script])
    await sandbox.close()
    interfaces = {line.partition(":")[0].strip() for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]}
    assert all(f"{interface}:" in result.stdout for interface in interfaces)


async def test_a_program_can_be_talked_with(sandbox):
    process = await sandbox.start(["cat"])
    for line in (b"one\n", b"two\n"):
        await process.write(line)
        assert await process.read() == line
    process.interrupt()
    assert await process.read() == b""
    with pytest.raises(BrokenPipeError):
        await process.write(b"three\n" * 100_000)
    await process.close()
    await process.close()


async def test_the_lease_ends(tmp_path):
    sandbox = await LocalProcesses().create(SandboxSpec(ttl_seconds=0.3))
    with pytest.raises(RolloutFailure, match=r"lease of 0\.3 s is over") as failure:
        await sandbox.exec(["sleep", "60"])
    assert failure.value.failure.kind is FailureClass.SANDBOX
    with pytest.raises(RolloutFailure, match="lease"):
        await sandbox.write("file", b"")
    await sandbox.close()


async def test_a_dead_guardian_is_a_failure_of_class_sandbox(sandbox):
    call = asyncio.create_task(sandbox.exec(["sh", "-c", "echo > started; sleep 60"]))
    while "started" not in await sandbox.list():
        await asyncio.sleep(0.01)
    os.kill(sandbox._guardian, signal.SIGKILL)
    with pytest.raises(RolloutFailure, match="guardian is gone") as failure:
        await call
    assert failure.value.failure.kind is FailureClass.SANDBOX
    with pytest.raises(RolloutFailure, match="guardian is gone"):
        await sandbox.exec(["true"])


async def test_a_closed_sandbox_leaves_nothing_and_says_so(sandbox):
    await sandbox.write("file", b"x")
    folder = sandbox._folder
    await sandbox.close()
    await sandbox.close()
    assert not folder.exists()
    with pytest.raises(RolloutFailure, match="it is closed"):
        await sandbox.exec(["true"])


async def test_a_folder_goes_whatever_a_program_did_to_it(sandbox):
    await sandbox.exec(["sh", "-c", "mkdir -p a/b; touch a/b/c; ln -s / a/root; mkfifo a/fifo; chmod 0 a/b a ."])
    await sandbox.close()
    assert not sandbox._folder.exists()


async def test_a_guardian_that_cannot_start_is_a_failure(monkeypatch):
    provider = LocalProcesses()
    monkeypatch.setattr(provider, "_spawn", lambda control: (_ for _ in ()).throw(OSError("no room for a process")))
    with pytest.raises(RolloutFailure, match="no room for a process") as failure:
        await provider.create(SandboxSpec())
    assert failure.value.failure.kind is FailureClass.SANDBOX


async def test_a_spawner_that_died_is_replaced():
    provider = LocalProcesses()
    await (await provider.create(SandboxSpec())).close()
    os.kill(provider._spawner.pid, signal.SIGKILL)
    os.waitpid(provider._spawner.pid, 0)
    sandbox = await provider.create(SandboxSpec())
    assert (await sandbox.exec(["true"])).is_success
    await sandbox.close()


async def test_a_cancelled_creation_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    creation = asyncio.create_task(LocalProcesses().create(SandboxSpec()))
    await asyncio.sleep(0)
    creation.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creation
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runtime", ["bwrap", "oci", "gvisor"])
async def test_a_stronger_runtime_that_was_asked_for_is_refused(runtime):
    with pytest.raises(RolloutFailure, match=f"runtime '{runtime}'"):
        await LocalProcesses().create(SandboxSpec(runtime=runtime))


async def test_an_unknown_image_and_a_weak_kernel_are_refused():
    with pytest.raises(RolloutFailure, match="image 'ubuntu'"):
        await LocalProcesses().create(SandboxSpec(image="ubuntu"))
    strict = LocalProcesses(is_weak_allowed=False)
    strict._use_namespaces = False
    with pytest.raises(RolloutFailure, match=r"does not grant .*namespaces"):
        await strict.create(SandboxSpec())


async def test_arguments_that_are_too_long_or_missing_are_the_callers_mistake(sandbox):
    with pytest.raises(ValueError, match="write them to a file"):
        await sandbox.exec(["echo", "x" * 200_000])
    with pytest.raises(ValueError, match="argv is empty"):
        await sandbox.exec([])


def test_a_specification_is_checked():
    with pytest.raises(ValueError, match="memory_mb 0 of a sandbox is not positive"):
        SandboxSpec(memory_mb=0)


@pytest.mark.parametrize("provider", ["LocalProcesses", "Weak"])
def test_nothing_survives_the_owner(provider, tmp_path):
    """The process that made a sandbox is killed: its programs die, double-forked ones included."""
    mark = f"6{time.time_ns()}"
    script = tmp_path / "owner.py"
    script.write_text(f"""
import asyncio
from hone.envs.local_processes import LocalProcesses
from hone.schema.sandboxes import SandboxSpec

async def main():
    provider = LocalProcesses()
    if {provider == "Weak"}:
        provider._use_namespaces = provider._use_landlock = False
    sandbox = await provider.create(SandboxSpec())
    await sandbox.exec(["sh", "-c", "(setsid sleep {mark} &); echo"])
    await sandbox.write("file", b"x")
    print(sandbox._folder, flush=True)
    await sandbox.exec(["sleep", "{mark}"])

asyncio.run(main())
""")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as owner:
        folder = Path(owner.stdout.readline().decode().strip())
        while len(alive(mark.encode())) < 2:
            time.sleep(0.01)
        owner.kill()
    deadline = time.monotonic() + 30
    while (alive(mark.encode()) or folder.exists()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(mark.encode()) == []
    assert not folder.exists()
