"""A node: cells of this machine for whoever holds a lease on one. It does what `Lifecycle` decides."""

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeVar

import msgspec

from hone.observability.spans import Spans
from hone.sandbox.beneath import Owner
from hone.sandbox.cells import Cell, Cells
from hone.sandbox.descriptors import provide_for_cells
from hone.sandbox.egress import NetworkPolicy
from hone.sandbox.errors import ImageError, SandboxError, Unsupported
from hone.sandbox.files import Files, Tree
from hone.sandbox.images import ImageStore
from hone.sandbox.journal import Journal
from hone.sandbox.layers import is_too_deep
from hone.sandbox.lifecycle import Command, Destroy, End, Give, Lease, Lifecycle, Limits, Make, Over, Stage
from hone.sandbox.network import SandboxNetwork
from hone.sandbox.network_log import NetworkLog
from hone.sandbox.ports import Connection
from hone.sandbox.programs import Process
from hone.sandbox.proxy import Gate
from hone.sandbox.python import PythonSession, WarmPython, Zygotes
from hone.sandbox.records import Records
from hone.sandbox.report import report_of
from hone.sandbox.state import Base, Snapshot, Snapshots
from hone.schema.sandbox_network import NetworkRecord
from hone.schema.sandbox_nodes import NodeReport
from hone.schema.sandboxes import (
    DEFAULT_RUNTIMES,
    ExecResult,
    FileEntry,
    Outcome,
    PythonResult,
    RuntimeName,
    SandboxSpec,
    SandboxStatus,
    SandboxUsage,
    SnapshotStatus,
    Transfer,
)

TICK_SECONDS = 1.0
NUM_FILE_THREADS = 4
MAX_IMAGES_TOLD = 1000
T = TypeVar("T")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")

logger = logging.getLogger("hone.sandbox.node")


class Node:
    """Leases sandboxes; an async context manager. Leaving it, or the death of this process, ends all of them.

    name: small letters, digits and dashes; the first part of the ids of its sandboxes, which also say which start of the
    node they are of. folder: for its journal, its accounts and the log of what sandboxes asked of the network; None keeps
    none. network: what sandboxes with an allow-list get. spans: where its pieces of work are told, None nowhere; the
    caller's to close. runtimes, is_weak_allowed: as of `Cells`. Raises `SandboxError` where another node has the folder.
    """

    def __init__(
        self,
        name: str = "local",
        *,
        folder: Path | None = None,
        limits: Limits = Limits(),
        images: ImageStore | None = None,
        is_weak_allowed: bool = False,
        runtimes: Collection[RuntimeName] = DEFAULT_RUNTIMES,
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
        self._cells = Cells(is_weak_allowed=is_weak_allowed, runtimes=runtimes)
        self.gate = Gate(network, NetworkLog(folder))
        """The way out for the sandboxes with an allow-list."""
        self._zygotes = Zygotes(host=self._cells.host)
        self._threads = ThreadPoolExecutor(NUM_FILE_THREADS, thread_name_prefix="hone-files")
        self.snapshots = Snapshots(self.prefix, self._cells.host, self._threads, limits)
        self._by_number: dict[int, Cell] = {}
        self._sandboxes: dict[str, NodeSandbox] = {}
        self._holders: dict[int, NodeSandbox] = {}
        self._tasks: set[asyncio.Task[object]] = set()
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
            await self.snapshots.let_go_of_all()
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

    def create(self, spec: SandboxSpec, *, key: str = "", owner: str = "", snapshot_id: str = "") -> "NodeSandbox":
        """A sandbox that will be ready; returns at once. key: asked twice by one owner, it is the same sandbox.

        snapshot_id: of what it begins from, instead of the image alone. Raises `Busy` when as many wait as may.
        """
        if self._is_closing:
            raise SandboxError(f"the node {self.name} is stopping", Outcome.NODE_LOST)
        if refused := self.gate.policy.refuses(spec):
            raise Unsupported(f"the node {self.name} gives no sandbox {refused}; serve it with --private-networks")
        base = None
        if snapshot_id and not self._lifecycle.knows(key, owner):
            base = self.snapshots.base_for(spec, snapshot_id)
        lease = self._lifecycle.ask(spec, time.monotonic(), key=key, owner=owner, snapshot_id=snapshot_id)
        sandbox = self._sandboxes.get(lease.sandbox_id)
        if sandbox is None:
            sandbox = self._sandboxes[lease.sandbox_id] = NodeSandbox(self, lease)
            if base is not None:
                sandbox.begin_from(base)
            try:
                if self._journal is not None:
                    self._journal.begin(lease.sandbox_id, owner)
            except SandboxError as error:
                self._lifecycle.end(lease.sandbox_id, time.monotonic(), str(error))
                self._obey()
                raise
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
            "sandbox/snapshots": self.snapshots.count,
            "sandbox/snapshot_bytes": self.snapshots.size_bytes,
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
        for cell in (sandbox.cell, sandbox.former):
            if cell is not None:
                await cell.destroy()
        await sandbox.hang_up()

    async def hold_snapshot(self, snapshot_id: str, seconds: float) -> None:
        """Hold a snapshot for so long from now; for nothing, let go of it, which does no harm when it is gone."""
        if seconds > 0:
            self.snapshots.find(snapshot_id).ends = time.monotonic() + seconds
            return
        with contextlib.suppress(SandboxError):
            await self.snapshots.let_go(self.snapshots.find(snapshot_id))

    def exchange(self, sandbox: "NodeSandbox") -> None:
        """Give a sandbox that is ready another cell, made from its base, for the one that it has."""
        assert sandbox.lease.cell is not None
        del self._holders[sandbox.lease.cell]
        self._lifecycle.exchange(sandbox.lease, time.monotonic())
        self._obey()

    def renew(self, lease: Lease, seconds: float) -> None:
        """The lease lasts for so long from now."""
        self._lifecycle.renew(lease, time.monotonic(), seconds)

    def files_of(self, cell: Cell) -> Files:
        """The files of a cell, as its programs own them."""
        return Files(Tree(cell.root_descriptor, self._owner_of(cell), cell.files_folder), self._threads)

    def _owner_of(self, cell: Cell) -> Owner | None:
        gid = cell.uid_base if self._cells.host.has_id_ranges else self._cells.host.gid
        return Owner(cell.uid_base, gid) if self._cells.host.has_id_ranges else None

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
                if sandbox.ready_seconds is None:  # another cell for one that began anew is no creation
                    sandbox.ready_seconds = self.records.ready(sandbox.lease, is_warm=is_warm)
            case Destroy(number):
                self.begin(self._destroy(number))
            case Over(sandbox_id, problem, outcome, end):
                if (ended := self._sandboxes.pop(sandbox_id, None)) is not None:
                    ended.lose(SandboxError(f"{sandbox_id}: {problem}", outcome), end)
                    if ended.cell is None:
                        self.records.tallies.not_created[outcome] += not ended.lease.has_begun
                        self._settle(ended)

    def begin(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Have something done that nobody waits for, before the node is left."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _make(self, command: Make) -> None:
        try:
            cell = await self._cell(command)
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

    async def _cell(self, command: Make) -> Cell:
        sandbox = self._sandboxes.get(command.sandbox_id)
        if sandbox is None or sandbox.base is None:
            image = None
            if command.spec.image != "python":
                image = await asyncio.to_thread(self._images.find, command.spec.image)
            return await self._cells.create(command.spec, image)
        cell = await self._cells.create(command.spec, self.snapshots.image(sandbox.base))
        try:
            await self.snapshots.fill(cell, self._owner_of(cell), sandbox.base)
        except BaseException:  # a cancellation too: undo, then pass it on
            await asyncio.shield(cell.destroy())
            raise
        return cell

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
            await self.snapshots.let_go_of_old()


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
        self.base: Base | None = None
        """What its next cell is made from; none: its image."""
        self.former: Cell | None = None
        """The cell that it had before."""
        self._past = SandboxUsage()
        self._state_turn = asyncio.Lock()
        self._network = SandboxNetwork(node.gate, lease)

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

    async def spawn_python(self, code: str, *, env: Mapping[str, str] | None = None, cwd: str = ".") -> Process:
        """What `python -c CODE` does, in a fork of a warm interpreter, to talk with. As `spawn`."""
        async with self._use("spawn") as cell:
            process = await (await self._warm(cell)).spawn(code, env=self._variables(env), cwd=cwd)
            self._node.begin(self._hold(process))
            return process

    async def connect(self, port: int, *, timeout_seconds: float) -> Connection:
        """A connection to a port of its loopback; while it lasts the sandbox is not idle.

        Where nobody listens it is tried for so long, then it is a `ConnectionRefusedError`.
        """
        async with self._use("network") as cell:
            connection = await self._network.connect(cell, port, timeout_seconds)
            self._node.begin(self._hold(connection))
            return connection

    async def python(self, code: str, *, timeout_seconds: float = 60.0) -> PythonResult:
        """Run a snippet in the sandbox's session, which begins with the first one and keeps its variables."""
        async with self._use("python") as cell, self._session_turn:
            if self._session is not None and self._session.is_over:  # with a call that was given up
                self._session = None
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

    async def stat(self, path: str, *, follows_links: bool = True) -> FileEntry:
        """As `Tree.stat`."""
        async with self._use("files") as cell:
            return await self._tree(cell).stat(path, follows_links=follows_links)

    async def make_folder(self, path: str) -> None:
        """As `Tree.make_folder`."""
        async with self._use("files") as cell:
            await self._tree(cell).make_folder(path)

    async def pack(self, path: str, into: BinaryIO) -> Transfer:
        """As `Tree.pack`."""
        async with self._use("files") as cell:
            transfer = await self._tree(cell).pack(path, into)
            self._node.records.tallies.read_bytes += transfer.num_bytes
            return transfer

    async def unpack(self, path: str, source: BinaryIO) -> Transfer:
        """As `Tree.unpack`."""
        async with self._use("files") as cell:
            transfer = await self._tree(cell).unpack(path, source)
            self._node.records.tallies.written_bytes += transfer.num_bytes
            return transfer

    async def upload(self, local: Path, path: str) -> Transfer:
        """As `Files.upload`."""
        async with self._use("files") as cell:
            transfer = await self._tree(cell).upload(local, path)
            self._node.records.tallies.written_bytes += transfer.num_bytes
            return transfer

    async def download(self, path: str, local: Path) -> Transfer:
        """As `Files.download`."""
        async with self._use("files") as cell:
            transfer = await self._tree(cell).download(path, local)
            self._node.records.tallies.read_bytes += transfer.num_bytes
            return transfer

    async def snapshot(self, *, ttl_seconds: float = 600.0) -> SnapshotStatus:
        """Its files as they are now. It goes on as if nothing had happened, though maybe in another cell.

        Where nothing runs in it, its files become a layer, and a new cell over that takes its place. Otherwise they are
        copied, while all in it is paused, and what runs goes on. Raises `Busy` where too much is held already.
        """
        if not ttl_seconds > 0:
            raise ValueError(f"{ttl_seconds:g} s is no time for a snapshot")
        taking = self._node.begin(self._snapshot(ttl_seconds))
        try:
            return (await asyncio.shield(taking)).status()
        except asyncio.CancelledError:
            self._node.begin(self._unwanted(taking))
            raise

    async def reset(self, snapshot_id: str) -> None:
        """Begin anew from a snapshot: what runs in it ends, and the next call waits for another cell."""
        async with self._state_turn, self._use("state") as cell:
            base = self._node.snapshots.base_for(self.lease.spec, snapshot_id)
            former = self.base
            self._part(cell)
            self._drop()
            self.begin_from(base)
            self._node.exchange(self)
            if former is not None:
                await self._node.snapshots.release(former)

    async def network_log(self) -> tuple[NetworkRecord, ...]:
        """What it asked of the network, the last thousand requests; those that are under way are not among them."""
        async with self._use("network"):
            return tuple(self._network.records)

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
        return msgspec.structs.replace(_both(self._past, used), num_calls=self._num_calls)

    def problem(self) -> str | None:
        """Why its cell is of no use any more, if so."""
        try:
            if self.cell is not None:
                self.cell.require_alive()
        except SandboxError as error:
            return str(error)
        return None

    def receive(self, cell: Cell) -> None:
        """It is ready; called by the node, again where it is given another cell."""
        self.cell = cell
        if self._network.is_over:  # that of the cell that it had before
            self._network = SandboxNetwork(self._node.gate, self.lease, self._network.records)
        if self._network.has_list:
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
        self._drop()
        if self.base is not None:
            self._node.begin(self._node.snapshots.release(self.base))

    def begin_from(self, base: Base) -> None:
        """Its next cell is made from this."""
        self._node.snapshots.hold(base)
        self.base = base

    def _drop(self) -> None:
        """Let go of what belongs to its cell."""
        if self._files is not None:
            self._files.tree.close()
        self._network.end()
        if self._python is not None or self._network.has_list:
            self._node.begin(self._let_go(self._python, self._session, self._network))
        self._files = self._python = self._session = None

    def _part(self, cell: Cell) -> None:
        """From here on, calls wait for another cell."""
        self._past = _both(self._past, cell.usage())
        self.cell, self.former = None, cell
        self._ready = asyncio.get_running_loop().create_future()

    def _stay(self, cell: Cell, past: SandboxUsage) -> None:
        """It keeps its cell after all."""
        self.cell, self.former, self._past = cell, None, past
        if not self._ready.done():
            self._ready.set_result(cell)

    async def _snapshot(self, ttl_seconds: float) -> Snapshot:
        async with self._state_turn, self._use("state") as cell:
            snapshots = self._node.snapshots
            snapshots.admit(self.lease.spec)
            base = self.base or Base(cell.image)
            taken = None
            if snapshots.can_hold and await self._is_quiet(cell):
                taken = await self._exchanged(cell, base)
            taken = taken or await snapshots.copy(cell, base)
            if self.over.done():
                await snapshots.release(taken)
                raise _again(self.over.result())
            return snapshots.add(taken, self.lease.spec, self.lease.owner, ttl_seconds)

    async def _is_quiet(self, cell: Cell) -> bool:
        """Whether nothing of a program's is under way but its files, and no other call than ours."""
        if self.lease.num_uses > 1 or self._session is not None:
            return False
        if self._python is not None:  # it runs nothing; the next call has another one
            python, self._python = self._python, None
            await python.close()
        return self.lease.num_uses == 1 and self._python is None and cell.is_quiet()

    async def _exchanged(self, cell: Cell, base: Base) -> Base | None:
        """Make what it has written a layer, and go on above that; None where the kernel does not let that be."""
        snapshots, former, past = self._node.snapshots, self.base, self._past
        take = snapshots.copy if is_too_deep(base.image, base.layers) else snapshots.take_over
        self._part(cell)
        try:
            taken = await take(cell, base)
        except OSError:
            self._stay(cell, past)
            return None
        except BaseException:  # a cancellation too: undo, then pass it on
            self._stay(cell, past)
            raise
        if self.over.done():
            return taken
        self._drop()
        self.begin_from(taken)
        self._node.begin(self._move())
        if former is not None:
            await snapshots.release(former)
        return taken

    async def _move(self) -> None:
        """Go into another cell, after those have heard of the snapshot who wait for it."""
        for _ in range(3):
            await asyncio.sleep(0)
        if not self.over.done():
            self._node.exchange(self)

    async def _unwanted(self, taking: "asyncio.Task[Snapshot]") -> None:
        with contextlib.suppress(SandboxError, OSError):
            await self._node.snapshots.let_go(await taking)

    async def hang_up(self) -> None:
        """End its network; to be called when it is over. Harmless when repeated."""
        await self._network.close()

    async def _living(self) -> Cell:
        while True:
            if self.over.done():
                raise _again(self.over.result())
            ready = self._ready
            if ready.done():
                return ready.result()
            try:
                await asyncio.shield(ready)
            except SandboxError as error:
                raise _again(error) from error
            # Whoever waited longer may have exchanged the cell meanwhile: look again.

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
            await self._network.open(cell)
        except (SandboxError, OSError) as error:
            await self._node.end(self, f"it gets no network: {error}")
            return
        if not self._ready.done():
            self._ready.set_result(cell)

    def _variables(self, env: Mapping[str, str] | None) -> Mapping[str, str] | None:
        own = {**self._network.variables(), **self.lease.spec.env}
        return {**own, **(env or {})} if own else env

    def _tree(self, cell: Cell) -> Files:
        if self._files is None:
            self._files = self._node.files_of(cell)
        return self._files

    async def _hold(self, process: Process | Connection) -> None:
        with self._node.use(self.lease), contextlib.suppress(SandboxError):
            await process.wait()
        if isinstance(process, Connection):
            self._network.forget(process)

    async def _let_go(self, python: WarmPython | None, session: PythonSession | None, network: SandboxNetwork) -> None:
        await network.close()
        with contextlib.suppress(SandboxError):
            if session is not None:
                await session.close()
            if python is not None:
                await python.close()

    async def _warm(self, cell: Cell) -> WarmPython:
        if self._python is None:
            self._python = await self._node.python_of(cell)
        return self._python


def _again(error: SandboxError) -> SandboxError:
    """A new one for each caller: tracebacks would pile up on one."""
    return SandboxError(str(error), error.outcome)


def _both(one: SandboxUsage, other: SandboxUsage) -> SandboxUsage:
    """Of two cells, one after the other: what adds up is added, what is now is the other's."""
    return msgspec.structs.replace(
        other,
        cpu_seconds=one.cpu_seconds + other.cpu_seconds,
        peak_memory_bytes=max(one.peak_memory_bytes or 0, other.peak_memory_bytes or 0) or None,
        output_bytes=one.output_bytes + other.output_bytes,
    )
