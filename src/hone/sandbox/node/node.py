"""A node: cells of this machine for whoever holds a lease on one. It does what `Lifecycle` decides."""

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
from collections.abc import Collection, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from hone.observability.spans import Spans
from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cells import Cells
from hone.sandbox.cells.plan import Image
from hone.sandbox.cells.runtimes.known import features
from hone.sandbox.cells.runtimes.runtime import Feature
from hone.sandbox.descriptors import provide_for_cells
from hone.sandbox.errors import SHORTAGES, ImageError, SandboxError, Unsupported
from hone.sandbox.files.beneath import Owner, file_threads
from hone.sandbox.files.files import Files, Tree
from hone.sandbox.images.finding import Findings
from hone.sandbox.images.policy import ImagePolicy
from hone.sandbox.images.store import ImageStore
from hone.sandbox.network.egress import NetworkPolicy
from hone.sandbox.network.network_log import NetworkLog
from hone.sandbox.network.proxy import Gate
from hone.sandbox.node.journal import Journal
from hone.sandbox.node.lifecycle import Command, Destroy, End, Give, Lease, Lifecycle, Limits, Make, Over, Stage
from hone.sandbox.node.records import Records
from hone.sandbox.node.report import report_of
from hone.sandbox.node.sandbox import NodeSandbox
from hone.sandbox.node.state import Snapshots
from hone.sandbox.python import WarmPython, Zygotes
from hone.schema.sandbox_nodes import NodeReport
from hone.schema.sandboxes import (
    DEFAULT_RUNTIMES,
    Outcome,
    RuntimeName,
    SandboxSpec,
    SandboxStatus,
    SandboxUsage,
)

TICK_SECONDS = 1.0
NUM_FILE_THREADS = 4
MAX_IMAGES_TOLD = 1000
T = TypeVar("T")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")

logger = logging.getLogger("hone.sandbox.node.node")


class Node:
    """Leases sandboxes; an async context manager. Leaving it, or the death of this process, ends all of them.

    name: small letters, digits and dashes; the first part of the ids of its sandboxes, which also say which start of
    the node they are of. folder: for its journal, its accounts and the log of what sandboxes asked of the network; None
    keeps none. network: what sandboxes with an allow-list get. spans: where its pieces of work are told, None nowhere;
    the caller's to close. images_allowed: what sandboxes may be made from, by default everything; whoever serves a node
    to others says less, as names of images can be paths of its disk. preloads: modules that Python of this machine's
    image finds imported; that happens outside of cells, so name only what is trusted. runtimes, is_weak_allowed: as of
    `Cells`. Raises `SandboxError` where another node has the folder.
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
        images_allowed: ImagePolicy = ImagePolicy(),
        preloads: Sequence[str] = (),
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
        self._images_allowed = images_allowed
        self._preloads = tuple(preloads)
        self._findings = Findings(self._image)
        self._turns = asyncio.Semaphore(limits.max_starting)
        """Of those whose image has come: all who waited for one would start at once."""
        self._threads = file_threads(NUM_FILE_THREADS)
        self.snapshots = Snapshots(self.prefix, self._cells.host, self._threads, limits)
        self._by_number: dict[int, Cell] = {}
        self._sandboxes: dict[str, NodeSandbox] = {}
        self._holders: dict[int, NodeSandbox] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._makings: set[asyncio.Task[None]] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._forgetting: asyncio.Task[None] | None = None
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
        if self._preloads:
            await self._preload()
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
            self._findings.close()
            await asyncio.to_thread(self._threads.shutdown)
            self.records.close()
            self.gate.close()
            if self._journal is not None:
                self._journal.close()

    async def _preload(self) -> None:
        try:
            await self._zygotes.prepare(self._preloads)
        except BaseException:  # a cancellation too: undo, then pass it on
            await asyncio.shield(self.__aexit__(None, None, None))
            raise

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

    def create(self, spec: SandboxSpec, *, key: str = "", owner: str = "", snapshot_id: str = "") -> NodeSandbox:
        """A sandbox that will be ready; returns at once. key: asked twice by one owner, it is the same sandbox.

        snapshot_id: of what it begins from, instead of the image alone. Raises `Busy` when as many wait as may, and
        `Unsupported` for what this node does not give.
        """
        if self._is_closing:
            raise SandboxError(f"the node {self.name} is stopping", Outcome.NODE_LOST)
        if spec.network == "allow" and Feature.PORTS not in features(spec.runtime):
            raise Unsupported(f"runtime {spec.runtime!r} has no allow-lists of hosts; take runtime='cell'")
        if refused := self.gate.policy.refuses(spec):
            raise Unsupported(f"the node {self.name} gives no sandbox {refused}; serve it with --private-networks")
        self._images_allowed.admitted(spec.image)
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

    def sandbox(self, sandbox_id: str) -> NodeSandbox:
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

    async def end(self, sandbox: NodeSandbox, problem: str, end: End = End.CLOSED) -> None:
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

    def exchange(self, sandbox: NodeSandbox) -> None:
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
        return await self._zygotes.warm(cell, self._preloads)

    def _obey(self) -> None:
        while commands := self._lifecycle.take():
            for command in commands:
                try:
                    self._do(command)
                except Exception:  # the others are to be done all the same
                    logger.exception("the node %s could not do %s", self.name, command)

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
                    if ended.lease.cell is None:
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
        except Exception as error:  # a surprise may cost this cell, never its place among those that start
            if not isinstance(error, SandboxError | ImageError | OSError):
                logger.exception("a cell of the image %r could not be made", command.spec.image)
            self.records.tallies.cells_failed += 1
            problem = str(error) or type(error).__name__
            self._lifecycle.failed(command.number, time.monotonic(), problem, _outcome(error))
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
            if command.spec.image == "python":
                return await self._cells.create(command.spec)
            image = await self._awaited(command, sandbox)
            async with self._turns:
                self._lifecycle.goes_on(command.number)
                return await self._cells.create(command.spec, image)
        cell = await self._cells.create(command.spec, self.snapshots.image(sandbox.base))
        try:
            await self.snapshots.fill(cell, self._owner_of(cell), sandbox.base)
        except BaseException:  # a cancellation too: undo, then pass it on
            await asyncio.shield(cell.destroy())
            raise
        return cell

    async def _awaited(self, command: Make, sandbox: NodeSandbox | None) -> Image:
        """The image of a cell, which takes nobody's turn to start meanwhile, and is waited for as long as its lease lasts."""
        self._lifecycle.waits(command.number, time.monotonic())
        self._obey()
        over = None if sandbox is None else sandbox.over
        image = await self._findings.image(command.spec.image, over, self._lifecycle.limits.queue_seconds)
        if image is None:
            raise SandboxError(f"the image {command.spec.image!r} was not there in time; it may be for the next one")
        return image

    def _image(self, name: str) -> Image:
        return self._images.find(self._images_allowed.admitted(name))

    async def _destroy(self, number: int) -> None:
        cell = self._by_number[number]
        try:
            await cell.destroy()
        except (SandboxError, OSError) as error:
            logger.error("%s is not gone: %s", cell.name, error)  # it still counts against the limits
            return
        del self._by_number[number]
        self.records.tallies.ended_cpu_seconds += cell.usage().cpu_seconds
        self.records.tallies.ended_output_bytes += cell.tally.output_bytes
        sandbox = self._holders.pop(number, None)
        self._lifecycle.gone(number, time.monotonic())
        self._obey()
        if sandbox is not None:
            self._settle(sandbox)

    def _settle(self, sandbox: NodeSandbox) -> None:
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
            try:
                self._look()
            except Exception:  # all that comes later depends on this loop
                logger.exception("the node %s goes on after this", self.name)
                await asyncio.sleep(TICK_SECONDS)

    def _look(self) -> None:
        """End what is over."""
        for sandbox in list(self._sandboxes.values()):
            if sandbox.cell is not None and (problem := sandbox.problem()) is not None:
                self._lifecycle.end(sandbox.sandbox_id, time.monotonic(), str(problem), problem.outcome)
        self._lifecycle.tick(time.monotonic())
        self._obey()
        if self._forgetting is None or self._forgetting.done():
            self._forgetting = self.begin(self.snapshots.let_go_of_old())


def _outcome(error: Exception) -> Outcome:
    """Of a cell that could not be made: refused only where it would be refused again, however much the machine had free."""
    if isinstance(error, SandboxError):
        return error.outcome
    cause = error.__cause__
    is_short = isinstance(cause, OSError) and cause.errno in SHORTAGES
    return Outcome.POLICY_DENIED if isinstance(error, ImageError) and not is_short else Outcome.AGENT_LOST
