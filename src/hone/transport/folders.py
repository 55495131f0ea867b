"""The layout of a run's folder: the one place that knows which file lies where."""

import re
from dataclasses import dataclass
from pathlib import Path

_WEIGHTS = re.compile(r"v(\d{6,})")
_CHECKPOINT = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run. Nothing is created by asking for a path."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def addresses(self) -> Path:
        return self.path / "addresses.json"

    @property
    def model(self) -> Path:
        """The base model with its tokenizer, Hugging Face layout."""
        return self.path / "model"

    @property
    def sft(self) -> Path:
        return self.path / "sft"

    @property
    def sft_conversations(self) -> Path:
        """The environments' gold answers as conversations, where sft.data = "environments"; the launcher writes them."""
        return self.sft / "conversations.jsonl"

    @property
    def sft_checkpoints(self) -> Path:
        return self.sft / "checkpoints"

    @property
    def sft_export(self) -> Path:
        """The result of SFT, Hugging Face layout."""
        return self.sft / "export"

    @property
    def export(self) -> Path:
        """The result of the run, Hugging Face layout."""
        return self.path / "export"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def batches(self) -> Path:
        return self.path / "batches"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def evals(self) -> Path:
        return self.path / "evals"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def spans(self) -> Path:
        return self.path / "spans.jsonl"

    def log(self, process: str) -> Path:
        return self.logs / f"{process}.log"

    def weights_of(self, version: int) -> Path:
        return self.weights / f"v{version:06d}"

    def batch_of(self, step: int) -> Path:
        return self.batches / f"step_{step:06d}.batch"

    def checkpoint_of(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def eval_of(self, version: int) -> Path:
        return self.evals / f"v{version:06d}.json"

    def start_policy(self) -> Path:
        """What RL starts from: the result of SFT if there is one, else the base model."""
        return self.sft_export if self.sft_export.exists() else self.model

    def published_versions(self) -> list[int]:
        """The policy versions that lie complete in `weights`, ascending."""
        return _numbers(self.weights, _WEIGHTS)

    def newest_weights(self) -> tuple[int, Path]:
        """The newest published version and its folder; version 0 is the start policy even before it is published."""
        versions = self.published_versions()
        return (versions[-1], self.weights_of(versions[-1])) if versions else (0, self.start_policy())

    def saved_steps(self) -> list[int]:
        """The steps of the RL checkpoints that lie complete in `checkpoints`, ascending."""
        return _numbers(self.checkpoints, _CHECKPOINT)

    def is_exported(self) -> bool:
        """Whether the trainer has written the run's result, which it does after its last checkpoint."""
        if not self.export.exists():
            return False
        steps = self.saved_steps()
        return not steps or self.export.stat().st_mtime_ns >= self.checkpoint_of(steps[-1]).stat().st_mtime_ns

    def relative(self, path: Path) -> str:
        """How a path inside the folder is written in messages: relative, with forward slashes."""
        return path.relative_to(self.path).as_posix()

    def resolve(self, relative: str) -> Path:
        """The inverse of `relative`."""
        return self.path / relative


def _numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    if not folder.is_dir():
        return []
    found = (pattern.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in found if match is not None)
