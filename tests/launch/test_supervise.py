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


def test_processes_may_put_their_things_in_order_before_they_end(tmp_path: Path) -> None:
    ready, farewell = tmp_path / "ready", tmp_path / "farewell"
    orderly = program(
        "server",
        f"""
        import signal, sys, time
        def leave(*_):
            time.sleep(0.2)
            open({str(farewell)!r}, "w").close()
            sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        open({str(ready)!r}, "w").close()
        time.sleep(60)
        """,
    )
    waits = program(
        "trainer", f"import os, time\nwhile not os.path.exists({str(ready)!r}): time.sleep(.01)", ends_stage=True
    )
    run(tmp_path, orderly, waits)
    assert farewell.exists()


def test_an_interrupted_stage_also_stops_its_work_in_order(tmp_path: Path) -> None:
    ready, farewell = tmp_path / "ready", tmp_path / "farewell"
    orderly = program(
        "trainer",
        f"""
        import signal, sys, time
        def leave(*_):
            open({str(farewell)!r}, "w").close()
            sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        open({str(ready)!r}, "w").close()
        time.sleep(60)
        """,
        ends_stage=True,
    )

    async def interrupt() -> None:
        stage = asyncio.create_task(Supervisor(tmp_path, 0).run([orderly]))
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not ready.exists():
                await asyncio.sleep(0.02)
            stage.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stage

    asyncio.run(interrupt())
    assert farewell.exists()


def test_a_service_that_ends_without_an_error_is_started_again(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    server = program(
        "inference",
        f"""
        import time
        open({str(lives)!r}, "a").write("x")
        if open({str(lives)!r}).read() == "xx": time.sleep(60)
        """,
    )
    waits = program(
        "trainer",
        f"""
        import os, time
        while not os.path.exists({str(lives)!r}) or open({str(lives)!r}).read() != "xx": time.sleep(.01)
        """,
        ends_stage=True,
    )
    assert run(tmp_path, server, waits).num_restarts == 1


def test_a_worker_that_was_told_that_the_run_is_over_stays_away(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    worker = program("worker-0", f"open({str(mark)!r}, 'w').close()")
    until = f"import os, time\nwhile not os.path.exists({str(mark)!r}): time.sleep(.01)\n"
    orchestrator = program("orchestrator", until + "time.sleep(0.3)", ends_stage=True)
    trainer = program("trainer", until + "time.sleep(1.2)", ends_stage=True)
    assert run(tmp_path, worker, orchestrator, trainer, max_restarts=0).num_restarts == 0


def test_a_grandchild_that_holds_the_pipe_does_not_hold_up_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hone.launch.supervise.DRAIN_SECONDS", 0.3)
    pid = tmp_path / "pid"
    leaves_one_behind = program(
        "trainer",
        f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        open({str(pid)!r}, "w").write(str(child.pid))
        """,
        ends_stage=True,
    )
    try:
        run(tmp_path, leaves_one_behind)
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_restarts_are_allowed_again_after_a_healthy_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hone.launch.supervise.HEALTHY_SECONDS", 0.1)
    lives = tmp_path / "lives"
    crashes_thrice = program(
        "trainer",
        f"""
        import sys, time
        open({str(lives)!r}, "a").write("x")
        time.sleep(0.2)
        sys.exit(open({str(lives)!r}).read() != "xxxx")
        """,
        ends_stage=True,
    )
    assert run(tmp_path, crashes_thrice, max_restarts=1).num_restarts == 3


@pytest.mark.slow
def test_no_rank_outlives_a_torchrun_that_is_killed(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the parent-death signal is Linux's")
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, time
            from pathlib import Path
            import hone.trainer.start as start

            def stay(folder):
                Path({str(tmp_path)!r}, "pid." + os.environ["RANK"] + ".tmp").write_text(str(os.getpid()))
                Path({str(tmp_path)!r}, "pid." + os.environ["RANK"] + ".tmp").rename(
                    Path({str(tmp_path)!r}, "pid." + os.environ["RANK"])
                )
                time.sleep(60)

            start.join_run = stay
            start.run_process(lambda run: None, [{str(tmp_path)!r}])
            """
        )
    )
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script))
    pids = [tmp_path / "pid.0", tmp_path / "pid.1"]

    async def kill_torchrun() -> None:
        process = await asyncio.create_subprocess_exec(*command)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not all(pid.exists() for pid in pids):
                await asyncio.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            while any(is_alive(int(pid.read_text())) for pid in pids):
                await asyncio.sleep(0.02)

    asyncio.run(kill_torchrun())
