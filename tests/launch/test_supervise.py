"""The supervisor with real processes: small Python programs in place of trainers and servers."""

import asyncio
import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from hone.launch.plan import ProcessPlan
from hone.launch.supervise import StageFailed, Supervisor

DEADLINE_SECONDS = 30


def program(name: str, source: str, *, ends_stage: bool = False) -> ProcessPlan:
    return ProcessPlan(name, (sys.executable, "-c", textwrap.dedent(source)), ends_stage=ends_stage)


def run(folder: Path, *plans: ProcessPlan, max_restarts: int = 3) -> Supervisor:
    supervisor = Supervisor(folder, max_restarts)
    asyncio.run(asyncio.wait_for(supervisor.run(plans), DEADLINE_SECONDS))
    return supervisor


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_stage_ends_with_its_last_marked_process_and_takes_the_others_along(tmp_path: Path) -> None:
    server = program(
        "server", f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    worker = program(
        "worker",
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(.01)",
        ends_stage=True,
    )
    run(tmp_path, server, worker)
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert json.loads((tmp_path / "processes.json").read_text()) == {}


def test_a_crashed_process_starts_again(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    crashes_once = program(
        "trainer",
        f"""
        import os, signal
        if not os.path.exists({str(mark)!r}):
            open({str(mark)!r}, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        ends_stage=True,
    )
    assert run(tmp_path, crashes_once).num_restarts == 1


def test_exit_code_2_ends_the_stage_with_the_last_line(tmp_path: Path) -> None:
    hopeless = program("server", "import sys; print('port 80 is taken', file=sys.stderr); sys.exit(2)")
    waits = program("trainer", "import time; time.sleep(60)", ends_stage=True)
    with pytest.raises(StageFailed, match="server: port 80 is taken"):
        run(tmp_path, hopeless, waits)


def test_a_process_that_crashes_too_often_ends_the_stage_with_its_story(tmp_path: Path) -> None:
    crashes = program("trainer", "raise RuntimeError('out of luck')", ends_stage=True)
    with pytest.raises(StageFailed, match=r"(?s)max_restarts = 2 is used up.*out of luck"):
        run(tmp_path, crashes, max_restarts=2)


def test_standard_error_is_kept_in_the_run_folder(tmp_path: Path) -> None:
    run(tmp_path, program("trainer", "import sys; print('a long story', file=sys.stderr)", ends_stage=True))
    assert (tmp_path / "logs" / "trainer.stderr").read_text() == "a long story\n"


def test_a_process_that_ignores_the_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hone.launch.supervise.GRACE_SECONDS", 0.3)
    pid = tmp_path / "pid"
    stubborn = program(
        "server",
        f"""
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open({str(pid)!r}, "w").write(str(os.getpid()))
        time.sleep(60)
        """,
    )
    waits = program(
        "trainer", f"import os, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(.01)", ends_stage=True
    )
    run(tmp_path, stubborn, waits)
    assert not is_alive(int(pid.read_text()))


def test_a_killed_launcher_takes_its_processes_along(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    launcher = f"""
import asyncio, sys
from pathlib import Path
from hone.launch.plan import ProcessPlan
from hone.launch.supervise import Supervisor
code = "import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
asyncio.run(Supervisor(Path({str(tmp_path)!r}), 0).run([ProcessPlan("p", (sys.executable, "-c", code), ends_stage=True)]))
"""

    async def kill_launcher() -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", launcher)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not pid.exists() or not pid.read_text():
                await asyncio.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            while is_alive(int(pid.read_text())):
                await asyncio.sleep(0.02)

    if sys.platform != "linux":
        pytest.skip("the parent-death signal is Linux's")
    asyncio.run(kill_launcher())


def test_a_rank_that_will_never_work_ends_the_stage_through_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("import sys\nprint('error: the disk is full', file=sys.stderr)\nsys.exit(2)\n")
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script))
    with pytest.raises(StageFailed, match="trainer: error: the disk is full"):
        run(tmp_path, ProcessPlan("trainer", command, ends_stage=True))
