"""Cells: sandboxes of this machine made by the kernel's own means, made and taken away."""

import asyncio
import itertools
import os
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from hone.sandbox.cells.cell import Cell
from hone.sandbox.cells.cgroups import Cgroups, sweep
from hone.sandbox.cells.cores import Cores
from hone.sandbox.cells.host import FIRST_ID, LANDLOCK_ABSTRACT_SOCKETS, LAST_ID, Host, host_image, look
from hone.sandbox.cells.plan import (
    Bind,
    Grants,
    Image,
    Operation,
    Plan,
    id_maps,
    plan_cell,
    plan_spawner,
)
from hone.sandbox.cells.programs import KILL_SECONDS
from hone.sandbox.cells.runtimes.known import OTHERS, missing
from hone.sandbox.cells.runtimes.runtime import JOINS, Birth, Launch
from hone.sandbox.cells.scratch import Scratch, remove_tree
from hone.sandbox.cells.spawner import Spawner
from hone.sandbox.errors import SandboxError, Unsupported
from hone.schema.sandboxes import DEFAULT_RUNTIMES, RuntimeName, SandboxSpec

CREATE_SECONDS = 30.0
NUM_IDS = 1 << 16
MAX_PLANS = 256


class Cells:
    """Makes cells; an async context manager. Leaving it destroys all of its cells; so does the death of this process.

    Example::

        async with Cells() as cells:
            cell = await cells.create(SandboxSpec(memory_mb=256))
            result = await cell.exec(["python3", "-c", "print(6 * 7)"])
            await cell.destroy()

    is_weak_allowed: whether to go on where this machine cannot keep all that a runtime promises. host: facts about the
    machine, by default as they are. runtimes: those that sandboxes may ask for; another one is refused.
    """

    def __init__(
        self,
        *,
        host: Host | None = None,
        is_weak_allowed: bool = False,
        runtimes: Collection[RuntimeName] = DEFAULT_RUNTIMES,
    ) -> None:
        self.host = host or look()
        self.runtimes = tuple(runtimes)
        self._is_weak_allowed = is_weak_allowed
        self._scratch = Scratch()
        self._cgroups: Cgroups | None = None
        self._spawners: dict[tuple[RuntimeName, bool], Spawner] = {}
        self._closings: set[asyncio.Task[None]] = set()
        """Of spawners that were lost."""
        self._cells: set[Cell] = set()
        self._numbers = itertools.count(1)
        self._ids: set[int] = set()
        self._cores = Cores(self.host.cores)
        self._plans: dict[tuple[object, ...], _KnownPlan] = {}
        self._nothing = -1
        self.num_swept = 0
        """Cells of dead processes that were removed at the start."""

    async def __aenter__(self) -> Self:
        self._require()
        self._nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.num_swept = sweep(self.host.cgroups)
        self._cgroups = Cgroups(self.host.cgroups)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            ends = await asyncio.gather(*(cell.destroy() for cell in list(self._cells)), return_exceptions=True)
            for problem in ends:
                if isinstance(problem, BaseException):
                    raise problem
        finally:
            await asyncio.gather(*(spawner.close() for spawner in self._spawners.values()), *self._closings)
            if self._cgroups is not None:
                self._cgroups.close()
            self._scratch.close()
            os.close(self._nothing)

    async def create(self, spec: SandboxSpec, image: Image | None = None, *, binds: Sequence[Bind] = ()) -> Cell:
        """A cell that is ready. image: by default the host's programs. binds: more of the host for it to see.

        Raises `SandboxError`; a cancelled creation leaves nothing behind.
        """
        if self._cgroups is None:
            raise RuntimeError("Cells is an async context manager: use `async with`")
        self._require_runtime(spec.runtime)
        if image is None:
            if spec.image != "python":
                raise Unsupported(f"image {spec.image!r} needs an image store; cells alone know the host's, 'python'")
            image = host_image()
        number = next(self._numbers)
        cgroup = self._cgroups.take(spec)
        uid = cgroup.uid if cgroup is not None else self._take_ids()
        cell = Cell(f"cell-{number}", spec, image, uid, self._nothing, self._forget)
        cell.cgroup = cgroup
        cell.cores = self._cores.take(spec.cpus)
        self._cells.add(cell)
        try:
            async with asyncio.timeout(CREATE_SECONDS):
                cell.cgroup = cgroup or self._cgroups.create(cell.name, spec, uid)
                spawner = await self._spawner(spec.runtime, shares_host_network=spec.network == "host")
                await self._bear(cell, number, spawner, binds)
        except TimeoutError as error:
            await cell.destroy()
            raise SandboxError(f"{cell.name} was not ready within {CREATE_SECONDS:g} s") from error
        except OSError as error:
            await cell.destroy()
            raise SandboxError(f"{cell.name} cannot be made: {error}") from error
        except BaseException:  # a cancellation too: undo, then pass it on
            await asyncio.shield(cell.destroy())
            raise
        return cell

    def living(self) -> frozenset[Cell]:
        """Cells that are there, those that are being made or destroyed included."""
        return frozenset(self._cells)

    def memory_bytes(self) -> int | None:
        """What all cells use now, files included; None where no cgroup counts."""
        return self._cgroups.memory_bytes() if self._cgroups is not None else None

    def cpu_seconds(self) -> float | None:
        """What all cells used so far, those that are gone included; None without cgroup v2."""
        return self._cgroups.cpu_seconds() if self._cgroups is not None else None

    async def _bear(self, cell: Cell, number: int, spawner: Spawner, binds: Sequence[Bind]) -> None:
        assert cell.cgroup is not None
        cell.joins_cgroups = cell.is_launched or not spawner.is_native
        theirs = cell.open()
        try:
            with cell.cgroup.entrances() as (unified, tasks):
                descriptors = [theirs.fileno(), *tasks, *cell.listen()]
                if unified is not None:
                    descriptors.append(unified)
                cell.launch = launch = self._launch(cell, binds, num_tasks=len(tasks), agent=spawner.agent)
                plan, cell.operations, cell.image = launch.plan, launch.plan.operations, launch.image
                cell.program_flags = launch.program_flags
                if launch.listener is not None:
                    cell.expect(launch.listener)
                order = plan.encode(number, cgroup=-1 if unified is None else len(descriptors) - 1)
                born = await spawner.order(number, order, descriptors)
        finally:
            theirs.close()
        cell.adopt(await born, spawner)
        await cell.until_ready(plan.operations)

    def _launch(self, cell: Cell, binds: Sequence[Bind], num_tasks: int, agent: Path) -> Launch:
        grants = self._grants(cell, num_tasks)
        if cell.spec.runtime == "cell":
            return Launch(self._plan(cell, binds, grants), cell.image, program_flags=JOINS if cell.joins_cgroups else 0)
        folder = self._scratch.path(cell.name)
        birth = Birth(
            name=cell.name,
            spec=cell.spec,
            image=cell.image,
            binds=tuple(binds),
            grants=grants,
            agent=agent,
            folder=folder,
            said=1 + num_tasks,
            is_weak_allowed=self._is_weak_allowed,
        )
        return OTHERS[cell.spec.runtime].launch(birth, self.host)

    def _plan(self, cell: Cell, binds: Sequence[Bind], grants: Grants) -> Plan:
        """Its plan. Many cells are alike in all but their ids."""
        spec = cell.spec
        key = (id(cell.image), *binds, replace(grants, uid=0, gid=0), spec.memory_mb, spec.disk_mb, spec.max_processes)
        known = self._plans.get(key)
        if known is None or known.image is not cell.image:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            known = self._plans[key] = _KnownPlan(cell.image, plan_cell(spec, cell.image, grants, binds))
        uid_map, gid_map = id_maps(grants)
        return replace(known.plan, uid_map=uid_map, gid_map=gid_map)

    def _grants(self, cell: Cell, num_tasks: int) -> Grants:
        assert self._cgroups is not None
        network = cell.spec.network
        can_share = self.host.landlock >= LANDLOCK_ABSTRACT_SOCKETS
        return Grants(
            uid=cell.uid_base,
            gid=cell.uid_base if self.host.has_id_ranges else self.host.gid,
            num_ids=NUM_IDS if self.host.has_id_ranges else 1,
            cores=cell.cores,
            join=tuple(range(1, 1 + num_tasks)),
            has_memory_limit=self._cgroups.has("memory"),
            has_process_limit=self._cgroups.has("pids"),
            allow_clone3=cell.cgroup is not None and cell.cgroup.can_freeze and not cell.joins_cgroups,
            own_network=network == "none" or (network == "off" and not can_share),
            has_sockets=network != "off",
            scopes_abstract_sockets=network == "off" and can_share,
            masked=self.host.masked,
            limits_inotify=self.host.limits_inotify,
        )

    async def _spawner(self, runtime: RuntimeName, *, shares_host_network: bool) -> Spawner:
        spawner = self._spawners.get((runtime, shares_host_network))
        if spawner is None or spawner.is_lost:
            if spawner is not None:
                closing = asyncio.get_running_loop().create_task(spawner.close())
                self._closings.add(closing)
                closing.add_done_callback(self._closings.discard)
            prelude = self._prelude(runtime, shares_host_network=shares_host_network)
            spawner = self._spawners[runtime, shares_host_network] = Spawner(prelude, is_native=self.host.can_build)
        await spawner.until_started()
        return spawner

    def _prelude(self, runtime: RuntimeName, *, shares_host_network: bool) -> tuple[Operation, ...]:
        if runtime != "cell":
            return OTHERS[runtime].prelude(self.host)
        return plan_spawner(
            is_unprivileged=not self.host.has_id_ranges,
            uid=self.host.uid,
            gid=self.host.gid,
            own_network=not shares_host_network,
        )

    def _take_ids(self) -> int:
        """The first of a cell's ids: a range of its own, or the only one there is."""
        if not self.host.has_id_ranges:
            return self.host.uid
        while True:
            uid = random.randrange(FIRST_ID, LAST_ID, NUM_IDS)
            if uid not in self._ids:
                self._ids.add(uid)
                return uid

    async def _forget(self, cell: Cell) -> None:
        """All of a cell's processes are gone: keep its ids and cgroup for the next, or let go of them."""
        assert self._cgroups is not None
        self._cells.discard(cell)
        self._cores.give_back(cell.cores)
        if cell.launch is not None and cell.launch.folder is not None and cell.launch.folder.exists():
            await asyncio.to_thread(remove_tree, cell.launch.folder)
        cgroup, cell.cgroup = cell.cgroup, None
        if cgroup is not None and not cell.is_layer_held and self._cgroups.give_back(cgroup):
            return
        self._ids.discard(cell.uid_base)
        deadline = time.monotonic() + KILL_SECONDS
        while cgroup is not None and not cgroup.remove():  # the last process may be counted for a moment yet
            if time.monotonic() > deadline:
                raise SandboxError(f"{cell.name}: its cgroup does not become empty")
            await asyncio.sleep(0.001)

    def _require(self) -> None:
        """Raises where this machine has none of the runtimes."""
        problems = {one: missing(one, self.host, is_weak_allowed=self._is_weak_allowed) for one in self.runtimes}
        if all(problems.values()):
            wanted = "cell" if "cell" in problems else self.runtimes[0]
            raise Unsupported(f"no sandboxes here: runtime {wanted!r} needs {problems[wanted]}")

    def _require_runtime(self, runtime: RuntimeName) -> None:
        if runtime not in self.runtimes:
            raise Unsupported(f"runtime {runtime!r} is not offered here; ask for one of {', '.join(self.runtimes)}")
        if problem := missing(runtime, self.host, is_weak_allowed=self._is_weak_allowed):
            raise Unsupported(f"runtime {runtime!r} needs {problem}")


@dataclass(frozen=True, slots=True)
class _KnownPlan:
    image: Image
    plan: Plan
