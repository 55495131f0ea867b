"""Cgroups of cells: limits by v2 or v1 controllers, kill and freeze by v2, in trees of which this process owns a part.

Paths are plain strings where every creation and every program passes: pathlib would be half of what those cost.
"""

import collections
import contextlib
import itertools
import os
import re
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hone.sandbox.cells.host import CgroupFolders
from hone.schema.sandboxes import SandboxSpec

PREFIX = "hone-cells-"
PERIOD_MICROSECONDS = 100_000
RESERVED_PROCESSES = {
    "cell": 1,
    "process": 2,
    "bwrap": 3,
    "oci": 3,
    "gvisor": 1024,
}  # the agent; its guardian; another runtime's program; threads of a kernel of its own
DYING_SECONDS = 2.0  # what was killed needs a moment; its folders cannot go before
LEAVING_SECONDS = 1.0
MAX_SPARES = 64  # making and removing a cell's folders is a fifth of its creation
MAX_LOOKED_AT = 4  # folders of ended programs, when the next one needs a folder

_NUMBERS = itertools.count()


def own_name() -> str:
    """A name for what belongs to this process, by which others see whether it still lives (`is_orphan`)."""
    return f"{PREFIX}{os.getpid()}-{_start_time(os.getpid())}-{next(_NUMBERS)}"


class Cgroups:
    """A folder of this process's own in each tree, and cells' folders below. `close` when all cells are gone."""

    def __init__(self, folders: CgroupFolders) -> None:
        self.name = own_name()
        self.unified: Path | None = None
        self.controllers: dict[str, Path] = {}
        self.unified_controllers: frozenset[str] = frozenset()
        self._spares: dict[Limits, list[CellCgroup]] = {}
        if (parent := _home(folders.unified)) is not None:
            self.unified = _make(parent / self.name)
            if self.unified is not None:
                self.unified_controllers = _enable(parent, self.unified, folders.unified_controllers)
        for controller, folder in folders.v1.items():
            if (made := _make(folder / self.name)) is not None:
                self.controllers[controller] = made

    def has(self, controller: str) -> bool:
        """Whether cells' use of memory, pids or cpu is limited."""
        return controller in self.controllers or controller in self.unified_controllers

    def memory_bytes(self) -> int | None:
        """What all cells use now, files included; None where nobody counts."""
        if self.unified is not None and "memory" in self.unified_controllers:
            return _number(f"{self.unified}/memory.current")
        return _number(f"{self.controllers['memory']}/memory.usage_in_bytes") if "memory" in self.controllers else None

    def cpu_seconds(self) -> float | None:
        """What all cells used since this process began, those that are gone included; None without v2."""
        return _field(f"{self.unified}/cpu.stat", "usage_usec") / 1e6 if self.unified is not None else None

    def take(self, spec: SandboxSpec) -> "CellCgroup | None":
        """The folders of a cell of the same limits that is gone, if there are any."""
        spares = self._spares.get(_limits(spec))
        return spares.pop() if spares else None

    def create(self, name: str, spec: SandboxSpec, uid: int) -> "CellCgroup":
        """New folders with a cell's limits. uid: who may put processes into those of its programs."""
        cgroup = CellCgroup(
            name,
            f"{self.unified}/{name}" if self.unified else None,
            {controller: f"{folder}/{name}" for controller, folder in self.controllers.items()},
            self.unified_controllers,
            uid,
            _limits(spec),
        )
        try:
            cgroup.make()
        except BaseException:  # a cancellation too: undo, then pass it on
            cgroup.remove()
            raise
        return cgroup

    def give_back(self, cgroup: "CellCgroup") -> bool:
        """Keep the folders of a cell that is gone for the next; False if they are not fit for it, and to be removed."""
        spares = self._spares.setdefault(cgroup.limits, [])
        if len(spares) >= MAX_SPARES or not cgroup.is_fit():
            return False
        spares.append(cgroup)
        return True

    def close(self) -> None:
        """Remove the folders of this process; those of living cells have to be gone."""
        for cgroup in itertools.chain.from_iterable(self._spares.values()):
            cgroup.remove()
        for folder in (self.unified, *self.controllers.values()):
            if folder is not None:
                _remove(folder)


@dataclass(frozen=True, slots=True)
class Counters:
    """How often a cell hit its limits so far."""

    memory: int = 0
    processes: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a cell may use: bytes, processes (those that are no programs of its own included), microseconds of every
    100,000.
    """

    memory_bytes: int
    processes: int
    quota_microseconds: int
    reserved_processes: int = 1


class CellCgroup:
    """The folders of one cell."""

    def __init__(
        self,
        name: str,
        unified: str | None,
        v1: dict[str, str],
        unified_controllers: frozenset[str],
        uid: int,
        limits: Limits,
    ) -> None:
        self.name = name
        self.uid = uid
        self.limits = limits
        self._unified = unified
        self._v1 = v1
        self._unified_controllers = unified_controllers
        self._numbers = itertools.count()
        self._made: set[int] = set()
        self._left: collections.deque[int] = collections.deque()
        self._killed: set[int] = set()
        self.generation = 0
        """Which cell has the folders: what belongs to the one before may not touch them any more."""
        self._is_killed = False
        self.before = Counters()  # what earlier cells in these folders hit
        self._before = (0.0, 0)  # and used: seconds of processors, the most memory

    @property
    def can_freeze(self) -> bool:
        """Whether there is a v2 folder: the cell can be paused, and programs be killed with all they started."""
        return self._unified is not None

    def make(self) -> None:
        """Make the folders and write the limits."""
        memory, processes = str(self.limits.memory_bytes), str(self.limits.processes)
        quota = self.limits.quota_microseconds
        if self._unified is not None:
            os.mkdir(self._unified)  # noqa: PTH102
            _hand_over(self._unified, self.uid)
            if "memory" in self._unified_controllers:
                _write(f"{self._unified}/memory.max", memory)
                _write(f"{self._unified}/memory.swap.max", "0", is_optional=True)
            if "pids" in self._unified_controllers:
                _write(f"{self._unified}/pids.max", processes)
            if "cpu" in self._unified_controllers:
                _write(f"{self._unified}/cpu.max", f"{quota} {PERIOD_MICROSECONDS}")
        for controller, folder in self._v1.items():
            os.mkdir(folder)  # noqa: PTH102
            if controller == "memory":
                _write(f"{folder}/memory.limit_in_bytes", memory)
                _write(f"{folder}/memory.memsw.limit_in_bytes", memory, is_optional=True)
            elif controller == "pids":
                _write(f"{folder}/pids.max", processes)
            elif controller == "cpu":
                _write(f"{folder}/cpu.cfs_quota_us", str(quota))

    @contextlib.contextmanager
    def entrances(self) -> Iterator[tuple[int | None, list[int]]]:
        """Descriptors for a cell that is being born: of its v2 folder, and of the v1 files it enters by itself.

        A thread that enters a v1 cgroup by itself takes no lock that stops the machine's other forks and exits.
        """
        with contextlib.ExitStack() as stack:
            unified = None
            if self._unified is not None:
                unified = os.open(self._unified, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, unified)
            tasks = []
            for folder in self._v1.values():
                tasks.append(os.open(f"{folder}/tasks", os.O_WRONLY | os.O_CLOEXEC))
                stack.callback(os.close, tasks[-1])
            yield unified, tasks

    def enter(self) -> "ProgramCgroup | None":
        """A v2 folder for one program and all it starts; None without v2."""
        if self._unified is None:
            return None
        number = self._find_empty()
        if number is None:
            number = next(self._numbers)
            folder = f"{self._unified}/{number}"
            os.mkdir(folder)  # noqa: PTH102
            self._made.add(number)
            _hand_over(folder, self.uid)
        return ProgramCgroup(self, number, f"{self._unified}/{number}")

    def take_back(self, number: int, *, is_killed: bool) -> None:
        """The program of this folder is over; once what it left behind is, too, another program gets it.

        A folder that was killed is not used again: Linux 6.18 kills whatever is born into it from outside ever after.
        """
        if not is_killed:
            self._left.append(number)
        else:
            self._remove_killed(number)

    def mark_killed(self, number: int) -> None:
        """This program's folder is being killed."""
        self._killed.add(number)

    def _remove_killed(self, number: int) -> bool:
        if not _remove(f"{self._unified}/{number}"):
            return False
        self._made.discard(number)
        self._killed.discard(number)
        return True

    def counters(self) -> Counters:
        """How often the limits were hit, as far as they are counted."""
        memory = processes = 0
        if "memory" in self._unified_controllers and self._unified is not None:
            memory = _field(f"{self._unified}/memory.events", "oom_kill")
        elif "memory" in self._v1:
            memory = _field(f"{self._v1['memory']}/memory.oom_control", "oom_kill")
        if "pids" in self._unified_controllers and self._unified is not None:
            processes = _field(f"{self._unified}/pids.events", "max")
        elif "pids" in self._v1:
            processes = _field(f"{self._v1['pids']}/pids.events", "max")
        return Counters(memory, processes)

    def memory_bytes(self) -> int | None:
        """What it uses now, files included; None where nobody counts."""
        if self._unified is not None and "memory" in self._unified_controllers:
            return _number(f"{self._unified}/memory.current")
        return _number(f"{self._v1['memory']}/memory.usage_in_bytes") if "memory" in self._v1 else None

    def peak_memory_bytes(self) -> int | None:
        """The most it used at once; None where nobody counts, or an earlier cell in these folders used more."""
        peak = self._peak()
        return None if peak is None or peak <= self._before[1] else peak

    def cpu_seconds(self) -> float | None:
        """What its processes used, those that are gone included; None without v2, which counts without a controller."""
        seconds = self._cpu_seconds()
        return None if seconds is None else seconds - self._before[0]

    def num_processes(self) -> int | None:
        """Processes and threads alive in it, its agent left out; None where nobody counts."""
        if self._unified is not None and "pids" in self._unified_controllers:
            number = _number(f"{self._unified}/pids.current")
        else:
            number = _number(f"{self._v1['pids']}/pids.current") if "pids" in self._v1 else None
        return None if number is None else max(0, number - self.limits.reserved_processes)

    def _cpu_seconds(self) -> float | None:
        return _field(f"{self._unified}/cpu.stat", "usage_usec") / 1e6 if self._unified is not None else None

    def _peak(self) -> int | None:
        if self._unified is not None and "memory" in self._unified_controllers:
            return _number(f"{self._unified}/memory.peak")
        return _number(f"{self._v1['memory']}/memory.max_usage_in_bytes") if "memory" in self._v1 else None

    def kill(self) -> None:
        """Kill everything in it, where there is v2."""
        self._is_killed = True
        if self._unified is not None:
            with contextlib.suppress(FileNotFoundError):
                _write(f"{self._unified}/cgroup.kill", "1")

    def freeze(self, frozen: bool) -> None:
        """Ask the kernel to stop, or to go on with, everything in it."""
        assert self._unified is not None
        _write(f"{self._unified}/cgroup.freeze", "1" if frozen else "0")

    def is_frozen(self) -> bool:
        """Whether everything in it has stopped."""
        assert self._unified is not None
        return _field(f"{self._unified}/cgroup.events", "frozen") == 1

    def _find_empty(self) -> int | None:
        assert self._unified is not None
        for _ in range(min(MAX_LOOKED_AT, len(self._left))):
            number = self._left.popleft()
            if _field(f"{self._unified}/{number}/cgroup.events", "populated") == 0:
                return number
            self._left.append(number)
        return None

    def is_fit(self) -> bool:
        """Whether another cell could have the folders: all is over in there, and none has been killed as a whole."""
        if self._is_killed or (self._unified is not None and _field(f"{self._unified}/cgroup.events", "populated")):
            return False
        if not all(self._remove_killed(number) for number in sorted(self._killed)):
            return False
        self.generation += 1
        self._left = collections.deque(sorted(self._made))
        self.before = self.counters()
        if "memory" in self._v1:  # v2 has no way to begin anew that outlives a descriptor
            _write(f"{self._v1['memory']}/memory.max_usage_in_bytes", "0", is_optional=True)
        self._before = (self._cpu_seconds() or 0.0, self._peak() or 0)
        return True

    def remove(self) -> bool:
        """Remove the folders; False while something in them is not quite dead yet."""
        is_gone = True
        if self._unified is not None:
            for number in self._made:
                is_gone = _remove(f"{self._unified}/{number}") and is_gone
            is_gone = _remove(self._unified) and is_gone
        for folder in self._v1.values():
            is_gone = _remove(folder) and is_gone
        return is_gone


class ProgramCgroup:
    """The v2 folder of one program in a cell and all that it starts."""

    def __init__(self, cell: CellCgroup, number: int, folder: str) -> None:
        self._cell = cell
        self._number = number
        self._folder = folder
        self._is_killed = False
        self._generation = cell.generation

    def open(self, *, joins: bool = False) -> int:
        """A descriptor to be born by, or of a file to write to from inside; the caller closes it."""
        if joins:
            return os.open(f"{self._folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        return os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def kill(self) -> None:
        """Kill the program and everything it started, daemons included."""
        if self._generation != self._cell.generation:
            return  # its cell is gone, and it with it
        self._is_killed = True
        self._cell.mark_killed(self._number)
        with contextlib.suppress(FileNotFoundError):
            _write(f"{self._folder}/cgroup.kill", "1")

    def leave(self) -> None:
        """The program is over."""
        if self._generation == self._cell.generation:
            self._cell.take_back(self._number, is_killed=self._is_killed)


def _limits(spec: SandboxSpec) -> Limits:
    """Files count as memory: a cell has its disk on top of what its programs may use."""
    reserved = RESERVED_PROCESSES[spec.runtime]
    return Limits(
        memory_bytes=(spec.memory_mb + spec.disk_mb) << 20,
        processes=spec.max_processes + reserved,
        quota_microseconds=max(1000, round(spec.cpus * PERIOD_MICROSECONDS)),
        reserved_processes=reserved,
    )


def sweep(folders: CgroupFolders) -> int:
    """Kill and remove what processes that are no more left behind; how many cells that were."""
    num_cells = 0
    for parent in (_home(folders.unified), *folders.v1.values()):
        for own in parent.glob(f"{PREFIX}*") if parent is not None else ():
            if not is_orphan(own.name):
                continue
            with contextlib.suppress(OSError):
                _write(own / "cgroup.kill", "1")
                _wait_until_empty(own)
            for name, _, _ in os.walk(own, topdown=False):  # another process may be sweeping, too
                folder = Path(name)
                if _remove_left(folder) and folder.parent == own and parent == _home(folders.unified):
                    num_cells += 1
    return num_cells


def _wait_until_empty(folder: Path) -> None:
    """Until no process is left in a cgroup of version 2 or below it; the kernel announces the change of its events."""
    ends = time.monotonic() + DYING_SECONDS
    with (folder / "cgroup.events").open() as events:
        changes = select.poll()
        changes.register(events, select.POLLPRI)
        while "populated 1" in events.read() and (left := ends - time.monotonic()) > 0:
            changes.poll(left * 1000)
            events.seek(0)


def is_orphan(name: str) -> bool:
    """Whether the process that a folder is named after is gone, also where another one has its number."""
    match = re.fullmatch(rf"{PREFIX}(\d+)-(\d+)-\d+(-owner)?", name)
    return match is not None and _start_time(int(match[1])) != int(match[2])


def _start_time(pid: int) -> int:
    """In the kernel's ticks since its start; 0 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def _enable(parent: Path, own: Path, wanted: frozenset[str]) -> frozenset[str]:
    """Let cells below `own` be limited: controllers go down from `parent`, which may then hold no processes itself.

    A parent that this process has to itself, as in a systemd service with Delegate=yes, is left for a folder beside.
    """
    if not wanted:
        return frozenset()
    order = " ".join(f"+{controller}" for controller in sorted(wanted))
    try:
        try:
            _write(parent / "cgroup.subtree_control", order)
        except OSError:
            members = (parent / "cgroup.procs").read_text().split()
            if members != [str(os.getpid())]:
                return frozenset()
            leaf = parent / f"{own.name}-owner"
            leaf.mkdir()
            _write(leaf / "cgroup.procs", str(os.getpid()))
            _write(parent / "cgroup.subtree_control", order)
        _write(own / "cgroup.subtree_control", order)
    except OSError:
        return frozenset()
    return wanted


def _home(unified: Path | None) -> Path | None:
    """Where this process's folders are to be: beside the one that it left its parent for before (`_enable`)."""
    is_leaf = unified is not None and re.fullmatch(rf"{PREFIX}\d+-\d+-\d+-owner", unified.name)
    return unified.parent if unified is not None and is_leaf else unified


def _make(folder: Path) -> Path | None:
    try:
        folder.mkdir()
    except OSError:
        return None
    return folder


def _remove(folder: Path | str) -> bool:
    try:
        os.rmdir(folder)  # noqa: PTH106
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _remove_left(folder: Path) -> bool:
    """Remove a cgroup, also where a process that is listed no more is counted in it yet."""
    ends = time.monotonic() + LEAVING_SECONDS
    while not _remove(folder):
        if time.monotonic() > ends or not _is_listed_empty(folder):
            return False
        time.sleep(0.002)
    return True


def _is_listed_empty(folder: Path) -> bool:
    try:
        return not (folder / "cgroup.procs").read_bytes() and not any(path.is_dir() for path in folder.iterdir())
    except OSError:
        return True


def _hand_over(folder: str, uid: int) -> None:
    if uid != os.geteuid():
        os.chown(f"{folder}/cgroup.procs", uid, -1)


def _write(path: Path | str, text: str, *, is_optional: bool = False) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if is_optional:
            return
        raise
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _field(path: str, name: str) -> int:
    """A number in a file of lines "name number"; 0 where there is none."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: str) -> str:
    """What is in a file of the kernel's; nothing where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 4096).decode()
    except OSError:
        return ""
    finally:
        os.close(descriptor)
