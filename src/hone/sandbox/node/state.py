"""Snapshots of sandboxes' files on a node: taken of a cell, held for a time by their owners, and what cells begin from."""

import asyncio
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import BinaryIO, cast

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.host import Host, can_share_layers
from hone.sandbox.cells.layers import Layer, Layers, hold, is_too_deep, over, used
from hone.sandbox.cells.plan import Image
from hone.sandbox.cells.runtimes.known import features
from hone.sandbox.cells.runtimes.runtime import Feature
from hone.sandbox.errors import Busy, SandboxError, Unsupported
from hone.sandbox.files.archives import TreeLimits
from hone.sandbox.files.beneath import Owner
from hone.sandbox.files.files import Tree
from hone.sandbox.files.layer_copy import copy_layer, drop_marks, open_folders
from hone.sandbox.node.lifecycle import Limits
from hone.schema.sandboxes import Outcome, SandboxSpec, SnapshotStatus

RETRY_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class Archive:
    """Files as a tar archive, to be unpacked in each cell: where no cell can lie over the layers of others.

    file: read at places of each reader's own.
    """

    file: BinaryIO
    size_bytes: int
    num_holders: int = 1


@dataclass(frozen=True, slots=True)
class Base:
    """What a cell begins from: an image and, above it, what other cells left, the last on top."""

    image: Image
    layers: tuple[Layer, ...] = ()
    archive: Archive | None = None


@dataclass(slots=True)
class Snapshot:
    """The files of a sandbox as they were. spec: of that sandbox. ends: when it is let go of, in
    `time.monotonic`."""

    snapshot_id: str
    owner: str
    spec: SandboxSpec
    base: Base
    ends: float

    @property
    def size_bytes(self) -> int:
        """What it takes of the machine's memory, some of it together with other snapshots."""
        archive = self.base.archive.size_bytes if self.base.archive is not None else 0
        return sum(layer.size_bytes for layer in self.base.layers) + archive

    def status(self) -> SnapshotStatus:
        """What there is to say about it now."""
        left = max(0.0, self.ends - time.monotonic())
        return SnapshotStatus(self.snapshot_id, self.spec.image, self.size_bytes, left)


class Snapshots:
    """All snapshots of a node, and the layers that they and its sandboxes hold.

    prefix: of the ids. threads: for copying. limits: more are `Busy`.
    """

    def __init__(self, prefix: str, host: Host, threads: Executor, limits: Limits) -> None:
        self.layers = Layers()
        self._prefix = prefix
        self._host = host
        self._threads = threads
        self._limits = limits
        self._numbers = itertools.count(1)
        self._snapshots: dict[str, Snapshot] = {}
        self._archives: set[Archive] = set()
        self._releasing: set[asyncio.Task[None]] = set()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._snapshots)

    @property
    def size_bytes(self) -> int:
        """What all of them, and the sandboxes that began from some, hold of the machine's memory."""
        return sum(one.size_bytes for one in self.layers.held) + sum(one.size_bytes for one in self._archives)

    @property
    def can_hold(self) -> bool:
        """Whether cells lie over the layers of others here."""
        return can_share_layers(self._host)

    def admit(self, spec: SandboxSpec) -> None:
        """Raises `Busy` where there is no room for another one, `Unsupported` for a sandbox that cannot be snapshot."""
        if Feature.LAYER_SNAPSHOT not in features(spec.runtime):
            raise Unsupported(f"runtime {spec.runtime!r} has no {Feature.LAYER_SNAPSHOT}; ask for 'cell'")
        if self.count >= self._limits.max_snapshots:
            raise Busy(f"{self.count} snapshots are held already", RETRY_SECONDS)
        if self.size_bytes >> 20 >= self._limits.max_snapshot_mb:
            raise Busy(f"snapshots hold {self.size_bytes >> 20} MB already", RETRY_SECONDS)

    def find(self, snapshot_id: str) -> Snapshot:
        """A snapshot by its id; `SandboxError` if there is none."""
        snapshot = self._snapshots.get(snapshot_id)
        if snapshot is None:
            outcome = Outcome.AGENT_LOST if snapshot_id.startswith(self._prefix) else Outcome.NODE_LOST
            raise SandboxError(f"{snapshot_id}: there is no such snapshot (any more)", outcome)
        return snapshot

    def owner(self, snapshot_id: str) -> str | None:
        """Whose a snapshot is; None if there is none."""
        snapshot = self._snapshots.get(snapshot_id)
        return snapshot.owner if snapshot is not None else None

    def add(self, base: Base, spec: SandboxSpec, owner: str, seconds: float) -> Snapshot:
        """A snapshot, which from now on holds what the caller held of its base."""
        snapshot = Snapshot(f"{self._prefix}s{next(self._numbers)}", owner, spec, base, time.monotonic() + seconds)
        self._snapshots[snapshot.snapshot_id] = snapshot
        return snapshot

    async def let_go(self, snapshot: Snapshot) -> None:
        """Forget one. Sandboxes that began from it go on. Harmless when repeated."""
        if self._snapshots.pop(snapshot.snapshot_id, None) is not None:
            await self.release(snapshot.base)

    async def let_go_of_old(self) -> None:
        """Forget those whose time is over."""
        now = time.monotonic()
        for snapshot in [one for one in self._snapshots.values() if one.ends <= now]:
            await self.let_go(snapshot)

    async def let_go_of_all(self) -> None:
        """Forget all."""
        for snapshot in list(self._snapshots.values()):
            await self.let_go(snapshot)
        while self._releasing:
            await asyncio.wait(set(self._releasing))

    def hold(self, base: Base) -> None:
        """Want what is in a base kept; `release` it."""
        hold(base.layers)
        if base.archive is not None:
            base.archive.num_holders += 1

    async def release(self, base: Base) -> None:
        """Want it no longer. It is done also where whoever waits for it is cancelled."""
        releasing = asyncio.get_running_loop().create_task(self._release(base))
        self._releasing.add(releasing)
        releasing.add_done_callback(self._releasing.discard)
        await asyncio.shield(releasing)

    async def _release(self, base: Base) -> None:
        for layer in base.layers:
            await self.layers.release(layer)
        if base.archive is not None:
            base.archive.num_holders -= 1
            if not base.archive.num_holders:
                self._archives.discard(base.archive)
                base.archive.file.close()

    def base_for(self, spec: SandboxSpec, snapshot_id: str) -> Base:
        """What a sandbox begins from; raises where it cannot begin from this snapshot."""
        snapshot = self.find(snapshot_id)
        if spec.image != snapshot.spec.image:
            raise ValueError(f"the snapshot is of the image {snapshot.spec.image!r}, not of {spec.image!r}")
        layers = snapshot.base.layers
        if any(layer.spawner.is_lost for layer in layers):
            raise SandboxError(f"{snapshot_id} was lost with the process that held it")
        if spec.runtime != snapshot.spec.runtime:
            raise Unsupported(
                f"the snapshot is of a sandbox with runtime {snapshot.spec.runtime!r}, not {spec.runtime!r}"
            )
        if (spec.network == "host") != (snapshot.spec.network == "host"):
            raise Unsupported("a sandbox has the host's network if the one had it whose snapshot it begins from")
        return snapshot.base

    def image(self, base: Base) -> Image:
        """What a cell is to be made of."""
        return over(base.image, base.layers)

    async def fill(self, cell: Cell, owner: Owner | None, base: Base) -> None:
        """Give a new cell, whose files are an owner's, what it does not lie over."""
        archive = base.archive
        cell.has_run = bool(base.layers) or archive is not None
        if archive is None:
            return
        tree = Tree(cell.layer_descriptor, owner)  # in which nothing of the host's is bound
        reader = cast(BinaryIO, _Reader(archive.file.fileno()))
        try:
            await self._run(lambda: tree.unpack("/", reader, _limits(cell.spec)))
        finally:
            tree.close()

    async def take_over(self, cell: Cell, base: Base) -> Base:
        """The files of a cell in which nothing will run any more, made a layer: nothing is copied. `OSError` if not."""
        assert cell.spawner is not None
        if not cell.image.layers:  # its programs wrote to it directly
            own = os.dup(cell.layer_descriptor)  # the cell may end meanwhile
            try:
                await self._run(lambda: drop_marks(own))
            finally:
                os.close(own)
        cell.is_layer_held = True
        layer = await self.layers.take_over(cell.spawner, cell.layer_descriptor, self._first_id(cell))
        hold(base.layers)
        return Base(base.image, (layer, *base.layers))

    async def copy(self, cell: Cell, base: Base) -> Base:
        """The files of a cell that goes on, copied; for that moment it is paused, where it can be.

        Layers that are too many are made one with the copy.
        """
        pauses = cell.can_pause and not cell.is_paused
        if pauses:
            await cell.pause()
        try:
            taken = await self._copy(cell, base)
        except BaseException:  # a cancellation too: undo, then pass it on
            if pauses:
                with contextlib.suppress(SandboxError):  # it is gone
                    await cell.resume()
            raise
        try:
            if pauses:
                await cell.resume()
        except BaseException:  # a cancellation too: undo, then pass it on
            await self.release(taken)
            raise
        return taken

    async def _copy(self, cell: Cell, base: Base) -> Base:
        if not self.can_hold:
            return await self._archived(cell, base)
        below = base.layers if is_too_deep(base.image, base.layers) else ()
        layer = await self._copied(cell, base.image, below)
        rest = () if below else base.layers
        hold(rest)
        return Base(base.image, (layer, *rest))

    async def _copied(self, cell: Cell, image: Image, below: tuple[Layer, ...]) -> Layer:
        """One layer of a cell's own and of those below."""
        cell.require_alive()
        assert cell.spawner is not None
        own = os.dup(cell.layer_descriptor)  # the cell may end meanwhile
        hold(below)
        try:
            room = used(own)
            for layer in below:
                room += used(layer.descriptor)
            made = await self.layers.make(cell.spawner, room)
            sources = [(layer.descriptor, layer.first_id) for layer in reversed(below)]
            sources.append((own, self._first_id(cell)))
            try:
                await self._run(lambda: _copy_all(sources, made.descriptor, image.layers))
            except BaseException:  # a cancellation too: undo, then pass it on
                await self.release(Base(image, (made,)))
                raise
        finally:
            os.close(own)
            await self.release(Base(image, below))
        return made

    async def _archived(self, cell: Cell, base: Base) -> Base:
        if base.image.layers:
            raise Unsupported("this kernel cannot show one cell's files below another's; images with layers need that")
        cell.require_alive()
        file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - it lives as long as its holders
        tree = Tree(cell.layer_descriptor)
        try:
            await self._run(lambda: tree.pack("/", file, _limits(cell.spec)))
            file.flush()
        except BaseException:  # a cancellation too: undo, then pass it on
            file.close()
            raise
        finally:
            tree.close()
        archive = Archive(file, os.fstat(file.fileno()).st_size)
        self._archives.add(archive)
        return Base(base.image, (), archive)

    async def _run(self, work: Callable[[], object]) -> None:
        """In a thread, which ends what it has begun: its descriptors are needed until then."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise

    def _first_id(self, cell: Cell) -> int:
        return cell.uid_base if self._host.has_id_ranges else 0


def _limits(spec: SandboxSpec) -> TreeLimits:
    """Holes count as what they are long: a file with a hole larger than any disk is not copied."""
    return TreeLimits(total_bytes=max(1 << 30, 4 * spec.disk_mb << 20), num_entries=1_000_000, depth=200)


def _copy_all(sources: Sequence[tuple[int, int]], target: int, image: Iterable[str]) -> None:
    """Layers with the ids that own them, the lowest first, into one that will lie over an image."""
    with open_folders(image) as below:
        for source, first_id in sources:
            copy_layer(source, target, first_id, below)


class _Reader:
    """A file from its beginning, whoever else reads it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def read(self, size: int) -> bytes:
        data = os.pread(self._descriptor, size, self._position)
        self._position += len(data)
        return data
