"""Resumable checkpoints: sharded by rank on disk, complete or not there, loadable at another number of ranks."""

import contextlib
import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from hone.trainer.ranks import Ranks
from hone.trainer.step import Trainer

logger = logging.getLogger(__name__)

COMMIT = "complete.json"
PIECE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands: steps done, bad steps skipped so far, and what the data was (`step` is a position in it)."""

    step: int = 0
    num_bad_steps: int = 0
    data: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one stage in `folder`, the newest `keep` of them. All methods are collective calls."""

    folder: Path
    keep: int
    ranks: Ranks

    def save(self, trainer: Trainer, progress: Progress) -> Path:
        """Write model, optimizer and progress; the folder appears under its name when all of it is on disk."""
        target = self.folder / f"step_{progress.step:06d}"
        unfinished = target.with_suffix(".tmp")
        if self.ranks.leads:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self.ranks.wait_for_all()
        with _alone_without_a_warning():
            state_dict_saver.save(_state(trainer), checkpoint_id=unfinished, **self._group())
        checksums = self.ranks.collect({path.name: _checksum(path) for path in self._written_here(unfinished)})
        if self.ranks.leads:
            _commit(unfinished, target, progress, checksums)
            self._prune()
        self.ranks.wait_for_all()
        return target

    def resume(self, trainer: Trainer) -> Progress | None:
        """Load the newest checkpoint that is complete and as it was written; None when there is none."""
        name = self._newest_intact()
        if name is None:
            return None
        state = _state(trainer)
        with _alone_without_a_warning():
            state_dict_loader.load(state, checkpoint_id=self.folder / name, **self._group())
        set_state_dict(
            trainer.model,
            trainer.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizers"],
        )
        return _progress(self.folder / name)

    def covered(self) -> int:
        """The step up to which no kept checkpoint needs its data again; 0 while fewer than `keep` are there."""
        complete = complete_checkpoints(self.folder)
        return _progress(complete[0]).step if len(complete) >= self.keep else 0

    def _newest_intact(self) -> str | None:
        complete = complete_checkpoints(self.folder) if self.ranks.leads else []
        names = self.ranks.share("\n".join(path.name for path in complete).encode()).decode().split()
        for name in reversed(names):
            differing = self._differing(self.folder / name)
            if not differing:
                return name
            logger.warning("checkpoint %s is passed over: %s changed since it was written", name, ", ".join(differing))
        return None

    def _differing(self, path: Path) -> list[str]:
        """Files whose content is not what was written; the ranks read a share each."""
        checksums = sorted(json.loads((path / COMMIT).read_text())["checksums"].items())
        mine = checksums[self.ranks.rank :: self.ranks.num_ranks]
        return sorted(self.ranks.collect({name: 1 for name, known in mine if _checksum(path / name) != known}))

    def _written_here(self, unfinished: Path) -> list[Path]:
        """The files of this rank, which its own page cache still has; the first one's include what is everybody's."""
        files = list(unfinished.iterdir())
        return [path for path in files if path.name.startswith(f"__{self.ranks.rank}_")] + [
            path for path in files if self.ranks.leads and not path.name.startswith("__")
        ]

    def _group(self) -> dict[str, Any]:
        if self.ranks.num_ranks == 1:
            return {"no_dist": True}
        return {"process_group": self.ranks.control}

    def _prune(self) -> None:
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that can be loaded, oldest first; incomplete and damaged ones are passed over."""
    return sorted(path for path in folder.glob("step_*") if path.suffix != ".tmp" and _is_complete(path))


@contextlib.contextmanager
def _alone_without_a_warning() -> Iterator[None]:
    """torch warns of a single process without a process group, though it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _state(trainer: Trainer) -> dict[str, Any]:
    model, optimizers = get_state_dict(trainer.model, trainer.optimizers)
    return {"model": model, "optimizers": optimizers}


def _commit(unfinished: Path, target: Path, progress: Progress, checksums: Mapping[str, int]) -> None:
    """The list of files with sizes and checksums is written last; then one rename makes the checkpoint visible.

    Everything is on the disk before that: older checkpoints and the batches after them go when this one is there.
    """
    sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
    record = {"progress": asdict(progress), "files": sizes, "checksums": checksums}
    (unfinished / COMMIT).write_text(json.dumps(record))
    for path in (*unfinished.iterdir(), unfinished):
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.replace(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> int:
    """CRC-32: it finds what a disk or a person changed, at about the speed of reading."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _is_complete(path: Path) -> bool:
    try:
        record = json.loads((path / COMMIT).read_text())
        complete = all((path / name).stat().st_size == size for name, size in record["files"].items())
        complete &= record["checksums"].keys() <= record["files"].keys()
    except (OSError, ValueError, KeyError):
        complete = False
    if not complete:
        logger.warning("checkpoint %s is incomplete or damaged; it is passed over", path)
    return complete


def _progress(path: Path) -> Progress:
    return Progress(**json.loads((path / COMMIT).read_text())["progress"])
