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
import time
from collections import deque
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
"""From SIGTERM to SIGKILL."""
RESTART_DELAY_SECONDS = 0.2
LEAD_SECONDS = 2.0
"""A service that is told to stop at the end of the run may end so much before the process that told it."""
HEALTHY_SECONDS = 600.0
"""After so long without a crash all restarts are allowed again: they are there to stop crash loops."""
DRAIN_SECONDS = 2.0
"""What a process's own children write after its end is waited for so long; some hold the pipe for ever."""
TAIL_LINES = 200
STORY_LINES = 20


class StageFailed(RuntimeError):
    """A process cannot do its work, or crashed too often; the message is what it said last."""


class Supervisor:
    """Owns the processes of a run, stage by stage.

    A process with `ends_stage` that ends with 0 has done its work; a service (without the mark) has none that is done
    before the stage is. With 2 a process will never do its work: the stage fails with its last words. Anything else is
    a crash: the process is started again, at most `max_restarts` times without ten healthy minutes in between. The
    others keep running. To stop, processes get SIGTERM and some seconds before SIGKILL.
    """

    def __init__(self, folder: Path, max_restarts: int, show: Callable[[str, str], None] | None = None) -> None:
        self._folder = folder
        self._restarts_left = max_restarts
        self._max_restarts = max_restarts
        self._show = show or (lambda name, line: None)
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._work_done = asyncio.Event()
        self._crashed_at = time.monotonic()
        self.num_restarts = 0

    async def run(self, plans: Sequence[ProcessPlan]) -> None:
        """Run until every process with `ends_stage` has done its work; raises `StageFailed`."""
        async with self.running(plans) as keepers:
            # Not gather, which would cancel the keepers along with us and so kill their processes without a grace.
            await asyncio.wait([keeper for plan, keeper in zip(plans, keepers, strict=True) if plan.ends_stage])

    @contextlib.asynccontextmanager
    async def running(self, plans: Sequence[ProcessPlan]) -> AsyncIterator[list[asyncio.Task[None]]]:
        """Keep the processes alive while the body runs; a hopeless one ends the body with `StageFailed`."""
        body = asyncio.current_task()
        assert body is not None
        failures: list[BaseException] = []

        def on_end(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None and not self._stopping.is_set():
                failures.append(error)
                if len(failures) == 1:
                    body.cancel()

        self._stopping.clear()
        self._work_done.clear()
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
            await self._stop(keepers)

    async def _keep(self, plan: ProcessPlan) -> None:
        while not self._stopping.is_set():
            code, tail = await self._live(plan)
            if self._stopping.is_set():
                return
            if code == 0 and (plan.ends_stage or await self._is_work_done()):
                logger.info("process ended", extra=fields(name=plan.name))
                self._work_done.set()
                return
            self._count_crash(plan.name, code, tail)
            await asyncio.sleep(RESTART_DELAY_SECONDS)  # a crash loop shall not spin

    async def _live(self, plan: ProcessPlan) -> tuple[int, list[str]]:
        """One life of a process: its exit code and its last lines."""
        # A pipe of our own: the one that asyncio makes holds up `wait` until the process's last descendant has closed it.
        reading, writing = os.pipe()
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        follower = asyncio.create_task(self._follow(plan.name, reading, tail))
        try:
            process = await self._start(plan, writing)
        finally:
            os.close(writing)
        try:
            code = await process.wait()
        finally:
            _signal_group(process, signal.SIGKILL)  # helpers that outlived their parent
            self._running.pop(plan.name, None)
            await asyncio.wait([follower], timeout=DRAIN_SECONDS)
            follower.cancel()
        return code, list(tail)

    async def _is_work_done(self) -> bool:
        """Whether a process with `ends_stage` has done its work, or does so in a moment."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._work_done.wait(), LEAD_SECONDS)
        return self._work_done.is_set()

    def _count_crash(self, name: str, code: int, tail: list[str]) -> None:
        """Raise `StageFailed` when starting again is not worth it."""
        last = tail[-1] if tail else "it said nothing"
        if code == HOPELESS or any(HOPELESS_RANK.match(line) for line in tail):
            raise StageFailed(f"{name}: {next((line for line in tail if line.startswith('error:')), last)}")
        now = time.monotonic()
        if now - self._crashed_at > HEALTHY_SECONDS:
            self._restarts_left = self._max_restarts
        self._crashed_at = now
        if self._restarts_left == 0:
            story = "\n".join(tail[-STORY_LINES:])
            raise StageFailed(
                f"{name} ended with {_reason(code)} and run.max_restarts = {self._max_restarts} is used up; "
                f"its last lines (all in {self._stderr(name)}):\n{story}"
            )
        self._restarts_left -= 1
        self.num_restarts += 1
        logger.warning("process restarts", extra=fields(name=name, ended=_reason(code), last=last))
        self._show(name, f"ended with {_reason(code)}, starting again")

    async def _start(self, plan: ProcessPlan, stderr: int) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *plan.command,
            env=os.environ | plan.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        self._running[plan.name] = process
        if self._stopping.is_set():  # it was being started when the others were told
            _signal(process, signal.SIGTERM)
        self._write_processes()
        return process

    async def _follow(self, name: str, stderr: int, tail: deque[str]) -> None:
        """Copy what arrives in the pipe of a process to its file, to the console and to `tail`."""
        lines = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), os.fdopen(stderr, "rb")
        )
        self._stderr(name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(transport), self._stderr(name).open("ab") as file:
            while line := await _read_line(lines):
                with contextlib.suppress(OSError):  # a full disk: the process itself will say so
                    file.write(line)
                    file.flush()
                text = line.decode(errors="replace").rstrip()
                if text:
                    tail.append(text)
                    self._show(name, text)

    async def _stop(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        """Ask the processes to end, kill those that do not."""
        self._stopping.set()
        for process in self._running.values():
            _signal(process, signal.SIGTERM)  # its helpers are its own to end
        try:
            await asyncio.wait(keepers, timeout=GRACE_SECONDS)
        finally:
            for keeper in keepers:
                keeper.cancel()  # kills what is left
            await asyncio.gather(*keepers, return_exceptions=True)
            with contextlib.suppress(OSError):  # must not hide why the stage ends
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


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _die_with_parent() -> None:
    """A launcher that is killed takes its processes along, so that the next start finds the ports free."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
