"""Start the processes of a stage, start again those that crash, stop the stage when its work is done."""

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from hone.launch.plan import ProcessPlan
from hone.observability.logs import fields

logger = logging.getLogger(__name__)

HOPELESS = 2
"""Exit code of a process that would fail again: a wrong recipe, a port in use, a full disk."""
# torchrun ends with 1 whatever its ranks ended with, and prints their exit codes.
HOPELESS_RANK = re.compile(rf"\s*exitcode\s*: {HOPELESS} ")
GRACE_SECONDS = 10.0
RESTART_DELAY_SECONDS = 0.2
TAIL_LINES = 200
STORY_LINES = 20


class StageFailed(RuntimeError):
    """A process cannot do its work, or crashed too often; the message is what it said last."""


class Supervisor:
    """Owns the processes of one stage of a run.

    A process that ends with 0 has done its work, with 2 will never do it (the stage fails with its last words), with
    anything else it crashed and is started again, at most `max_restarts` times over the stage. The others keep running.
    """

    def __init__(self, folder: Path, max_restarts: int, show: Callable[[str, str], None] | None = None) -> None:
        self._folder = folder
        self._restarts_left = max_restarts
        self._max_restarts = max_restarts
        self._show = show or (lambda name, line: None)
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self.num_restarts = 0

    async def run(self, plans: Sequence[ProcessPlan]) -> None:
        """Run until every process with `ends_stage` has done its work; raises `StageFailed`."""
        async with self.running(plans) as keepers:
            await asyncio.gather(*(keeper for plan, keeper in zip(plans, keepers, strict=True) if plan.ends_stage))

    @contextlib.asynccontextmanager
    async def running(self, plans: Sequence[ProcessPlan]) -> AsyncIterator[list[asyncio.Task[None]]]:
        """Keep the processes alive while the body runs; a hopeless one ends the body with `StageFailed`."""
        body = asyncio.current_task()
        assert body is not None
        failures: list[StageFailed] = []

        def on_end(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if isinstance(error, StageFailed):
                failures.append(error)
                body.cancel()

        keepers = [asyncio.create_task(self._keep(plan), name=plan.name) for plan in plans]
        for keeper in keepers:
            keeper.add_done_callback(on_end)
        try:
            yield keepers
        except asyncio.CancelledError:
            if failures:
                body.uncancel()
                raise failures[0] from None
            raise
        finally:
            for keeper in keepers:
                keeper.cancel()
            await self._stop()
            await asyncio.gather(*keepers, return_exceptions=True)

    async def _keep(self, plan: ProcessPlan) -> None:
        while True:
            process = await self._start(plan)
            follower = asyncio.create_task(self._follow(plan.name, process))
            try:
                code = await process.wait()
            finally:
                _signal_group(process, signal.SIGKILL)  # ranks and helpers that outlived their parent
                tail = await follower
            self._running.pop(plan.name, None)
            if code == 0:
                logger.info("process ended", extra=fields(name=plan.name))
                return
            last = tail[-1] if tail else "it said nothing"
            if code == HOPELESS or any(HOPELESS_RANK.match(line) for line in tail):
                raise StageFailed(f"{plan.name}: {next((line for line in tail if line.startswith('error:')), last)}")
            if self._restarts_left == 0:
                story = "\n".join(tail[-STORY_LINES:])
                raise StageFailed(
                    f"{plan.name} ended with {_reason(code)} and run.max_restarts = {self._max_restarts} is used up; "
                    f"its last lines (all in {self._stderr(plan.name)}):\n{story}"
                )
            self._restarts_left -= 1
            self.num_restarts += 1
            logger.warning("process restarts", extra=fields(name=plan.name, ended=_reason(code), last=last))
            self._show(plan.name, f"ended with {_reason(code)}, starting again")
            await asyncio.sleep(RESTART_DELAY_SECONDS)  # a crash loop shall not spin

    async def _start(self, plan: ProcessPlan) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *plan.command,
            env=os.environ | plan.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        self._running[plan.name] = process
        self._write_processes()
        return process

    async def _follow(self, name: str, process: asyncio.subprocess.Process) -> list[str]:
        """Copy the standard error of a process to its file and to the console; returns its last lines."""
        assert process.stderr is not None
        tail: list[str] = []
        self._stderr(name).parent.mkdir(parents=True, exist_ok=True)
        with self._stderr(name).open("ab") as file:
            while line := await _read_line(process.stderr):
                file.write(line)
                file.flush()
                text = line.decode(errors="replace").rstrip()
                if text:
                    tail = [*tail[-TAIL_LINES + 1 :], text]
                    self._show(name, text)
        return tail

    async def _stop(self) -> None:
        processes = list(self._running.values())
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await asyncio.gather(*(process.wait() for process in processes))
        for process in processes:
            _signal_group(process, signal.SIGKILL)
        await asyncio.gather(*(process.wait() for process in processes))
        self._running.clear()
        self._write_processes()

    def _write_processes(self) -> None:
        path = self._folder / "processes.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({name: process.pid for name, process in self._running.items()}))
        temporary.replace(path)

    def _stderr(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.stderr"


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # a line longer than the reader's buffer, which readline has dropped
        return b"(a line too long to show)\n"


def _reason(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _die_with_parent() -> None:
    """A launcher that is killed takes its processes along, so that the next start finds the ports free."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
