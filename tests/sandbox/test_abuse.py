"""What programs try: each is contained, its outcome is typed, the agent answers afterwards, and a neighbour is well."""

import asyncio
import errno
import os
import platform
import socket
import textwrap
from pathlib import Path

import pytest

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.syscalls import AARCH64, X86_64
from hone.schema.sandboxes import ExecResult, Outcome, SandboxSpec

NUMBERS = {"x86_64": X86_64, "aarch64": AARCH64}[platform.machine()]
NAMESPACES = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
              "pid": 0x20000000, "net": 0x40000000}  # fmt: skip
CALL = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result
"""


async def python(cell: Cell, code: str, **options: float) -> ExecResult:
    return await cell.exec(["python3", "-c", textwrap.dedent(code)], **options)


async def assert_well(cell: Cell) -> None:
    result = await cell.exec(["echo", "well"])
    assert result.stdout == "well\n", result


def needs_controller(cells: Cells, name: str) -> None:
    folders = cells.host.cgroups
    if name not in folders.v1 and name not in folders.unified_controllers:
        pytest.skip(f"no cgroup controller {name} for this user")


def at_limit_of_processes(cells: Cells) -> Outcome:
    """Without a cgroup the kernel keeps the limit and does not say so."""
    folders = cells.host.cgroups
    is_counted = "pids" in folders.v1 or "pids" in folders.unified_controllers
    return Outcome.PIDS_LIMIT if is_counted else Outcome.EXITED


# Processes.


async def test_a_fork_bomb_stops_at_its_limit(cells: Cells, cell: Cell) -> None:
    neighbour = await cells.create(SandboxSpec(memory_mb=64))
    bomb = """
    import os, sys, time
    for number in range(1000):
        try:
            if os.fork() == 0:
                time.sleep(60)
        except BlockingIOError:
            sys.exit(f"{number} children")
    """
    result = await python(cell, bomb)
    assert result.outcome is at_limit_of_processes(cells), result
    assert 40 <= int(result.stderr.split()[0]) <= 64
    await assert_well(neighbour)
    refused = await asyncio.gather(*(cell.exec(["sleep", "0.2"]) for _ in range(8)))  # the agent answers, with no room
    assert all(result.outcome is Outcome.PIDS_LIMIT for result in refused if result.exit_code == 126)


async def test_a_bomb_that_forks_itself_dies_at_its_timeout(cells: Cells, cell: Cell) -> None:
    result = await cell.exec(["sh", "-c", "bomb() { bomb | bomb & }; bomb; sleep 60"], timeout_seconds=1)
    assert result.outcome in (Outcome.TIMEOUT, Outcome.PIDS_LIMIT, Outcome.EXITED)
    neighbour = await cells.create(SandboxSpec(memory_mb=64))
    await assert_well(neighbour)


async def test_a_thread_bomb_stops_at_its_limit(cells: Cells, cell: Cell) -> None:
    bomb = """
    import threading, time
    for _ in range(1000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """
    result = await python(cell, bomb)
    assert (result.outcome, result.exit_code) == (at_limit_of_processes(cells), 1), result
    await assert_well(cell)


async def test_the_first_process_cannot_be_harmed_from_inside(cell: Cell) -> None:
    attack = """
    import os, signal
    for number in range(1, 65):
        try:
            os.kill(1, number)
        except OSError:
            pass
    """
    assert (await python(cell, attack)).is_success
    await assert_well(cell)


async def test_orphans_are_reaped(cell: Cell) -> None:
    orphans = """
    import os
    for _ in range(200):
        if os.fork() == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
        os.wait()
    """
    assert (await python(cell, orphans)).is_success
    zombies = await cell.exec(["sh", "-c", "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l"])
    assert int(zombies.stdout) == 0


async def test_cores_beyond_its_own_are_neither_used_nor_shown(cells: Cells) -> None:
    cell = await cells.create(SandboxSpec(memory_mb=64, cpus=0.5))
    assert (await cell.exec(["nproc"])).stdout == "1\n"
    needs_controller(cells, "cpu")
    burn = "import time\nend = time.time() + 1\nwhile time.time() < end: pass\nprint(time.process_time())"
    result = await python(cell, burn)
    assert float(result.stdout) < 0.8


async def test_watching_files_is_limited_to_the_cells_share(cell: Cell) -> None:
    code = """
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        made = [libc.inotify_init1(0) for _ in range(9)]
        print(sum(one >= 0 for one in made), errno.errorcode[ctypes.get_errno()])
        print(*(open(f"/proc/sys/user/max_inotify_{what}").read().strip() for what in ("instances", "watches")))
    """
    assert (await python(cell, code)).stdout == "8 EMFILE\n8 4096\n"


async def test_priorities_cannot_be_raised(cell: Cell) -> None:
    attack = """
    import os
    for attempt in (
        lambda: os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) - 1),
        lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10)),
    ):
        try:
            attempt()
            print("done")
        except OSError as error:
            print(error.errno)
    """
    assert set((await python(cell, attack)).stdout.split()) <= {str(errno.EPERM), str(errno.EACCES)}


# Memory.


async def test_a_memory_hog_is_told_apart(cell: Cell) -> None:
    result = await python(cell, "hog = []\nwhile True: hog.append(bytearray(1 << 20))", timeout_seconds=20)
    assert result.outcome is Outcome.OUT_OF_MEMORY, result
    await assert_well(cell)


async def test_many_small_hogs_do_not_get_more_together(cells: Cells, cell: Cell) -> None:
    needs_controller(cells, "memory")
    hogs = """
    import os, time
    for _ in range(12):
        if os.fork() == 0:
            hog = bytearray(b"x") * (30 << 20)
            time.sleep(60)
    ends = [os.wait()[1] for _ in range(6)]
    print(*ends)
    os._exit(1)
    """
    result = await python(cell, hogs, timeout_seconds=20)
    assert result.outcome is Outcome.OUT_OF_MEMORY, result
    await assert_well(cell)


async def test_files_count_as_disk_and_not_as_the_programs_memory(cell: Cell) -> None:
    fill = "dd if=/dev/zero of=/work/file bs=1M 2>/dev/null; python3 -c 'bytearray(40 << 20)'"
    assert (await cell.exec(["sh", "-c", fill])).is_success


async def test_hoarded_pipes_are_paid_for(cell: Cell) -> None:
    hoard = """
    import fcntl, os
    while True:
        _, end = os.pipe()
        os.set_blocking(end, False)
        try:
            while True:
                os.write(end, bytes(1 << 16))
        except BlockingIOError:
            pass
    """
    result = await python(cell, hoard, timeout_seconds=20)
    assert result.outcome in (Outcome.OUT_OF_MEMORY, Outcome.EXITED)
    assert not result.is_success  # too many files, or out of memory
    await assert_well(cell)


async def test_a_sparse_file_and_its_mapping_cost_nothing(cell: Cell) -> None:
    sparse = """
    import mmap
    with open("/work/sparse", "wb+") as file:
        file.truncate(1 << 30)
        mapping = mmap.mmap(file.fileno(), 16 << 20)
        print(mapping[1 << 20])
    """
    result = await python(cell, sparse)
    assert result.stdout == "0\n" or result.outcome is not Outcome.EXITED, result
    await assert_well(cell)


# Disk and output.


async def test_a_full_disk_is_told_apart_and_can_be_emptied(cell: Cell) -> None:
    result = await cell.exec(["dd", "if=/dev/zero", "of=/work/file", "bs=1M"])
    assert result.outcome is Outcome.DISK_FULL, result
    assert "No space left" in result.stderr
    await cell.exec(["rm", "/work/file"])
    assert (await cell.exec(["dd", "if=/dev/zero", "of=/work/file", "bs=1M", "count=8"])).is_success


@pytest.mark.parametrize("folder", ["/work", "/tmp", "/dev/shm", "/dev"])
async def test_nowhere_is_more_room_than_there_is(cell: Cell, folder: str) -> None:
    result = await cell.exec(["dd", "if=/dev/zero", f"of={folder}/file", "bs=1M"])
    assert not result.is_success
    size = await cell.exec(["stat", "-c", "%s", f"{folder}/file"])
    assert int(size.stdout or 0) <= 16 << 20


async def test_a_million_files_are_too_many(cell: Cell) -> None:
    files = "import os\nfor n in range(1_000_000): os.close(os.open(f'/work/{n}', os.O_CREAT))"
    result = await python(cell, files)
    assert result.outcome is Outcome.DISK_FULL, result.stderr[-500:]
    await assert_well(cell)


async def test_a_flood_of_output_is_cut_short(cell: Cell) -> None:
    result = await cell.exec(["yes"], kept_bytes=1000, max_output_bytes=1 << 20)
    assert result.outcome is Outcome.OUTPUT_LIMIT
    assert len(result.stdout) < 1100
    assert "bytes left out" in result.stdout
    await assert_well(cell)


async def test_output_that_is_no_text_and_has_no_end_of_line(cell: Cell) -> None:
    result = await python(cell, "import os; os.write(1, b'\\xff\\xfe' * 1000 + b'end')")
    assert result.stdout.endswith("\ufffdend")


async def test_a_daemon_that_keeps_the_output_open_does_not_keep_the_caller(cell: Cell) -> None:
    async with asyncio.timeout(10):
        result = await cell.exec(["sh", "-c", "echo said; sleep 60 &"])
    assert result.stdout == "said\n"
    assert result.usage.wall_seconds < 5


async def test_input_that_is_not_read_is_no_trouble(cell: Cell) -> None:
    result = await cell.exec(["true"], stdin=b"x" * (1 << 20))
    assert result.is_success
    late = await cell.exec(["sleep", "60"], stdin=b"x" * (1 << 20), timeout_seconds=0.2)
    assert late.outcome is Outcome.TIMEOUT


# The host's secrets.


async def test_nothing_of_the_host_is_seen(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("of the host")
    monkeypatch.setenv("HONE_TEST_SECRET", "of the host")
    attack = f"""
    import os
    for path in ("{tmp_path}/secret", "/proc/1/root/work", "/proc/1/environ", "/proc/1/mem", "/proc/1/fd/3", "/proc/1/exe",
                 "/etc/shadow", "/proc/kcore", "/dev/kmsg", "/dev/mem", "/sys/kernel", "/proc/1/maps"):
        try:
            handle = os.open(path, os.O_RDONLY)
            print(path, os.read(handle, 100) if not os.path.isdir(path) else os.listdir(path))
        except OSError:
            pass
    print(os.listdir("/proc/1"), sorted(os.environ), sorted(os.listdir("/proc/self/fd")))
    """
    result = await python(cell, attack)
    assert result.is_success, result.stderr
    assert result.stdout.split("\n")[:-1] == [
        "[] ['HOME', 'LANG', 'PATH', 'TMPDIR'] ['0', '1', '2', '3']"  # 3 is the listing's own
    ]


async def test_kernel_addresses_and_messages_are_not_told(cell: Cell) -> None:
    kallsyms = await cell.exec(["sh", "-c", "head -1 /proc/kallsyms 2>/dev/null"])
    assert kallsyms.stdout == "" or kallsyms.stdout.startswith("0000000000000000")
    assert (await cell.exec(["dmesg"])).exit_code != 0


async def test_the_machine_cannot_be_set_from_inside(cell: Cell) -> None:
    attack = """
    import os
    paths = ["/proc/sysrq-trigger", "/proc/1/oom_score_adj", "/proc/1/comm"]
    paths += [os.path.join(top, name) for top, _, names in os.walk("/proc/sys/kernel") for name in names]
    paths += [os.path.join(top, name) for top, _, names in os.walk("/proc/sys/user") for name in names]
    for path in paths:
        try:
            os.close(os.open(path, os.O_WRONLY))
            print(path)
        except OSError:
            pass
    """
    opened = (await python(cell, attack)).stdout.split()
    own = {"/proc/sys/kernel/" + name for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni",
           "shm_rmid_forced", "msg_next_id", "sem_next_id", "shm_next_id", "ns_last_pid", "pid_max", "auto_msgmni")}  # fmt: skip
    assert set(opened) <= own | {"/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname"}  # its own namespaces'


# System calls.

FORBIDDEN = sorted(
    {"bpf", "chroot", "fsopen", "init_module", "io_uring_setup", "kexec_load", "keyctl", "mount", "move_mount",
     "open_by_handle_at", "open_tree", "perf_event_open", "personality", "pidfd_getfd", "pivot_root",
     "process_vm_readv", "ptrace", "reboot", "setns", "swapon", "umount2", "unshare", "userfaultfd"}
)  # fmt: skip


async def test_no_powers_are_left(cell: Cell) -> None:
    status = (await cell.exec(["cat", "/proc/self/status"])).stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"


async def test_forbidden_system_calls_are_refused(cell: Cell) -> None:
    numbers = {name: NUMBERS[name] for name in FORBIDDEN}
    code = CALL + f"print({{name: call(number, 0, 0, 0, 0, 0) for name, number in {numbers}.items()}})"
    assert eval((await python(cell, code)).stdout) == dict.fromkeys(FORBIDDEN, "EPERM")


async def test_unknown_system_calls_do_not_exist(cell: Cell) -> None:
    assert (await python(cell, CALL + "print(call(2000), call(548))")).stdout == "ENOSYS ENOSYS\n"


async def test_the_other_abi_of_x86_is_deadly(cell: Cell) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("x32 is an ABI of x86_64")
    result = await python(cell, CALL + "print(call(0x40000000 + 39))")
    assert (result.outcome, result.exit_code) == (Outcome.SIGNALLED, -31)


@pytest.mark.parametrize("name", sorted(NAMESPACES))
async def test_no_new_namespaces(cell: Cell, name: str) -> None:
    flag = NAMESPACES[name]
    code = f"""
    import struct
    print(call({NUMBERS["unshare"]}, {flag}))
    print(call({NUMBERS["clone"]}, {flag} | 17, 0, 0, 0, 0))
    arguments = ctypes.create_string_buffer(struct.pack("=11Q", {flag}, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0))
    print(call({NUMBERS["clone3"]}, arguments, len(arguments.raw)))
    """
    result = await python(cell, CALL + textwrap.dedent(code))
    assert set(result.stdout.split()) <= {"EPERM", "ENOSYS", "ENOSPC"}, result


async def test_devices_cannot_be_made_and_set_uid_gives_nothing(cell: Cell) -> None:
    code = """
    import os, stat
    for mode, device in ((stat.S_IFCHR, os.makedev(1, 1)), (stat.S_IFBLK, os.makedev(254, 0))):
        try:
            os.mknod("/work/device", mode | 0o666, device)
            os.open("/work/device", os.O_RDWR)
            print("device")
        except OSError:
            pass
    os.mkfifo("/work/fifo")
    """
    result = await python(cell, code)
    assert (result.stdout, result.exit_code) == ("", 0), result.stderr
    assert "nosuid" in (await cell.exec(["sh", "-c", "grep ' / ' /proc/mounts"])).stdout


# The network.


async def test_nothing_outside_can_be_reached_and_the_own_loopback_can(cell: Cell) -> None:
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as abstract:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        name = f"\0hone-test-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        attack = f"""
        import socket
        def attempt(family, address, kind=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind) as connection:
                    connection.settimeout(1)
                    connection.connect(address)
                    print("reached", address)
            except OSError:
                pass
        attempt(socket.AF_INET, ("127.0.0.1", {listener.getsockname()[1]}))
        attempt(socket.AF_INET, ("169.254.169.254", 80))
        attempt(socket.AF_INET, ("10.0.0.1", 80))
        attempt(socket.AF_INET6, ("2001:db8::1", 80))
        attempt(socket.AF_UNIX, {name!r})
        for family, kind, protocol in (
            (socket.AF_PACKET, socket.SOCK_RAW, 0), (socket.AF_NETLINK, socket.SOCK_RAW, 0), (40, socket.SOCK_STREAM, 0),
            (38, socket.SOCK_SEQPACKET, 0), (socket.AF_INET, socket.SOCK_RAW, 1),
        ):
            try:
                socket.socket(family, kind, protocol)
                print("made", family, kind)
            except OSError:
                pass
        with socket.socket() as own:
            own.bind(("127.0.0.1", 0))
            own.listen()
            attempt(socket.AF_INET, own.getsockname())
            print(own.getsockname()[0])
        """
        result = await python(cell, attack)
    own, address = result.stdout.splitlines()
    assert own.startswith("reached ('127.0.0.1'"), result.stderr
    assert address == "127.0.0.1"


async def test_without_any_network_only_local_sockets_are_left(cells: Cells) -> None:
    spec = SandboxSpec(memory_mb=64, network="off")
    one, other = await asyncio.gather(cells.create(spec), cells.create(spec))
    code = "import socket\ntry: socket.socket()\nexcept OSError as error: print(error.errno)"
    assert (await python(one, code)).stdout == f"{errno.EAFNOSUPPORT}\n"
    listen = (
        "import socket, time\ns = socket.socket(socket.AF_UNIX); s.bind('\\0name'); s.listen(); print('on', flush=True)"
    )
    server = await one.spawn(["python3", "-c", f"{listen}; time.sleep(60)"])
    assert await server.read() == b"on\n"
    knock = "import socket\ns = socket.socket(socket.AF_UNIX)\ntry: s.connect('\\0name')\nexcept OSError as e: print(e.errno)"
    assert int((await python(other, knock)).stdout) in (errno.EPERM, errno.ECONNREFUSED)
    await server.close()
