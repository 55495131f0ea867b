"""A node: cells of this machine for whoever holds a lease on one. It does what `Lifecycle` decides."""

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from hone.observability.spans import Spans
from hone.sandbox.beneath import Owner
from hone.sandbox.cells import Cell, Cells
from hone.sandbox.descriptors import provide_for_cells
from hone.sandbox.egress import PROXY_PORT, NetworkPolicy, proxy_variables
from hone.sandbox.errors import ImageError, SandboxError, Unsupported
from hone.sandbox.files import Files, Tree
from hone.sandbox.images import ImageStore
from hone.sandbox.journal import Journal
from hone.sandbox.lifecycle import Command, Destroy, End, Give, Lease, Lifecycle, Limits, Make, Over, Stage
from hone.sandbox.network_log import NetworkLog
from hone.sandbox.programs import Process
from hone.sandbox.proxy import MAX_WAITING, Gate, Proxy
from hone.sandbox.python import PythonSession, WarmPython, Zygotes
from hone.sandbox.records import Records
from hone.sandbox.report import report_of
from hone.schema.sandbox_network import NetworkRecord, parse_rules
from hone.schema.sandbox_nodes import NodeReport
from hone.schema.sandboxes import (
    ExecResult,
    FileEntry,
    Outcome,
    PythonResult,
    SandboxSpec,
    SandboxStatus,
    SandboxUsage,
)

TICK_SECONDS = 1.0
NUM_FILE_THREADS = 4
MAX_IMAGES_TOLD = 1000
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")

logger = logging.getLogger("hone.sandbox.node")


class Node:
    """Leases sandboxes; an async context manager. Leaving it, or the death of this process, ends all of them.

    name: small letters, digits and dashes; the first part of the ids of its sandboxes, which also say which start of the
    node they are of. folder: for its journal, its accounts and the log of what sandboxes asked of the network; None keeps
    none. network: what sandboxes with an allow-list get. spans: where its pieces of work are told, None nowhere; the
    caller's to close. Raises `SandboxError` where another node has the folder.
    """

    def __init__(
        self,
        name: str = "local",
        *,
        folder: Path | None = None,
        limits: Limits = Limits(),
        images: ImageStore | None = None,
        is_weak_allowed: bool = False,
        spans: Spans | None = None,
        network: NetworkPolicy = NetworkPolicy(),
    ) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"the node's name {name!r} is not of small letters, digits and dashes")
        self.name = name
        self.prefix = f"{name}.{secrets.token_hex(4)}."
        self.lost: dict[str, str] = {}
        """What the node of this folder before had not ended: owners by sandbox id."""
        self.records = Records(spans)
        self._folder = folder
        self._journal: Journal | None = None
        self._lifecycle = Lifecycle(self.prefix, limits)
        self._images = images or ImageStore()
        self._cells = Cells(is_weak_allowed=is_weak_allowed)
        self.gate = Gate(network, NetworkLog(folder))
        """The way out for the sandboxes with an allow-list."""
        self._zygotes = Zygotes(host=self._cells.host)
        self._threads = ThreadPoolExecutor(NUM_FILE_THREADS, thread_name_prefix="hone-files")
        self._by_number: dict[int, Cell] = {}
        self._sandboxes: dict[str, NodeSandbox] = {}
        self._holders: dict[int, NodeSandbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._makings: set[asyncio.Task[None]] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._used_images: dict[str, None] = {"python": None}
        self._is_closing = False

    async def __aenter__(self) -> Self:
        if self._folder is not None:
            self._journal = Journal(self._folder)
            self.lost = self._journal.lost
            self.records.open(self._folder)
        self._make_room()
        try:
            await self._cells.__aenter__()
        except BaseException:  # a cancellation too: undo, then pass it on
            if self._journal is not None:
                self._journal.close()
            raise
        await self._zygotes.__aenter__()
        self._ticking = asyncio.get_running_loop().create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closing = True
        for sandbox_id in list(self._sandboxes):
            self._lifecycle.end(
                sandbox_id, time.monotonic(), "its node was stopped", Outcome.NODE_LOST, End.NODE_STOPPED
            )
        self._obey()
        if self._ticking is not None:
            self._ticking.cancel()
        for making in self._makings:
            making.cancel()
        while self._tasks:  # an end may begin another
            await asyncio.wait(set(self._tasks))
        try:
            await self._cells.__aexit__(kind, error, trace)
        finally:
            await self._zygotes.__aexit__(kind, error, trace)
            await asyncio.to_thread(self._threads.shutdown)
            self.records.close()
            self.gate.close()
            if self._journal is not None:
                self._journal.close()

    def _make_room(self) -> None:
        limits = self._lifecycle.limits
        number = provide_for_cells(limits.max_sandboxes)
        if number < limits.max_sandboxes:
            logger.info("files may be open for %d sandboxes, not %d; raise `ulimit -n`", number, limits.max_sandboxes)
            self._lifecycle.limits = replace(limits, max_sandboxes=number)

    async def until_empty(self, seconds: float) -> None:
        """Take no new sandboxes, and wait for the end of those that are there, but no longer than this."""
        self.drain(True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._sandboxes:
                    await asyncio.wait([one.over for one in self._sandboxes.values()])
                while self._tasks:  # of which the last cells are ended
                    await asyncio.wait(set(self._tasks))

    @property
    def is_draining(self) -> bool:
        """Whether it takes no new sandboxes."""
        return self._lifecycle.is_draining or self._is_closing

    def create(self, spec: SandboxSpec, *, key: str = "", owner: str = "") -> "NodeSandbox":
        """A sandbox that will be ready; returns at once. key: asked twice by one owner, it is the same sandbox.

        Raises `Busy` when as many wait as may.
        """
        if self._is_closing:
            raise SandboxError(f"the node {self.name} is stopping", Outcome.NODE_LOST)
        if any(rule.is_private for rule in parse_rules(spec.allow)) and not self.gate.policy.is_private_allowed:
            raise Unsupported(f"the node {self.name} lets no sandbox into private networks: allow {list(spec.allow)}")
        lease = self._lifecycle.ask(spec, time.monotonic(), key=key, owner=owner)
        sandbox = self._sandboxes.get(lease.sandbox_id)
        if sandbox is None:
            sandbox = self._sandboxes[lease.sandbox_id] = NodeSandbox(self, lease)
            if self._journal is not None:
                self._journal.begin(lease.sandbox_id, owner)
        self._obey()
        return sandbox

    def sandbox(self, sandbox_id: str) -> "NodeSandbox":
        """A sandbox by its id; `SandboxError` that says why there is none."""
        self._lifecycle.find(sandbox_id)
        return self._sandboxes[sandbox_id]

    def sandboxes(self, owner: str | None = None) -> tuple[SandboxStatus, ...]:
        """All sandboxes, or those of one owner."""
        return tuple(
            one.status() for one in list(self._sandboxes.values()) if owner is None or one.lease.owner == owner
        )

    def drain(self, is_draining: bool) -> int:
        """Take no new sandboxes, or take them again; the number of those that are left."""
        self._lifecycle.is_draining = is_draining
        return len(self._lifecycle.leases)

    def report(self) -> NodeReport:
        """What a gateway has to know."""
        return report_of(self._lifecycle, self._used_images)

    async def keep_warm(self, spec: SandboxSpec, count: int) -> None:
        """Keep so many cells of this kind ready, within `Limits.max_warm`, whatever the demand."""
        self._lifecycle.keep_warm(spec, count, time.monotonic())
        self._obey()

    def statistics(self) -> dict[str, float]:
        """Numbers to watch. `leases` without `cells` or the other way round for long would be a leak."""
        lifecycle = self._lifecycle
        return {
            "sandbox/leases": len(lifecycle.leases),
            "sandbox/queued": lifecycle.num_in(Stage.QUEUED),
            "sandbox/starting": lifecycle.num_in(Stage.STARTING),
            "sandbox/ready": lifecycle.num_in(Stage.READY),
            "sandbox/warm": lifecycle.num_warm,
            "sandbox/ending": lifecycle.num_dying,
            "sandbox/cells": len(self._by_number),
            "sandbox/unmatched": self.num_unmatched,
            "sandbox/created": self.records.tallies.cells_made,
            "sandbox/failed": self.records.tallies.cells_failed,
            "sandbox/refused": lifecycle.num_busy,
            "sandbox/calls": self.records.tallies.num_calls,
            "sandbox/lost_before_start": len(self.lost),
            "sandbox/swept_at_start": self._cells.num_swept,
            "sandbox/zygotes": self._zygotes.count,
            "sandbox/draining": float(self.is_draining),
            "sandbox/max_sandboxes": lifecycle.limits.max_sandboxes,
            "sandbox/memory_bytes": self._cells.memory_bytes() or 0,
            "sandbox/cpu_seconds": self.cpu_seconds,
            **self.gate.statistics(),
        }

    @property
    def num_unmatched(self) -> int:
        """Cells that no lease, pool, making or end accounts for, and ready leases without a cell; 0 if all is well."""
        leased = {lease.cell for lease in self._lifecycle.leases.values() if lease.stage is Stage.READY}
        held = {number for number, one in self._holders.items() if not one.over.done()}
        unknown = self._cells.living().difference(self._by_number.values())
        return len(leased ^ held) + max(0, len(unknown) - self._lifecycle.num_making)

    @property
    def cpu_seconds(self) -> float:
        """What all cells used so far; where no cgroup counts, those that are gone."""
        seconds = self._cells.cpu_seconds()
        return self.records.tallies.ended_cpu_seconds if seconds is None else seconds

    @property
    def output_bytes(self) -> int:
        """Read from programs' streams so far."""
        return self.records.tallies.ended_output_bytes + sum(
            cell.tally.output_bytes for cell in self._by_number.values()
        )

    def usage(self, sandbox_id: str, owner: str | None = None) -> SandboxUsage:
        """What a sandbox has used, or used in all if it ended not too long ago. owner: whose it has to be, if anybody's."""
        for sandbox in (self._sandboxes.get(sandbox_id), *self._holders.values()):
            if sandbox is not None and sandbox.sandbox_id == sandbox_id and owner in (None, sandbox.lease.owner):
                return sandbox.used()
        ended = self.records.find(sandbox_id)
        if ended is None or owner not in (None, ended.owner):
            raise SandboxError(f"{sandbox_id}: there is no such sandbox (any more)")
        return ended.usage

    @contextlib.contextmanager
    def use(self, lease: Lease) -> Iterator[None]:
        """A call of a sandbox, which is not idle meanwhile."""
        self._lifecycle.begin_use(lease)
        try:
            yield
        finally:
            self._lifecycle.end_use(lease, time.monotonic())

    async def end(self, sandbox: "NodeSandbox", problem: str, end: End = End.CLOSED) -> None:
        """The lease is over; returns when nothing of the sandbox is left."""
        self._lifecycle.end(sandbox.sandbox_id, time.monotonic(), problem, end=end)
        self._obey()
        if sandbox.cell is not None:
            await sandbox.cell.destroy()
        await sandbox.hang_up()

    def renew(self, lease: Lease, seconds: float) -> None:
        """The lease lasts for so long from now."""
        self._lifecycle.renew(lease, time.monotonic(), seconds)

    def files_of(self, cell: Cell) -> Files:
        """The files of a cell, as its programs own them."""
        gid = cell.uid_base if self._cells.host.has_id_ranges else self._cells.host.gid
        owner = Owner(cell.uid_base, gid) if self._cells.host.has_id_ranges else None
        return Files(Tree(cell.root_descriptor, owner, cell.image.working_folder), self._threads)

    async def python_of(self, cell: Cell) -> WarmPython:
        """The warm Python of a cell."""
        return await self._zygotes.warm(cell)

    def _obey(self) -> None:
        while commands := self._lifecycle.take():
            for command in commands:
                self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case Make():
                making = self.begin(self._make(command))
                self._makings.add(making)
                making.add_done_callback(self._makings.discard)
            case Give(sandbox_id, number, is_warm):
                sandbox = self._holders[number] = self._sandboxes[sandbox_id]
                sandbox.receive(self._by_number[number])
                sandbox.ready_seconds = self.records.ready(sandbox.lease, is_warm=is_warm)
            case Destroy(number):
                self.begin(self._destroy(number))
            case Over(sandbox_id, problem, outcome, end):
                if (ended := self._sandboxes.pop(sandbox_id, None)) is not None:
                    ended.lose(SandboxError(f"{sandbox_id}: {problem}", outcome), end)
                    if ended.cell is None:
                        self.records.tallies.not_created[outcome] += 1
                        self._settle(ended)

    def begin(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Have something done that nobody waits for, before the node is left."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _make(self, command: Make) -> None:
        try:
            image = None
            if command.spec.image != "python":
                image = await asyncio.to_thread(self._images.find, command.spec.image)
            cell = await self._cells.create(command.spec, image)
        except (SandboxError, ImageError, OSError) as error:
            outcome = error.outcome if isinstance(error, SandboxError) else Outcome.POLICY_DENIED
            self.records.tallies.cells_failed += 1
            self._lifecycle.failed(command.number, time.monotonic(), str(error), outcome)
        else:
            self.records.tallies.cells_made += 1
            if len(self._used_images) < MAX_IMAGES_TOLD:
                self._used_images[command.spec.image] = None
            self._by_number[command.number] = cell
            self._lifecycle.made(command.number, time.monotonic())
        self._obey()

    async def _destroy(self, number: int) -> None:
        cell = self._by_number[number]
        try:
            await cell.destroy()
        except SandboxError as error:
            logger.error("%s is not gone: %s", cell.name, error)  # it still counts against the limits
            return
        del self._by_number[number]
        self.records.tallies.ended_cpu_seconds += cell.usage().cpu_seconds
        self.records.tallies.ended_output_bytes += cell.tally.output_bytes
        if (sandbox := self._holders.pop(number, None)) is not None:
            self._settle(sandbox)
        self._lifecycle.gone(number, time.monotonic())
        self._obey()

    def _settle(self, sandbox: "NodeSandbox") -> None:
        """Nothing of a sandbox is left: close its account."""
        if self._journal is not None:
            self._journal.end(sandbox.sandbox_id)
        reason = str(sandbox.over.result())
        self.records.ended(sandbox.lease, sandbox.end, reason, sandbox.ready_seconds, sandbox.used())

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            seconds = min(TICK_SECONDS, max(0.0, self._lifecycle.next_deadline() - now))
            await asyncio.sleep(seconds if math.isfinite(seconds) else TICK_SECONDS)
            for sandbox in list(self._sandboxes.values()):
                if sandbox.cell is not None and (problem := sandbox.problem()) is not None:
                    self._lifecycle.end(sandbox.sandbox_id, time.monotonic(), problem)
            self._lifecycle.tick(time.monotonic())
            self._obey()


class NodeSandbox:
    """A sandbox of a node. Every call waits until it is ready; after its end, every call raises why it ended."""

    def __init__(self, node: Node, lease: Lease) -> None:
        self.lease = lease
        self.cell: Cell | None = None
        self.over: asyncio.Future[SandboxError] = asyncio.get_running_loop().create_future()
        """Done when the lease is over, with the reason."""
        self.ready_seconds: float | None = None
        """From being asked for to being ready."""
        self.end = End.LOST
        """What ended it, once it is over."""
        self._node = node
        self._ready: asyncio.Future[Cell] = asyncio.get_running_loop().create_future()
        self._num_calls = 0
        self._files: Files | None = None
        self._python: WarmPython | None = None
        self._session: PythonSession | None = None
        self._session_turn = asyncio.Lock()
        self._proxy: Proxy | None = None

    @property
    def sandbox_id(self) -> str:
        """Its name, which begins with the node's."""
        return self.lease.sandbox_id

    async def ready(self) -> None:
        """Wait until it is ready; raises `SandboxError` if it will not be."""
        await self._living()

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        timeout_seconds: float = 60.0,
        kept_bytes: int = 64 << 10,
    ) -> ExecResult:
        """As `Cell.exec`."""
        async with self._use("exec") as cell:
            return self._counted(
                await cell.exec(
                    argv,
                    stdin=stdin,
                    env=self._variables(env),
                    cwd=cwd,
                    timeout_seconds=timeout_seconds,
                    kept_bytes=kept_bytes,
                )
            )

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        terminal: tuple[int, int] | None = None,
    ) -> Process:
        """As `Cell.spawn`. While it runs the sandbox is not idle."""
        async with self._use("spawn") as cell:
            process = await cell.spawn(argv, env=self._variables(env), cwd=cwd, terminal=terminal)
            self._node.begin(self._hold(process))
            return process

    async def python(self, code: str, *, timeout_seconds: float = 60.0) -> PythonResult:
        """Run a snippet in the sandbox's session, which begins with the first one and keeps its variables."""
        async with self._use("python") as cell, self._session_turn:
            if self._session is None:
                self._session = await (await self._warm(cell)).session(env=self._variables(None))
            answer = await self._session.run(code, timeout_seconds)
            if answer.is_over:
                ended, self._session = self._session, None
                await ended.close()
            return PythonResult(answer.text, answer.is_fine, answer.is_late, answer.is_over)

    async def snippet(self, code: str, *, timeout_seconds: float = 60.0) -> ExecResult:
        """What `python -c CODE` does, in a fork of a warm interpreter."""
        async with self._use("snippet") as cell:
            python = await self._warm(cell)
            return self._counted(await python.run(code, env=self._variables(None), timeout_seconds=timeout_seconds))

    async def read(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """As `Tree.read`."""
        async with self._use("files") as cell:
            data = await self._tree(cell).read(path, max_bytes)
            self._node.records.tallies.read_bytes += len(data)
            return data

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> None:
        """As `Tree.write`."""
        async with self._use("files") as cell:
            await self._tree(cell).write(path, data, mode)
            self._node.records.tallies.written_bytes += len(data)

    async def list(self, path: str = ".") -> tuple[FileEntry, ...]:
        """As `Tree.list`."""
        async with self._use("files") as cell:
            return await self._tree(cell).list(path)

    async def remove(self, path: str, *, is_recursive: bool = False) -> None:
        """As `Tree.remove`."""
        async with self._use("files") as cell:
            await self._tree(cell).remove(path, is_recursive=is_recursive)

    async def network_log(self) -> tuple[NetworkRecord, ...]:
        """What it asked of the network, the last thousand requests; those that are under way are not among them."""
        async with self._use("network"):
            return tuple(self._proxy.records) if self._proxy is not None else ()

    async def pause(self) -> None:
        """As `Cell.pause`."""
        async with self._use("state") as cell:
            await cell.pause()

    async def resume(self) -> None:
        """As `Cell.resume`."""
        async with self._use("state") as cell:
            await cell.resume()

    async def renew(self, seconds: float) -> None:
        """The lease lasts for so long from now."""
        if self.over.done():
            raise _again(self.over.result())
        self._node.renew(self.lease, seconds)

    async def close(self) -> None:
        """End it; returns when nothing of it is left. Harmless when repeated."""
        await self._node.end(self, "it is closed")

    def status(self) -> SandboxStatus:
        """What there is to say about it now."""
        now = time.monotonic()
        return SandboxStatus(
            sandbox_id=self.sandbox_id,
            owner=self.lease.owner,
            stage=self.lease.stage,
            image=self.lease.spec.image,
            age_seconds=now - self.lease.asked,
            seconds_left=max(0.0, self.lease.deadline() - now),
            usage=self.used(),
        )

    async def usage(self) -> SandboxUsage:
        """What it has used so far; after its end, in all."""
        return self.used()

    def used(self) -> SandboxUsage:
        """What `usage` says."""
        used = self.cell.usage() if self.cell is not None else SandboxUsage()
        return msgspec.structs.replace(used, num_calls=self._num_calls)

    def problem(self) -> str | None:
        """Why its cell is of no use any more, if so."""
        try:
            if self.cell is not None:
                self.cell.require_alive()
        except SandboxError as error:
            return str(error)
        return None

    def receive(self, cell: Cell) -> None:
        """It is ready; called once, by the node."""
        self.cell = cell
        if self.lease.spec.network == "allow":
            self._node.begin(self._open_network(cell))
        else:
            self._ready.set_result(cell)

    def lose(self, error: SandboxError, end: End) -> None:
        """Its lease is over; called once, by the node."""
        self.end = end
        self.over.set_result(error)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()
        if self._files is not None:
            self._files.tree.close()
        if self._python is not None or self._proxy is not None:
            self._node.begin(self._let_go())

    async def hang_up(self) -> None:
        """End its way out; to be called when it is over. Harmless when repeated."""
        if self._proxy is not None:
            await self._proxy.close()

    async def _living(self) -> Cell:
        if self.over.done():
            raise _again(self.over.result())
        if self._ready.done():
            return self._ready.result()
        try:
            return await asyncio.shield(self._ready)
        except SandboxError as error:
            raise _again(error) from error

    @contextlib.asynccontextmanager
    async def _use(self, kind: str) -> AsyncIterator[Cell]:
        cell = await self._living()
        self._num_calls += 1
        began = time.monotonic()
        with self._node.use(self.lease):
            try:
                yield cell
            except SandboxError as error:
                told = error
                if self.over.done() and not isinstance(error, Unsupported):
                    told = _again(self.over.result())  # the reason, not its consequence
                self._node.records.outcome(told.outcome)
                if told is error:
                    raise
                raise told from error
            finally:
                self._node.records.called(self.lease, kind, began)

    def _counted(self, result: ExecResult) -> ExecResult:
        self._node.records.outcome(result.outcome)
        return result

    async def _open_network(self, cell: Cell) -> None:
        try:
            listener = await cell.listen_at(PROXY_PORT, MAX_WAITING)
        except (SandboxError, OSError) as error:
            await self._node.end(self, f"it gets no network: {error}")
            return
        if self.over.done():
            listener.close()
            return
        lease = self.lease
        self._proxy = Proxy(self._node.gate, lease.sandbox_id, lease.owner, lease.spec.allow, listener)
        self._ready.set_result(cell)

    def _variables(self, env: Mapping[str, str] | None) -> Mapping[str, str] | None:
        spec = self.lease.spec
        if spec.network == "allow":
            return {**proxy_variables(), **spec.env, **(env or {})}
        return {**spec.env, **(env or {})} if spec.env else env

    def _tree(self, cell: Cell) -> Files:
        if self._files is None:
            self._files = self._node.files_of(cell)
        return self._files

    async def _hold(self, process: Process) -> None:
        with self._node.use(self.lease), contextlib.suppress(SandboxError):
            await process.wait()

    async def _let_go(self) -> None:
        await self.hang_up()
        with contextlib.suppress(SandboxError):
            if self._session is not None:
                await self._session.close()
            if self._python is not None:
                await self._python.close()

    async def _warm(self, cell: Cell) -> WarmPython:
        if self._python is None:
            self._python = await self._node.python_of(cell)
        return self._python


def _again(error: SandboxError) -> SandboxError:
    """A new one for each caller: tracebacks would pile up on one."""
    return SandboxError(str(error), error.outcome)
