"""Other runtimes that hold `true` behind namespaces of its own: the same creation, execution and burst for each."""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hone.sandbox.cells.cells import Cells
from sandbox_measures.cells import NETWORK
from sandbox_measures.rounds import FLOOR, Floor, take_turns, timed

NAMES = ("bwrap", "crun", "runc", "runsc")
# A runtime that does not know both versions of cgroups at once sees the newer one only.
PURE_CGROUPS = 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$0" "$@"'


@dataclass(frozen=True, slots=True)
class Peer:
    """How a runtime is called. run: from nothing to the end of `true`. A runtime that cannot execute has no `execute`."""

    name: str
    run: tuple[str, ...]
    start: tuple[str, ...] = ()
    execute: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    is_pure: bool = False


class Stopwatch:
    """A small process that starts commands and times them, in a view of the machine of its own if need be."""

    def __init__(self, *, is_pure: bool) -> None:
        prefix = ["unshare", "--mount", "sh", "-c", PURE_CGROUPS] if is_pure else []
        program = [*prefix, sys.executable, str(Path(__file__).with_name("stopwatch.py"))]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *commands: tuple[str, ...]) -> float:
        """Seconds until all of these, started at once, have ended; `RuntimeError` with what one of them says."""
        self._process.stdin.write(json.dumps(commands) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"problem": "the stopwatch does not start"}')
        if "problem" in answer:
            raise RuntimeError(answer["problem"])
        return answer["seconds"]

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


async def peers(floor: Floor, folder: Path, rounds: int, burst: int) -> dict[str, dict[str, float | str]]:
    """Figures by name, beside the cell's own by the same rules: from nothing to the end of `true` and of the sandbox."""
    found: dict[str, dict[str, float | str]] = {"cell": await _cell(floor, rounds, burst)}
    for name in NAMES:
        if shutil.which(name) is None:
            found[name] = {"reason": "not installed"}
            continue
        try:
            found[name] = await _measure(floor, _peer(name, folder), rounds, burst)
        except RuntimeError as error:
            found[name] = {"reason": str(error)}
    return found


async def _cell(floor: Floor, rounds: int, burst: int) -> dict[str, float | str]:
    async with Cells() as cells:
        running = await cells.create(NETWORK)

        async def run() -> None:
            cell = await cells.create(NETWORK)
            assert (await cell.exec(["true"])).is_success
            await cell.destroy()

        taken = await take_turns(
            rounds, {FLOOR: floor, "run": lambda: timed(run()), "execute": lambda: timed(running.exec(["true"]))}
        )
        seconds = await timed(asyncio.gather(*(run() for _ in range(burst))))
        return {"run_f": taken.ratio("run"), "exec_f": taken.ratio("execute"), "burst_per_second": burst / seconds}


async def _measure(floor: Floor, peer: Peer, rounds: int, burst: int) -> dict[str, float | str]:
    numbers = itertools.count()
    with ExitStack() as stack:
        watch = Stopwatch(is_pure=peer.is_pure)
        stack.callback(watch.close)

        def command(parts: tuple[str, ...], name: str = "") -> tuple[str, ...]:
            return tuple(part.replace("NAME", name or f"bench-{os.getpid()}-{next(numbers)}") for part in parts)

        async def run() -> float:
            return watch(command(peer.run))

        async def execute() -> float:
            return watch(command(peer.execute, "bench-running"))

        measures = {FLOOR: floor, "run": run}
        if peer.execute:
            stack.enter_context(
                _running(watch, command(peer.start, "bench-running"), command(peer.end, "bench-running"))
            )
            measures["execute"] = execute
        taken = await take_turns(rounds, measures)
        seconds = watch(*(command(peer.run) for _ in range(burst)))
        return {
            "run_f": taken.ratio("run"),
            "milliseconds": taken.milliseconds("run"),
            **({"exec_f": taken.ratio("execute")} if peer.execute else {"exec": "has none"}),
            "burst_per_second": burst / seconds,
        }


@contextmanager
def _running(watch: Stopwatch, start: tuple[str, ...], end: tuple[str, ...]) -> Iterator[None]:
    watch(start)
    try:
        yield
    finally:
        watch(end)


def _peer(name: str, folder: Path) -> Peer:
    links = [path for path in ("/bin", "/lib", "/lib64", "/sbin") if Path(path).is_symlink()]
    if name == "bwrap":
        symlinks = [part for path in links for part in ("--symlink", f"usr{path}", path)]
        return Peer(name, ("bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/usr", "/usr", *symlinks,
                           "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "true"))  # fmt: skip
    options = ("--platform=ptrace", "--network=none", "--ignore-cgroups") if name == "runsc" else ()
    runtime = (name, "--root", str(folder / f"{name}-state"), *options)
    once, long = (
        _bundle(folder / f"{name}-{kind}", argv, links)
        for kind, argv in (("once", ["true"]), ("long", ["sleep", "600"]))
    )
    is_detached, is_forced = ("-detach", "-force") if name == "runsc" else ("--detach", "--force")
    return Peer(
        name,
        run=(*runtime, "run", "--bundle", once, "NAME"),
        start=(*runtime, "run", is_detached, "--bundle", long, "NAME"),
        execute=(*runtime, "exec", "NAME", "true"),
        end=(*runtime, "delete", is_forced, "NAME"),
        is_pure=name == "crun" and not Path("/sys/fs/cgroup/cgroup.controllers").exists(),
    )


def _bundle(folder: Path, argv: list[str], links: list[str]) -> str:
    (folder / "rootfs").mkdir(parents=True)
    for name in ("usr", "proc", "dev", "tmp"):
        (folder / "rootfs" / name).mkdir()
    for name in links:
        (folder / "rootfs" / name[1:]).symlink_to(f"usr{name}")
    config = {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": argv, "env": ["PATH=/usr/bin:/bin"], "cwd": "/", "noNewPrivileges": True},
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
