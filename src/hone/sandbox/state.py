"""Snapshots of what programs left in a cell's working folder, to go back to or to go on from in many cells."""

import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from hone.sandbox.archives import Limits
from hone.sandbox.files import Files

SPOOL_BYTES = 16 << 20


class Snapshot:
    """A folder of a sandbox as it was: files, folders and links, but no processes and no memory.

    It belongs to this process and needs no cell. Use it as a context manager, or `close` it.
    """

    def __init__(self, folder: str, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._archive = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - it lives as long as the snapshot

    @classmethod
    async def take(cls, files: Files, folder: str = ".", limits: Limits = Limits()) -> Self:
        """Snapshot a folder. Pause the cell meanwhile where its programs may be writing."""
        made = cls(folder, limits)
        try:
            await files.pack(folder, made._archive, limits)  # type: ignore[arg-type]
        except BaseException:  # a cancellation too: undo, then pass it on
            made.close()
            raise
        return made

    async def restore(self, files: Files) -> None:
        """Make the folder of a sandbox, the same one or another, what it was: what is not in the snapshot goes."""
        await files.make_folder(self._folder)
        for entry in await files.list(self._folder):
            await files.remove(f"{self._folder}/{entry.name}", is_recursive=True)
        self._archive.seek(0)
        await files.unpack(self._folder, self._archive, self._limits)  # type: ignore[arg-type]

    async def fork(self, sandboxes: Sequence[Files]) -> None:
        """Restore it in each of some sandboxes, one after the other."""
        for files in sandboxes:
            await self.restore(files)

    def close(self) -> None:
        """Forget it."""
        self._archive.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
