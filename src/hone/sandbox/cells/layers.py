"""Layers of files held for cells to lie over: what other cells wrote, taken over or copied, in a place of the spawner's."""

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hone.sandbox.cells.plan import (
    ATTRIBUTE_READ_ONLY,
    MASK,
    MAX_LAYERS,
    NO_DEVICES,
    NO_SETUID,
    STAGE,
    Code,
    Image,
    Operation,
)
from hone.sandbox.cells.spawner import Spawner
from hone.sandbox.errors import SandboxError

MAX_HELD = 16  # laid over one another; opening a file far below costs, so that more are made one
NUM_FOLDERS = 1 << 16
SPARE_BYTES, SPARE_FILES = 1 << 20, 64


@dataclass(eq=False, slots=True)
class Layer:
    """Files that nobody changes any more.

    name: as plans have it. descriptor: of its folder. spawner: whose cells can lie over it. first_id: what owns in it what
    root owns. size_bytes: what it takes of the machine's memory. num_holders: who want it kept.
    """

    name: str
    descriptor: int
    spawner: Spawner
    number: int
    size_bytes: int
    first_id: int = 0
    num_holders: int = 1


class Layers:
    """Holds layers for the cells of some spawners.

    They are mounts in a view that no process works in, so that cells, which copy the mounts there are, do not copy
    them. held: all of them. The memory of a layer that was taken over is counted where the cell's cgroup was, of a
    copied one with this process.
    """

    def __init__(self) -> None:
        self.held: set[Layer] = set()
        self._prepared: set[Spawner] = set()
        self._free: list[int] = []
        self._num_used = 0

    async def take_over(self, spawner: Spawner, descriptor: int, first_id: int) -> Layer:
        """Hold the writable layer of a cell, in which nothing runs that could write to it, nor ever will.

        first_id: the outside's id of what root owns in it. `OSError` where the kernel does not let that be.
        """
        own = os.dup(descriptor)  # the cell may end meanwhile
        try:
            number = await self._number(spawner)
            steps = (
                Operation(Code.KEEPER),
                _folder(number),
                Operation(Code.TAKE_DESCRIPTOR, a=MASK),
                Operation(Code.PUT_TREE, _path(number) + b"\0", a=MASK, b=ATTRIBUTE_READ_ONLY),
            )
            await spawner.carry_out(steps, [own])
        except BaseException:  # a cancellation too: undo, then pass it on
            os.close(own)
            raise
        return self._held(Layer(_name(number), own, spawner, number, used(own).size_bytes, first_id))

    async def make(self, spawner: Spawner, room: "Used") -> Layer:
        """A new, empty layer for as much, to be filled by its descriptor before a cell lies over it."""
        number = await self._number(spawner)
        options = f"size={room.size_bytes + SPARE_BYTES},nr_inodes={room.num_files + SPARE_FILES},mode=755"
        mount = b"tmpfs\0" + _path(number) + b"\0tmpfs\0" + options.encode() + b"\0"
        steps = (
            Operation(Code.KEEPER),
            _folder(number),
            Operation(Code.MOUNT, mount, a=NO_SETUID | NO_DEVICES),
            Operation(Code.GIVE, _path(number) + b"\0"),
        )
        return self._held(Layer(_name(number), await spawner.carry_out(steps), spawner, number, room.size_bytes))

    async def release(self, layer: Layer) -> None:
        """One of its holders wants it no longer; with the last one it goes. Living cells over it keep what they have."""
        layer.num_holders -= 1
        if layer.num_holders:
            return
        self.held.discard(layer)
        os.close(layer.descriptor)
        layer.descriptor = -1
        if layer.spawner.is_lost:  # with all that it held
            return
        with contextlib.suppress(SandboxError, OSError):  # it is lost now, or keeps the mount
            await layer.spawner.carry_out(
                (Operation(Code.KEEPER), Operation(Code.UNMOUNT, _path(layer.number) + b"\0"))
            )
            self._free.append(layer.number)

    def _held(self, layer: Layer) -> Layer:
        self.held.add(layer)
        return layer

    async def _number(self, spawner: Spawner) -> int:
        if spawner not in self._prepared:
            options = f"size=1m,nr_inodes={NUM_FOLDERS + 16},mode=700".encode()
            mount = b"tmpfs\0" + STAGE.encode() + b"\0tmpfs\0" + options + b"\0"
            self._prepared.add(spawner)
            await spawner.carry_out((Operation(Code.KEEPER), Operation(Code.MOUNT, mount, a=NO_SETUID | NO_DEVICES)))
        if self._free:
            return self._free.pop()
        self._num_used += 1
        return self._num_used


@dataclass(frozen=True, slots=True)
class Used:
    """What is in a file system."""

    size_bytes: int
    num_files: int

    def __add__(self, other: "Used") -> "Used":
        return Used(self.size_bytes + other.size_bytes, self.num_files + other.num_files)


def used(descriptor: int) -> Used:
    """What is in the file system of a layer, all of which is the layer's."""
    room = os.fstatvfs(descriptor)
    return Used((room.f_blocks - room.f_bfree) * room.f_frsize, room.f_files - room.f_ffree)


def over(image: Image, layers: Sequence[Layer]) -> Image:
    """An image with layers above its own, the first on top: they have its files and links already."""
    if not layers:
        return image
    return replace(image, layers=(*(layer.name for layer in layers), *image.layers), files=(), links=())


def is_too_deep(image: Image, layers: Sequence[Layer]) -> bool:
    """Whether another layer on top should rather be one with these."""
    return len(layers) >= MAX_HELD or len(image.layers) + len(layers) >= MAX_LAYERS


def hold(layers: Iterable[Layer]) -> None:
    """Want layers kept; `Layers.release` each."""
    for layer in layers:
        layer.num_holders += 1


def _path(number: int) -> bytes:
    return f"{STAGE}/{number}".encode()


def _name(number: int) -> str:
    """Without a slash at its beginning: from the root of the view that layers are held in."""
    return str(Path(STAGE, str(number)).relative_to("/"))


def _folder(number: int) -> Operation:
    return Operation(Code.MAKE_FOLDER, _path(number) + b"\0", a=0o700, b=1)
