"""A sandbox of a node: its calls, its life from one cell to the next, and its end."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.layers import is_too_deep
from hone.sandbox.cells.programs import Process
from hone.sandbox.errors import SandboxError, Unsupported
from hone.sandbox.files.files import Files
from hone.sandbox.network.ports import Connection
from hone.sandbox.node.lifecycle import End, Lease
from hone.sandbox.node.network import SandboxNetwork
from hone.sandbox.node.state import Base, Snapshot
from hone.sandbox.python import PythonSession, WarmPython
from hone.schema.sandbox_network import NetworkRecord
from hone.schema.sandboxes import (
    ExecResult,
    FileEntry,
    PythonResult,
    SandboxStatus,
    SandboxUsage,
    SnapshotStatus,
    Transfer,
)

if TYPE_CHECKING:
    from hone.sandbox.node.node import Node

DYING_LOOKS = 100  # at what is left of a warm Python; then, whatever it is, it is taken for something that runs


class NodeSandbox:
    """A sandbox of a node. Every call waits until it is ready; after its end, every call raises why it ended."""

    def __init__(self, node: "Node", lease: Lease) -> None:
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
            if (session := self._session) is None:
                session = await (await self._warm(cell)).session(env=self._variables(None))
                if cell is not self.cell:
                    await session.close()
                    raise self._begun_anew()
                self._session = session
            answer = await session.run(code, timeout_seconds)
            if answer.is_over:
                if self._session is session:
                    self._session = None
                await session.close()
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

    def problem(self) -> SandboxError | None:
        """Why its cell is of no use any more, if so."""
        try:
            if self.cell is not None:
                self.cell.require_alive()
        except SandboxError as error:
            return error
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
            snapshots.hold(base)  # the sandbox may end meanwhile
            try:
                taken = None
                if snapshots.can_hold and await self._is_quiet(cell):
                    taken = await self._exchanged(cell, base)
                taken = taken or await snapshots.copy(cell, base)
            finally:
                await snapshots.release(base)
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
            for _ in range(DYING_LOOKS):
                if cell.is_quiet():
                    break
                await asyncio.sleep(0.0005)
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
        if self._python is not None and cell is self.cell:
            return self._python
        python = await self._node.python_of(cell)
        if cell is not self.cell:
            with contextlib.suppress(SandboxError):
                await python.close()
            raise self._begun_anew()
        self._python = python
        return python

    def _begun_anew(self) -> SandboxError:
        return SandboxError(f"{self.sandbox_id}: it began anew while this call was under way")


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
