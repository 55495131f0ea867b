"""The file of `hone synth`: which teacher attempts which tasks, what is kept of it, what is written."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hone.config.recipe import (
    EnvironmentSection,
    NonNegative,
    Positive,
    PositiveFloat,
    SamplingSection,
    Section,
)

GOLD = "gold"


class SynthesisSection(Section):
    """The data set and its folder."""

    name: str = "synthesis"
    """Name of the data set's folder."""
    folder: Path = Path("synth")
    """Where the folders of data sets are."""
    seed: NonNegative = 0
    """Every random choice is derived from this number."""


class TeacherSection(Section):
    """Who answers."""

    target: str
    """An http address (OpenAI-compatible), a recipe (the newest policy of its run), a model folder, or `gold`: the environments' own gold answers."""
    model: str | None = None
    """Model name at an http address."""
    api_key_variable: str | None = None
    """Environment variable that holds the key of an http address."""

    @model_validator(mode="after")
    def _no_dead_fields(self) -> Self:
        is_address = self.target.startswith(("http://", "https://"))
        if is_address and self.model is None:
            raise ValueError(f"teacher.model is missing: which of the models at {self.target} is it?")
        if not is_address and (self.model is not None or self.api_key_variable is not None):
            raise ValueError("teacher.model and teacher.api_key_variable have an effect with an http address only")
        return self


class RolloutsSection(Section):
    """How many rollouts, and how."""

    num_tasks: Positive
    """Train tasks in all, shared among the environments by their weights."""
    num_attempts: Positive = 1
    """Rollouts of each task: the n of best-of-n."""
    max_concurrent: Positive = 64
    """Most rollouts under way."""
    max_turns: Positive | None = None
    """Truncate rollouts after this many turns; default: the environment's own limit."""
    deadline_seconds: PositiveFloat = 600.0
    """A rollout that takes longer is a failure of class timeout."""
    sampling: SamplingSection = SamplingSection(max_tokens=4096)
    """How the teacher is sampled."""


class KeepSection(Section):
    """Which rollouts become training data. Of those of one task the best by reward are kept, shorter ones first among equals."""

    min_reward: float | None = 1.0
    """Least reward."""
    truncated: bool = False
    """Keep rollouts that a budget ended."""
    max_per_task: Positive | None = 1
    """Most rollouts of one task."""
    min_characters: NonNegative = 0
    """Least length of what the teacher wrote, reasoning and tool calls included."""
    max_characters: Positive | None = None
    """Greatest length of what the teacher wrote."""
    max_tokens: Positive | None = None
    """Most tokens that the teacher sampled in the rollout."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages that the teacher may write in; default: any."""
    near_duplicates: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Drop a conversation whose word 5-grams have at least this Jaccard similarity with those of one that is kept; default: only equal ones are dropped."""


class DecontaminationSection(Section):
    """What the data must not give away: evaluation sets."""

    words: Annotated[int, Field(ge=4)] = 13
    """A run of so many equal words (letter case and punctuation aside) with an evaluation text is contamination; shorter evaluation texts contaminate by being asked word for word."""
    held_out_tasks: NonNegative = 2000
    """So many held-out tasks of each of the environments are evaluation texts."""
    environments: tuple[str, ...] = ()
    """Further environments whose held-out tasks are evaluation texts."""
    files: tuple[Path, ...] = ()
    """Files of evaluation texts: every text in the rows of a JSONL or parquet file, every line of another."""


class OutputSection(Section):
    """What is written."""

    formats: tuple[Literal["parquet", "jsonl"], ...] = ("parquet", "jsonl")
    """Formats of the data; each file holds all of it."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.formats:
            raise ValueError("output.formats is empty; name parquet, jsonl or both")
        return self


class SynthesisFile(Section):
    """The whole file."""

    synthesis: SynthesisSection = SynthesisSection()
    teacher: TeacherSection
    environments: Annotated[tuple[EnvironmentSection, ...], Field(min_length=1)]
    rollouts: RolloutsSection
    keep: KeepSection = KeepSection()
    decontamination: DecontaminationSection = DecontaminationSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [environment.name for environment in self.environments]
        if len(set(names)) != len(names):
            raise ValueError(f"environment {max(names, key=names.count)!r} is listed twice; merge the two")
        if self.keep.max_per_task is not None and self.keep.max_per_task > self.rollouts.num_attempts:
            raise ValueError(
                f"keep.max_per_task {self.keep.max_per_task} is more than rollouts.num_attempts {self.rollouts.num_attempts};"
                " lower it"
            )
        if self.teacher.target == GOLD and self.rollouts.num_attempts > 1:
            raise ValueError(
                "rollouts.num_attempts has no effect with teacher.target = 'gold', which always says the same"
            )
        return self

    @property
    def folder(self) -> Path:
        """The data set's folder."""
        return self.synthesis.folder / self.synthesis.name
